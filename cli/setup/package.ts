/**
 * The packaged deployment: what `sls package` makes of serverless.yml, the functions and the state machine. The
 * local AWS loads exactly that. It is made anew when a source has changed.
 */
import { createHash } from 'node:crypto';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { mkdir, rename, rm, writeFile } from 'node:fs/promises';
import { delimiter, join, relative } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import { FolderLocked, lock } from '../../local/lock.ts';
import { BUILD, PROJECT } from '../paths.ts';
import { type Screen, UserError } from '../terminal.ts';
import { CommandFailed, command } from './command.ts';

const SOURCES = [
  'package.json',
  'package-lock.json',
  'serverless.yml',
  'config',
  'core',
  'functions',
  'resources',
  'statemachines',
];
const MARKER = 'slideway-sources';

export const packageFolder = (stage: string): string => join(BUILD, `package-${stage}`);

/** A hash over the names and contents of files and folders, relative to `root`. */
export function hashOf(root: string, names: string[]): string {
  const hash = createHash('sha256');
  const add = (path: string) => {
    hash.update(`${relative(root, path)}\0`);
    hash.update(createHash('sha256').update(readFileSync(path)).digest());
  };
  for (const name of names) {
    const path = join(root, name);
    if (!existsSync(path)) continue;
    const inside = readdirOrNone(path);
    if (inside === undefined) add(path);
    else for (const file of inside) add(file);
  }
  return hash.digest('hex');
}

/** Every file below a folder in a fixed order; `undefined` for a file. */
function readdirOrNone(path: string): string[] | undefined {
  try {
    return readdirSync(path, { recursive: true, withFileTypes: true })
      .filter((entry) => entry.isFile())
      .map((entry) => join(entry.parentPath, entry.name))
      .sort();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOTDIR') return undefined;
    throw error;
  }
}

/** Whether the package of this stage is there and made from today's sources. */
export function isPackaged(stage: string): boolean {
  const marker = join(packageFolder(stage), MARKER);
  return existsSync(marker) && readFileSync(marker, 'utf8') === hashOf(PROJECT, SOURCES);
}

/**
 * Packages the deployment of `stage` where its sources have changed; answers its folder.
 * @throws {UserError} with what the Serverless Framework said.
 */
export async function ensurePackage(screen: Screen, stage: string): Promise<string> {
  const folder = packageFolder(stage);
  if (isPackaged(stage)) return folder;
  if (!existsSync(join(PROJECT, 'config', `${stage}.yml`))) {
    throw new UserError(`There is no stage \`${stage}\`: config/${stage}.yml does not exist.`);
  }
  const release = await alone();
  const sources = hashOf(PROJECT, SOURCES);
  const made = `${folder}.${process.pid}`;
  try {
    if (isPackaged(stage)) return folder;
    await screen.task(`Packaging the deployment (stage ${stage})`, async () => {
      const bin = join(PROJECT, 'node_modules', '.bin');
      await command(
        join(bin, 'serverless'),
        ['package', '--stage', stage, '--package', relative(PROJECT, made)],
        {
          cwd: PROJECT,
          // A bundle that does not build leaves the framework waiting for ever.
          timeoutMs: 180_000,
          env: {
            ...process.env,
            PATH: `${bin}${delimiter}${process.env.PATH}`,
            SLS_NOTIFICATIONS_MODE: 'off',
          },
        },
      );
    });
    await writeFile(join(made, MARKER), sources);
    await rm(folder, { recursive: true, force: true });
    await rename(made, folder);
  } catch (error) {
    if (!(error instanceof CommandFailed)) throw error;
    const said = error.tail.filter((line) => line.trim() !== '').join('\n  ');
    throw new UserError(`The deployment could not be packaged:\n  ${said || error.message}`, undefined, {
      cause: error,
    });
  } finally {
    await rm(made, { recursive: true, force: true });
    release();
  }
  return folder;
}

/** Waits until no other process packages: the framework's plugins build in folders of fixed names. */
async function alone(): Promise<() => void> {
  await mkdir(BUILD, { recursive: true });
  for (;;) {
    try {
      return lock(join(BUILD, 'packaging'));
    } catch (error) {
      if (!(error instanceof FolderLocked)) throw error;
      await wait(500);
    }
  }
}
