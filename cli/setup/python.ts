/**
 * The Python environment in which jobs run locally: made from the package index, else from Debian's packages.
 *
 * A marker is written before the work (incomplete) and after it (complete, with a hash of what was asked for), so
 * that a broken setup is made anew and a good one is recognised without starting Python.
 */
import { createHash } from 'node:crypto';
import { existsSync, readFileSync, statfsSync } from 'node:fs';
import { mkdir, readdir, rm, writeFile } from 'node:fs/promises';
import { arch, platform } from 'node:os';
import { dirname, join } from 'node:path';
import { z } from 'zod';
import { CONTAINER, PROJECT, venvFolder, venvPython } from '../paths.ts';
import { bytes, type Screen, UserError } from '../terminal.ts';
import { CommandFailed, command } from './command.ts';

const MARKER = 'slideway-setup.json';
const CONSTRAINTS = join(import.meta.dirname, 'constraints.txt');
const PYPROJECT = join(CONTAINER, 'pyproject.toml');
const TEST_REQUIREMENTS = join(PROJECT, 'test', 'template', 'requirements.txt');
/** In the order of preference; the first that runs and is new enough. */
const INTERPRETERS = ['python3.13', 'python3.12', 'python3.11', 'python3', '/usr/bin/python3'];
const OLDEST: [number, number] = [3, 11];
const DEBIAN_PYTHON = '/usr/bin/python3';

/** What proves that an environment is whole. */
const MODULES = ['boto3', 'numpy', 'openslide', 'PIL', 'torch'];
const TEST_MODULES = ['pytest', 'skimage', 'tifffile', 'xdist'];
/** The same from Debian; what it lacks (compressed Parquet, ONNX models) the container does without. */
const DEBIAN_PACKAGES = [
  'python3-venv',
  'python3-boto3',
  'python3-h5py',
  'python3-numpy',
  'python3-openslide',
  'python3-pil',
  'python3-torch',
];
const DEBIAN_TEST_PACKAGES = [
  'python3-pytest',
  'python3-pytest-xdist',
  'python3-skimage',
  'python3-tifffile',
];
/** Whether the index answers is tried with it: small, and needed in any case. */
const PROBE = 'pillow';

const markerSchema = z.object({
  complete: z.boolean(),
  hash: z.string(),
  /** The test tools are there, too. */
  test: z.boolean(),
  source: z.enum(['index', 'debian', 'given']),
});
type Marker = z.infer<typeof markerSchema>;

export interface PythonOptions {
  /** With what the container's tests need. */
  test?: boolean;
  env?: NodeJS.ProcessEnv;
  /** Pythons to choose from, the best first. */
  interpreters?: string[];
}

