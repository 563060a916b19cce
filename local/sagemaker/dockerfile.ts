/** What a container starts, as its Dockerfile says it; for running it without a container engine. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { UnsupportedLocally } from '../types.ts';

export interface ContainerStart {
  entrypoint: string[];
  /** Default arguments, used when the job gives none. */
  cmd: string[];
}

function execForm(instruction: string, argument: string, path: string): string[] {
  try {
    const parsed: unknown = JSON.parse(argument);
    if (Array.isArray(parsed) && parsed.every((item) => typeof item === 'string')) return parsed;
  } catch {
    // Not JSON: the shell form, refused below.
  }
  throw new UnsupportedLocally(`${instruction} in shell form; write it as a JSON array`, path);
}

/** ENTRYPOINT and CMD of the last stage of `<folder>/Dockerfile`. Throws {@link UnsupportedLocally} on the shell form. */
export function containerStart(folder: string): ContainerStart {
  const path = join(folder, 'Dockerfile');
  const text = readFileSync(path, 'utf8')
    .replaceAll(/^\s*#.*\n/gm, '')
    .replaceAll(/\\\r?\n/g, ' ');
  let start: ContainerStart = { entrypoint: [], cmd: [] };
  for (const line of text.split(/\r?\n/)) {
    const [, word = '', argument = ''] = /^\s*(\w+)\s+(.*?)\s*$/.exec(line) ?? [];
    const instruction = word.toUpperCase();
    if (instruction === 'FROM') start = { entrypoint: [], cmd: [] };
    // As with Docker, a new entry point resets the default arguments.
    if (instruction === 'ENTRYPOINT') start = { entrypoint: execForm('ENTRYPOINT', argument, path), cmd: [] };
    if (instruction === 'CMD') start.cmd = execForm('CMD', argument, path);
  }
  return start;
}
