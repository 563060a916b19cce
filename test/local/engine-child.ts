/** An engine in a process of its own, for tests that kill it: prints its endpoint and runs until then. */
import { startLocalAws } from '../../local/engine.ts';
import { projectPython } from '../support/python.ts';

const [state = '', folder = '', containers = ''] = process.argv.slice(2);
const aws = await startLocalAws({ state, package: folder, python: projectPython(), containers });
process.stdout.write(`${aws.endpoint}\n`);