/** What an environment is made from; another hash means that packages may be missing. */
function wantedHash(): string {
  // Settings of tools and the container's own version ask for no other packages.
  const [project = ''] = readFileSync(PYPROJECT, 'utf8').split(/^\[tool\./m);
  return createHash('sha256')
    .update(project.replace(/^version = .*$/m, ''))
    .update(readFileSync(CONSTRAINTS))
    .update(readFileSync(TEST_REQUIREMENTS))
    .digest('hex');
}

function readMarker(folder: string): Marker | undefined {
  const path = join(folder, MARKER);
  if (!existsSync(path)) return undefined;
  try {
    return markerSchema.parse(JSON.parse(readFileSync(path, 'utf8')));
  } catch {
    return { complete: false, hash: '', test: false, source: 'index' };
  }
}

const writeMarker = (folder: string, marker: Marker): Promise<void> =>
  writeFile(join(folder, MARKER), `${JSON.stringify(marker)}\n`);

/** The interpreter of a complete environment, else `undefined`. Quick: starts nothing. */
export function readyPython({ test = false, env = process.env }: PythonOptions = {}): string | undefined {
  const folder = venvFolder(env);
  const marker = readMarker(folder);
  const python = venvPython(folder);
  const ready =
    marker?.complete &&
    (marker.source === 'given' || marker.hash === wantedHash()) &&
    (marker.test || !test) &&
    existsSync(python);
  return ready ? python : undefined;
}

/**
 * Makes the environment where it is missing or out of date; answers its interpreter.
 * @throws {UserError} that names what is missing and what to do.
 */
export async function ensurePython(screen: Screen, options: PythonOptions = {}): Promise<string> {
  const ready = readyPython(options);
  if (ready) return ready;
  const { test = false, env = process.env, interpreters = INTERPRETERS } = options;
  const folder = venvFolder(env);
  const python = venvPython(folder);
  const before = readMarker(folder);
  if (!(before && before.source !== 'given') && existsSync(folder) && (await readdir(folder)).length > 0) {
    return adopt(screen, folder, test, env);
  }

  const interpreter = await findInterpreter(interpreters, env);
  // Asking for less than was there before would break what needed it.
  const wanted: Marker = {
    complete: false,
    hash: wantedHash(),
    test: test || !!before?.test,
    source: 'index',
  };
  const begin = async (anew: boolean) => {
    if (anew) await rm(folder, { recursive: true, force: true });
    await mkdir(folder, { recursive: true });
    await writeMarker(folder, wanted);
  };
  try {
    // What pip has installed before, it only adds to.
    await begin(!(before?.complete && before.source === 'index'));
    const refusal = await fromIndex(screen, folder, interpreter, wanted.test, env);
    if (refusal !== undefined) {
      await begin(true);
      await fromDebian(screen, folder, refusal, wanted.test, env);
      wanted.source = 'debian';
    }
    await writeMarker(folder, { ...wanted, complete: true });
  } catch (error) {
    await rm(folder, { recursive: true, force: true });
    throw error;
  }
  return python;
}

/** Takes an environment that somebody else made, if it has what is needed; it is never changed but for the marker. */
async function adopt(screen: Screen, folder: string, test: boolean, env: NodeJS.ProcessEnv): Promise<string> {
  const python = venvPython(folder);
  if (!existsSync(python)) {
    throw new UserError(
      `${folder} exists and is no Python environment. Set SLIDEWAY_VENV to another folder, or remove it.`,
    );
  }
  try {
    await screen.task(`Checking the Python environment ${folder}`, () => checkImports(python, test, env));
  } catch (error) {
    throw new UserError(
      `The Python environment ${folder} was not made by Slideway and is not complete: ${lastLine(error)}. ` +
        `Install what is missing (containers/slide-inference/pyproject.toml), or set SLIDEWAY_VENV to another folder.`,
      undefined,
      { cause: error },
    );
  }
  await writeMarker(folder, { complete: true, hash: wantedHash(), test, source: 'given' }).catch(() => {
    // A folder that cannot be written is checked each time.
  });
  return python;
}

async function findInterpreter(interpreters: string[], env: NodeJS.ProcessEnv): Promise<string> {
  const old: string[] = [];
  for (const candidate of interpreters) {
    const version = await versionOf(candidate, env);
    if (!version) continue;
    const [major = 0, minor = 0] = version;
    if (major > OLDEST[0] || (major === OLDEST[0] && minor >= OLDEST[1])) return candidate;
    old.push(`${candidate} is ${version.join('.')}`);
  }
  throw new UserError(
    `Python ${OLDEST.join('.')} or newer was not found${old.length > 0 ? ` (${old.join(', ')})` : ''}. ` +
      'Install it (Debian, Ubuntu: `sudo apt-get install python3 python3-venv`; macOS: `brew install python@3.13`), then run the command again.',
  );
}

async function versionOf(interpreter: string, env: NodeJS.ProcessEnv): Promise<number[] | undefined> {
  try {
    const [line = ''] = await command(
      interpreter,
      ['-c', 'import sys; print(*sys.version_info[:2], sep=".")'],
      { env, timeoutMs: 20_000 },
    );
    return line.split('.').map(Number);
  } catch {
    return undefined;
  }
}

/** Requirements of the container, from the container's pyproject.toml. */
async function requirements(python: string, test: boolean): Promise<string[]> {
  const script = `
import json, sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
extras = project.get("optional-dependencies", {})
runtime = project["dependencies"] + extras["native"] + extras["fast"] + extras["models"]
print(json.dumps({"runtime": runtime, "test": extras["test"]}))`;
  const [line = '{}'] = await command(python, ['-c', script, PYPROJECT]);
  const lists = z.object({ runtime: z.array(z.string()), test: z.array(z.string()) }).parse(JSON.parse(line));
  return [...lists.runtime, ...(test ? [...lists.test, '-r', TEST_REQUIREMENTS] : [])];
}

/** Installs with pip; answers why not, where the index has not what is needed. */
async function fromIndex(
  screen: Screen,
  folder: string,
  interpreter: string,
  test: boolean,
  env: NodeJS.ProcessEnv,
): Promise<string | undefined> {
  const python = venvPython(folder);
  try {
    if (!existsSync(python)) await command(interpreter, ['-m', 'venv', folder], { env });
  } catch (error) {
    return `${interpreter} cannot make environments (${lastLine(error)}; Debian and Ubuntu have that in python3-venv)`;
  }
  const pip = (args: string[], onLine?: (line: string) => void) =>
    command(python, ['-m', 'pip', '--disable-pip-version-check', '--no-input', ...args], {
      env,
      ...(onLine && { onLine }),
    });
  const wanted = await requirements(python, test);
  try {
    await screen.task('Asking the Python package index', () =>
      pip(['install', '--dry-run', '--no-deps', '--retries', '0', '--timeout', '10', PROBE]),
    );
  } catch (error) {
    return `the Python package index cannot be reached (${lastLine(error)})`;
  }

  if (platform() === 'linux' && arch() === 'x64') {
    screen.print(
      screen.paint(
        'dim',
        'torch from the index brings CUDA libraries on Linux x86-64: about 3 GB to load, 5.4 GB on disk, a minute\n' +
          "or more. For the small CPU build, stop with Ctrl-C and set PIP_EXTRA_INDEX_URL to PyTorch's CPU index or\n" +
          'PIP_FIND_LINKS to a folder that holds its wheel.',
      ),
    );
  }
  const free = freeBytes(folder);
  if (free < 1.5e9) {
    throw new UserError(
      `${bytes(free)} are free where ${folder} is; the Python environment needs 1.5 GB (CPU) to 6 GB (CUDA). ` +
        'Make room, or set SLIDEWAY_VENV to a folder on another disk.',
    );
  }
  if (free < 6e9) screen.warn(`Only ${bytes(free)} are free; an environment with CUDA libraries needs 6 GB.`);

  try {
    await screen.task(`Installing Python packages into ${folder}`, (at) =>
      // Compiling all that comes with torch takes a minute; what is imported is compiled then.
      pip(['install', '--no-compile', '--progress-bar', 'off', '-c', CONSTRAINTS, ...wanted], (line) => {
        const detail = pipDetail(line);
        if (detail) at(detail);
      }),
    );
  } catch (error) {
    if (error instanceof CommandFailed && error.tail.some((line) => line.includes('No space left'))) {
      throw new UserError(`The disk that holds ${folder} is full. Set SLIDEWAY_VENV to a folder elsewhere.`);
    }
    return `pip could not install what is needed (${lastLine(error)})`;
  }
  await screen.task('Checking the Python environment', () =>
    checkImports(python, test, { ...env, PYTHONDONTWRITEBYTECODE: '' }),
  );
  return undefined;
}

/** What pip is at, from a line it wrote; `undefined` where the line says nothing new. */
export function pipDetail(line: string): string | undefined {
  const loading = /^\s*Downloading (\S+?)(?:\.metadata)? \(([^)]+)\)/.exec(line);
  if (loading?.[1] && loading[2]) {
    const file = loading[1].split('/').at(-1) ?? '';
    return `loading ${file.split('-').slice(0, 2).join(' ')} (${loading[2]})`;
  }
  if (/^Installing collected packages/.test(line)) return 'unpacking';
  return /^Collecting (\S+)/.exec(line)?.[1];
}

