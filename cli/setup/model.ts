/**
 * The reference model's package, built from its folder beside the container. The same sources give the same bytes
 * on every machine (fixed times, order and owner, no compression), because a model's digest is part of the record.
 */
import { existsSync } from 'node:fs';
import { mkdir, readdir, readFile, rename, writeFile } from 'node:fs/promises';
import { join, relative } from 'node:path';
import { buffer } from 'node:stream/consumers';
import { gzipSync } from 'node:zlib';
import { pack } from 'tar-stream';
import { BUILD, CONTAINER } from '../paths.ts';
import type { Screen } from '../terminal.ts';
import { hashOf } from './package.ts';

export const REFERENCE_MODEL = 'haematoxylin-area';
const SOURCE = join(CONTAINER, 'models', REFERENCE_MODEL);

const packagePath = (): string =>
  join(BUILD, 'models', `${REFERENCE_MODEL}-${hashOf(SOURCE, ['.']).slice(0, 12)}.tar.gz`);

export const isModelPacked = (): boolean => existsSync(packagePath());

/** Builds the reference model's package where its sources have changed; answers its path. */
export async function ensureModel(screen: Screen): Promise<string> {
  const path = packagePath();
  if (existsSync(path)) return path;
  await screen.task(`Building the reference model's package (${REFERENCE_MODEL})`, async () => {
    await mkdir(join(BUILD, 'models'), { recursive: true });
    const temporary = `${path}.${process.pid}`;
    await writeFile(temporary, await packModel(SOURCE));
    await rename(temporary, path);
  });
  return path;
}

/** A model folder as the bytes of its model.tar.gz. */
export async function packModel(folder: string): Promise<Buffer> {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true });
  const files = entries
    .filter((entry) => entry.isFile())
    .map((entry) => relative(folder, join(entry.parentPath, entry.name)))
    .filter((name) => !/(^|\/)(__pycache__|\.)/.test(name))
    .sort();
  const tar = pack();
  for (const name of files) {
    tar.entry({ name, mode: 0o644, mtime: new Date(0), uid: 0, gid: 0 }, await readFile(join(folder, name)));
  }
  tar.finalize();
  const packed = gzipSync(await buffer(tar as AsyncIterable<Buffer>), { level: 0 });
  // The header's last byte names the operating system.
  packed[9] = 255;
  return packed;
}
