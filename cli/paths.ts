/** Where things lie in the project and on this machine. */
import { readFileSync } from 'node:fs';
import { join, relative, resolve } from 'node:path';

export const PROJECT = resolve(import.meta.dirname, '..');
export const CONTAINER = join(PROJECT, 'containers', 'slide-inference');
/** What setup builds and can build again. */
export const BUILD = join(PROJECT, '.build');
/** The functions' bundles, unpacked for the local AWS. */
export const BUNDLES = join(BUILD, 'functions');

export const venvFolder = (env: NodeJS.ProcessEnv = process.env): string =>
  resolve(env.SLIDEWAY_VENV || join(PROJECT, '.venv'));

export const venvPython = (folder: string): string => join(folder, 'bin', 'python');

export const stateFolder = (given?: string, env: NodeJS.ProcessEnv = process.env): string =>
  resolve(given ?? (env.SLIDEWAY_STATE || join(PROJECT, '.slideway')));

export function projectVersion(): string {
  const { version } = JSON.parse(readFileSync(join(PROJECT, 'package.json'), 'utf8')) as { version: string };
  return version;
}

/** A path as a person would type it here. */
export function shortPath(path: string): string {
  const short = relative(process.cwd(), path);
  return short !== '' && !short.startsWith('..') ? short : path;
}
