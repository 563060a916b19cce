/** A function's bundle on disk: unpacked once per content, so that a second start finds it there. */
import { createHash, randomBytes } from 'node:crypto';
import { createReadStream, createWriteStream, existsSync } from 'node:fs';
import { mkdir, rename, rm, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { pipeline } from 'node:stream/promises';
import yauzl from 'yauzl';

/** Unpacks `zip` below `folder`; returns the folder that stands for `/var/task`. */
export async function unpack(zip: string, folder: string): Promise<string> {
  const hash = createHash('sha256');
  await pipeline(createReadStream(zip), hash);
  const target = join(folder, hash.digest('hex').slice(0, 32));
  if (existsSync(target)) return target;
  const fresh = `${target}.${randomBytes(4).toString('hex')}`;
  await mkdir(fresh, { recursive: true });
  try {
    await extract(zip, fresh);
    // A .js file without a package.json of its own would take its module system from some folder above.
    if (!existsSync(join(fresh, 'package.json'))) await writeFile(join(fresh, 'package.json'), '{}\n');
    await rename(fresh, target);
  } catch (error) {
    await rm(fresh, { recursive: true, force: true });
    if (!existsSync(target)) throw error;
  }
  return target;
}

async function extract(zip: string, folder: string): Promise<void> {
  const file = await new Promise<yauzl.ZipFile>((resolve, reject) => {
    yauzl.open(zip, { lazyEntries: true }, (error, opened) => (error ? reject(error) : resolve(opened)));
  });
  await new Promise<void>((resolve, reject) => {
    file.on('error', reject);
    file.on('end', resolve);
    file.on('entry', (entry: yauzl.Entry) => {
      extractEntry(file, entry, folder).then(() => file.readEntry(), reject);
    });
    file.readEntry();
  });
}

/** yauzl refuses names that lead out of the folder. */
async function extractEntry(file: yauzl.ZipFile, entry: yauzl.Entry, folder: string): Promise<void> {
  const path = join(folder, entry.fileName);
  if (entry.fileName.endsWith('/')) {
    await mkdir(path, { recursive: true });
    return;
  }
  await mkdir(dirname(path), { recursive: true });
  const content = await new Promise<NodeJS.ReadableStream>((resolve, reject) => {
    file.openReadStream(entry, (error, stream) => (error ? reject(error) : resolve(stream)));
  });
  await pipeline(content, createWriteStream(path));
}
