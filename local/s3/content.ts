/**
 * The bytes of objects, in plain files that are never changed once an object refers to them.
 *
 * An object's content is a list of extents (file, offset, length): one for an ordinary object, so that copies share
 * the file and take neither time nor space; a copied part is an extent of its source's file, and the parts of an
 * upload write into one file side by side. Who still refers to a file is counted in memory, from the records, so
 * that there is one truth only; a file that no record refers to is a crash's leftover and is removed on start.
 */
import { randomBytes } from 'node:crypto';
import { mkdirSync } from 'node:fs';
import { type FileHandle, mkdir, open, readdir, rm } from 'node:fs/promises';
import { basename, join } from 'node:path';
import type { Digests } from './checksum.ts';

export interface Extent {
  file: string;
  offset: number;
  length: number;
}

const READ_BYTES = 512 * 1024;
const WRITE_BYTES = 1024 * 1024;
/** Other files, such as a file manager leaves, are not touched. */
const FILE_NAME = /^[0-9a-f]{32}$/;

export class ContentDamaged extends Error {
  constructor(file: string) {
    super(`Content file ${file} is shorter than its object says. Restore it or put the object again.`);
    this.name = 'ContentDamaged';
  }
}

export class Content {
  readonly #folder: string;
  readonly #references = new Map<string, number>();
  readonly #removals = new Set<Promise<void>>();

  constructor(folder: string) {
    this.#folder = folder;
    mkdirSync(folder, { recursive: true });
  }

  /** Takes the references that the records hold, once, at start, and removes every file without one. */
  async load(extents: AsyncIterable<Extent>): Promise<void> {
    for await (const { file } of extents) this.#add(file);
    for (const path of await readdir(this.#folder, { recursive: true })) {
      const file = basename(path);
      if (FILE_NAME.test(file) && !this.#references.has(file)) await rm(this.#path(file), { force: true });
    }
  }

  /** Holds the files of `extents` until {@link release}; false, and nothing held, when one is gone already. */
  retain(extents: readonly Extent[]): boolean {
    if (extents.some(({ file }) => !this.#references.has(file))) return false;
    for (const { file } of extents) this.#add(file);
    return true;
  }

  release(extents: readonly Extent[]): void {
    for (const { file } of extents) {
      const references = (this.#references.get(file) ?? 0) - 1;
      if (references > 0) {
        this.#references.set(file, references);
        continue;
      }
      this.#references.delete(file);
      const removal = rm(this.#path(file), { force: true }).finally(() => this.#removals.delete(removal));
      this.#removals.add(removal);
    }
  }

  /** A new, empty file, held by the caller as an extent. */
  async create(): Promise<Extent> {
    const file = randomBytes(16).toString('hex');
    this.#add(file);
    await mkdir(join(this.#folder, file.slice(0, 2)), { recursive: true });
    await (await open(this.#path(file), 'wx')).close();
    return { file, offset: 0, length: 0 };
  }

  /**
   * Writes `source` through `digests` to its own new file, or to `place`, and returns the extents it takes (none when
   * empty), held by the caller. The bytes are on the disk when it returns, before any record can refer to them.
   */
  async write(
    source: AsyncIterable<Buffer>,
    digests: Digests,
    place?: { file: string; offset: number },
  ): Promise<Extent[]> {
    let extent: Extent | undefined;
    let handle: FileHandle | undefined;
    let pending: Promise<unknown> | undefined;
    let length = 0;
    try {
      for await (const bytes of batched(source)) {
        if (!handle) {
          extent = place ? { ...place, length: 0 } : await this.create();
          if (place) this.#add(place.file);
          handle = await open(this.#path(extent.file), 'r+');
        }
        // One write is under way while the next bytes are digested.
        digests.update(bytes);
        await pending;
        pending = writeAll(handle, bytes, (extent?.offset ?? 0) + length);
        pending.catch(() => {});
        length += bytes.length;
      }
      await pending;
      await handle?.datasync();
      return extent ? [{ ...extent, length }] : [];
    } catch (error) {
      await pending?.catch(() => {});
      if (extent) this.release([extent]);
      throw error;
    } finally {
      await handle?.close();
    }
  }

  /** The bytes from `start` on, `length` of them; the caller holds the extents. Throws {@link ContentDamaged}. */
  async *read(extents: readonly Extent[], start: number, length: number): AsyncGenerator<Buffer> {
    for (const piece of slice(extents, start, length)) {
      const handle = await open(this.#path(piece.file), 'r');
      try {
        for (let done = 0; done < piece.length; ) {
          const want = Math.min(READ_BYTES, piece.length - done);
          const { bytesRead, buffer } = await handle.read({
            buffer: Buffer.allocUnsafeSlow(want),
            position: piece.offset + done,
          });
          if (bytesRead === 0) throw new ContentDamaged(piece.file);
          done += bytesRead;
          yield bytesRead === want ? buffer : buffer.subarray(0, bytesRead);
        }
      } finally {
        await handle.close();
      }
    }
  }

  async close(): Promise<void> {
    await Promise.all(this.#removals);
  }

  #add(file: string): void {
    this.#references.set(file, (this.#references.get(file) ?? 0) + 1);
  }

  #path(file: string): string {
    return join(this.#folder, file.slice(0, 2), file);
  }
}

/** Network reads are small; fewer, larger writes are twice as fast. */
async function* batched(source: AsyncIterable<Buffer>): AsyncGenerator<Buffer> {
  let batch: Buffer[] = [];
  let size = 0;
  for await (const bytes of source) {
    batch.push(bytes);
    size += bytes.length;
    if (size < WRITE_BYTES) continue;
    yield Buffer.concat(batch);
    batch = [];
    size = 0;
  }
  if (size > 0) yield Buffer.concat(batch);
}

async function writeAll(handle: FileHandle, bytes: Buffer, position: number): Promise<void> {
  for (let done = 0; done < bytes.length; )
    done += (await handle.write(bytes, done, bytes.length - done, position + done)).bytesWritten;
}

/** The extents of a range of what `extents` hold. */
export function slice(extents: readonly Extent[], start: number, length: number): Extent[] {
  const pieces: Extent[] = [];
  let before = 0;
  for (const { file, offset, length: size } of extents) {
    const from = Math.max(start - before, 0);
    const to = Math.min(start + length - before, size);
    if (from < to) pieces.push({ file, offset: offset + from, length: to - from });
    before += size;
  }
  return pieces;
}

/** The same bytes in as few extents as possible; one reference stays to each of the result's. */
export function merge(extents: readonly Extent[]): { joined: Extent[]; surplus: Extent[] } {
  const joined: Extent[] = [];
  const surplus: Extent[] = [];
  for (const extent of extents) {
    const last = joined.at(-1);
    if (last && last.file === extent.file && last.offset + last.length === extent.offset) {
      joined[joined.length - 1] = { ...last, length: last.length + extent.length };
      surplus.push(extent);
    } else joined.push(extent);
  }
  return { joined, surplus };
}
