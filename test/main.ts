/**
 * `npm test`: everything that must hold, in one go, counted. Sets up what is missing, packages the deployment, then
 * runs the checkers, the container's tests and the TypeScript tests; each checker counts as one test.
 *
 * Prints as its last line `N passed, N failed, N skipped`; exits 1 when anything failed.
 */
import { spawn, spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { BUILD, CONTAINER, PROJECT } from '../cli/paths.ts';
import { ensurePackage } from '../cli/setup/package.ts';
import { ensurePython } from '../cli/setup/python.ts';
import { Screen } from '../cli/terminal.ts';

interface Counts {
  passed: number;
  failed: number;
  skipped: number;
}

const reports = mkdtempSync(join(tmpdir(), 'slideway-reports-'));
const total: Counts = { passed: 0, failed: 0, skipped: 0 };
// Every test file and every process of a test loads much the same modules.
process.env.NODE_COMPILE_CACHE ??= join(BUILD, 'compile-cache');

function run(program: string, args: string[], cwd = PROJECT): Promise<number> {
  process.stdout.write(`\n> ${[program, ...args].join(' ').replaceAll(`${PROJECT}/`, '')}\n`);
  return new Promise((resolve, reject) => {
    spawn(program, args, { cwd, stdio: ['ignore', 'inherit', 'inherit'] })
      .on('error', reject)
      .on('close', (code) => resolve(code ?? 1));
  });
}

function add({ passed, failed, skipped }: Counts): void {
  total.passed += passed;
  total.failed += failed;
  total.skipped += skipped;
}

/** Whether an environment has a module; Debian lacks some that tests need. */
const has = (python: string, module: string) => spawnSync(python, ['-c', `import ${module}`]).status === 0;

function skip(what: string, module: string): void {
  process.stdout.write(`\n> ${what}: skipped, ${module} is not installed\n`);
  add({ passed: 0, failed: 0, skipped: 1 });
}

async function pythonChecker(python: string, module: string, args: string[]): Promise<void> {
  if (has(python, module)) await checker(python, ['-m', module, ...args], CONTAINER);
  else skip([module, ...args].join(' '), module);
}

async function checker(program: string, args: string[], cwd?: string): Promise<void> {
  const code = await run(program, args, cwd);
  add({ passed: code === 0 ? 1 : 0, failed: code === 0 ? 0 : 1, skipped: 0 });
}

/** Adds what a test runner reports; a runner that reports nothing, or fails beyond its tests, is a failure. */
async function runner(
  program: string,
  args: string[],
  report: string,
  count: (text: string) => Counts,
  cwd?: string,
): Promise<void> {
  const code = await run(program, args, cwd);
  let counts: Counts;
  try {
    counts = count(readFileSync(report, 'utf8'));
  } catch {
    counts = { passed: 0, failed: 0, skipped: 0 };
  }
  const nothing = counts.passed + counts.failed === 0;
  if (nothing || (code !== 0 && counts.failed === 0)) counts.failed += 1;
  add(counts);
}

function countVitest(text: string): Counts {
  const { numPassedTests, numFailedTests, numPendingTests, numTodoTests } = JSON.parse(text) as Record<
    string,
    number
  >;
  return {
    passed: numPassedTests ?? 0,
    failed: numFailedTests ?? 0,
    skipped: (numPendingTests ?? 0) + (numTodoTests ?? 0),
  };
}

function countJunit(text: string): Counts {
  const suite = /<testsuite [^>]*>/.exec(text)?.[0] ?? '';
  const number = (name: string) => Number(new RegExp(` ${name}="(\\d+)"`).exec(suite)?.[1] ?? 0);
  const failed = number('failures') + number('errors');
  const skipped = number('skipped');
  return { passed: number('tests') - failed - skipped, failed, skipped };
}

try {
  const screen = new Screen(process.stdout);
  // Loading and unpacking leave a processor free for what needs no Python; lines that are redrawn would be in its way.
  const environment = ensurePython(screen, { test: true });
  environment.catch(() => {});
  if (screen.live) await environment;
  await ensurePackage(screen, 'dev');
  await checker('tsc', ['--noEmit']);
  await checker('biome', ['check', '.']);
  const python = await environment;
  await pythonChecker(python, 'ruff', ['check', '.']);
  await pythonChecker(python, 'ruff', ['format', '--check', '.']);
  await pythonChecker(python, 'mypy', []);
  if (has(python, 'pyarrow')) {
    const junit = join(reports, 'pytest.xml');
    // A third: one of them often waits, for a time-out or a process that starts.
    const args = ['-m', 'pytest', '-q', '-n', '3', `--junitxml=${junit}`];
    await runner(python, args, junit, countJunit, CONTAINER);
  } else skip("the container's tests", 'pyarrow');
  const vitest = join(reports, 'vitest.json');
  const reporters = ['--reporter=default', '--reporter=json', `--outputFile.json=${vitest}`];
  await runner('vitest', ['run', ...reporters], vitest, countVitest);
} catch (error) {
  process.stdout.write(`\n${(error as Error).message}\n`);
  total.failed += 1;
} finally {
  rmSync(reports, { recursive: true, force: true });
}

process.stdout.write(`\n${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped\n`);
process.exitCode = total.failed > 0 ? 1 : 0;