/** Uses what Debian or Ubuntu packages: installs as root, else says which command does it. */
async function fromDebian(
  screen: Screen,
  folder: string,
  refusal: string,
  test: boolean,
  env: NodeJS.ProcessEnv,
): Promise<void> {
  const remedy =
    'Give pip an index (PIP_INDEX_URL) or a folder of wheels (PIP_FIND_LINKS), then run the command again.';
  const version = existsSync('/usr/bin/apt-get') ? await versionOf(DEBIAN_PYTHON, env) : undefined;
  const [major = 0, minor = 0] = version ?? [];
  if (major !== OLDEST[0] || minor < OLDEST[1]) throw new UserError(`${capital(refusal)}. ${remedy}`);
  screen.warn(`${capital(refusal)}. Using Debian's packages instead.`);

  const names = [...DEBIAN_PACKAGES, ...(test ? DEBIAN_TEST_PACKAGES : [])];
  const missing = await missingPackages(names, env);
  if (missing.length > 0) await installPackages(screen, missing, refusal, remedy, env);
  await screen.task(`Making the Python environment ${folder}`, async () => {
    await command(DEBIAN_PYTHON, ['-m', 'venv', '--system-site-packages', folder], { env });
    await checkImports(venvPython(folder), test, env);
  });
}

// biome-ignore lint/suspicious/noTemplateCurlyInString: these are dpkg-query's placeholders
const DPKG_FORMAT = '${Package} ${Status}\n';

