/** The project's Python environment, for tests in which jobs run or requests to SageMaker are checked. */
import { existsSync } from 'node:fs';
import { venvFolder, venvPython } from '../../cli/paths.ts';

/** Its interpreter. Throws, saying what to do, when the environment is not there. */
export function projectPython(): string {
  const python = venvPython(venvFolder());
  if (!existsSync(python))
    throw new Error(
      `There is no Python environment at ${venvFolder()}. Run \`npm run setup\`, or set SLIDEWAY_VENV to the folder of one.`,
    );
  return python;
}
