/**
 * What these tests hold to account: the package that `serverless package` wrote, and the programs that judge it.
 * SLIDEWAY_PACKAGE names another package's folder, SLIDEWAY_VENV another Python environment.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { venvFolder, venvPython } from '../../cli/paths.ts';
import { packageFolder } from '../../cli/setup/package.ts';
import { loadPackage } from '../../local/template.ts';
import { projectPython } from '../support/python.ts';
import type { Definition, Template } from './rules.ts';

const FOLDER = resolve(process.env.SLIDEWAY_PACKAGE || packageFolder('dev'));
const TEMPLATE = join(FOLDER, 'cloudformation-template-update-stack.json');

const CFN_LINT = join(venvFolder(), 'bin', 'cfn-lint');
export const hasCfnLint = existsSync(CFN_LINT);

/** Debian's botocore is older than the instances that jobs run on; requests are not held to it. */
export const hasCurrentServiceModel =
  spawnSync(venvPython(venvFolder()), [
    '-c',
    'import botocore; assert int(botocore.__version__.split(".")[1]) >= 34',
  ]).status === 0;

/** The template as CloudFormation gets it. */
export function template(): Template {
  if (!existsSync(TEMPLATE)) throw new Error(`${TEMPLATE} does not exist. Run \`npm run package\` first.`);
  return JSON.parse(readFileSync(TEMPLATE, 'utf8'));
}

/** The one state machine's definition, with every reference resolved. */
export function definition(): Definition {
  for (const resource of loadPackage(FOLDER).resources)
    if (resource.type === 'AWS::StepFunctions::StateMachine')
      return JSON.parse((resource.properties as { DefinitionString: string }).DefinitionString);
  throw new Error(`${TEMPLATE} has no state machine.`);
}

/** Everything that cfn-lint has to say, warnings included; no rule is left out. */
export function cfnLint(document: Template): string[] {
  const folder = mkdtempSync(join(tmpdir(), 'template-'));
  try {
    const path = join(folder, 'template.json');
    writeFileSync(path, JSON.stringify(document));
    const { stdout, stderr, error } = spawnSync(
      CFN_LINT,
      ['--format', 'json', '--non-zero-exit-code', 'none', '--', path],
      { encoding: 'utf8', maxBuffer: 1 << 26 },
    );
    if (error) throw error;
    if (stderr !== '') throw new Error(stderr);
    const found: { Rule: { Id: string }; Message: string; Location: { Path: (string | number)[] } }[] =
      stdout.trim() === '' ? [] : JSON.parse(stdout);
    return found.map(({ Rule, Message, Location }) => `${Rule.Id} ${Message} (${Location.Path.join('.')})`);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

const validate = createRequire(import.meta.url)('asl-validator') as (
  definition: unknown,
  options: { checkPaths: boolean; checkArn: boolean },
) => { isValid: boolean; errorsText(separator: string): string };

/** What asl-validator has to say; empty when nothing. */
export function aslErrors(document: Definition): string {
  // The validator writes defaults into what it checks.
  const result = validate(structuredClone(document), { checkPaths: true, checkArn: true });
  return result.isValid ? '' : result.errorsText('; ');
}

/** What AWS's service model has to say on requests, by service (`sagemaker`) and operation (`createProcessingJob`). */
export function serviceModelFindings(
  requests: { service: string; operation: string; request: unknown }[],
): string[] {
  const script = join(import.meta.dirname, 'check_service_model.py');
  return JSON.parse(
    execFileSync(projectPython(), [script], { input: JSON.stringify(requests), encoding: 'utf8' }),
  );
}