async function missingPackages(names: string[], env: NodeJS.ProcessEnv): Promise<string[]> {
  const installed = await command('dpkg-query', ['-W', '-f', DPKG_FORMAT, ...names], {
    env,
  }).catch((error: unknown) => {
    if (error instanceof CommandFailed) return error.tail;
    throw error;
  });
  return names.filter((name) => !installed.includes(`${name} install ok installed`));
}

async function installPackages(
  screen: Screen,
  missing: string[],
  refusal: string,
  remedy: string,
  env: NodeJS.ProcessEnv,
): Promise<void> {
  const install = ['install', '--yes', '--no-install-recommends', ...missing];
  if (process.getuid?.() !== 0) {
    throw new UserError(
      `${capital(refusal)}. ${remedy} Or install Debian's packages: sudo apt-get ${install.join(' ')}`,
    );
  }
  const quiet = { ...env, DEBIAN_FRONTEND: 'noninteractive' };
  await screen.task(
    `Installing Debian packages (${missing.length}, with what they need about 1 GB)`,
    async (at) => {
      const onLine = (line: string) => {
        const name = /^(?:Get:\d+|Setting up|Unpacking) (?:\S+ \S+ \S+ )?(\S+)/.exec(line)?.[1];
        if (name) at(name);
      };
      try {
        await command('apt-get', install, { env: quiet, onLine });
      } catch {
        // The lists may be missing or old.
        try {
          await command('apt-get', ['update'], { env: quiet, onLine });
          await command('apt-get', install, { env: quiet, onLine });
        } catch (error) {
          throw new UserError(
            `${capital(refusal)}, and apt-get could not install ${missing.join(' ')}: ${lastLine(error)}. ${remedy}`,
            undefined,
            { cause: error },
          );
        }
      }
    },
  );
}

/** Imports everything for real, so that a broken library shows now and not in a job. */
async function checkImports(python: string, test: boolean, env: NodeJS.ProcessEnv): Promise<void> {
  const modules = [...MODULES, ...(test ? TEST_MODULES : []), 'slideway_inference'];
  await command(python, ['-c', `import ${modules.join(', ')}`], {
    env: { PYTHONDONTWRITEBYTECODE: '1', ...env, PYTHONPATH: CONTAINER },
    timeoutMs: 180_000,
  });
}

function freeBytes(folder: string): number {
  const existing = existsSync(folder) ? folder : dirname(folder);
  const { bavail, bsize } = statfsSync(existing);
  return bavail * bsize;
}

function lastLine(error: unknown): string {
  if (!(error instanceof CommandFailed)) return (error as Error).message;
  const said = error.tail.filter((line) => line.trim() !== '');
  const told = said.findLast((line) => line.startsWith('ERROR')) ?? said.at(-1) ?? error.message;
  return told
    .replace(/^ERROR:\s*/, '')
    .trim()
    .slice(0, 300);
}

const capital = (text: string): string => text.charAt(0).toUpperCase() + text.slice(1);
