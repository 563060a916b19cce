/**
 * Streams that are longer than memory: sorted through files in a temporary folder, and read side by side. The order
 * is that of S3's listings and of DynamoDB's sort keys, by the bytes of UTF-8.
 */
import { randomUUID } from 'node:crypto';
import { createReadStream, createWriteStream } from 'node:fs';
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { jsonLine } from './store.ts';

/** Orders text by the bytes of its UTF-8: JavaScript's own order puts U+E000–U+FFFF behind the pairs above. */
export function compareKeys(a: string, b: string): number {
  const length = Math.min(a.length, b.length);
  for (let i = 0; i < length; i++) {
    const x = a.charCodeAt(i);
    const y = b.charCodeAt(i);
    if (x === y) continue;
    const surrogate = (unit: number) => unit >= 0xd800 && unit < 0xe000;
    return surrogate(x) === surrogate(y) ? x - y : surrogate(x) ? 1 : -1;
  }
  return a.length - b.length;
}

interface Entry {
  key: string;
  /** The item as JSON: text takes a fraction of what the object would. */
  text: string;
}

/** Characters that are sorted in memory at a time. */
const RUN_CHARACTERS = 8 << 20;

/** Items, added in any order and read in the order of their keys, those of one key as they were added. */
export class Spool<T> {
  readonly #folder: string;
  readonly #runs: string[] = [];
  #entries: Entry[] = [];
  #characters = 0;
  readonly #limit: number;

  /** Files go into `folder`, which is there. */
  constructor(folder: string, limit = RUN_CHARACTERS) {
    this.#folder = folder;
    this.#limit = limit;
  }

  async add(key: string, item: T): Promise<void> {
    const text = jsonLine(item);
    this.#entries.push({ key, text });
    this.#characters += key.length + text.length;
    if (this.#characters >= this.#limit) await this.#spill();
  }

  /** May be read more than once, when all has been added. */
  async *read(): AsyncGenerator<{ key: string; item: T }> {
    const runs: AsyncIterator<Entry>[] = [];
    for (const path of this.#runs) runs.push(readRun(path));
    this.#sort();
    runs.push(ofMemory(this.#entries));
    for await (const { key, text } of merged(runs)) yield { key, item: JSON.parse(text) as T };
  }

  /** As one of the streams of {@link align}. */
  sorted(): Sorted<{ key: string; item: T }> {
    return { items: this.read(), key: ({ key }) => key };
  }

  async remove(): Promise<void> {
    this.#entries = [];
    for (const path of this.#runs.splice(0)) await rm(path, { force: true });
  }

  async #spill(): Promise<void> {
    this.#sort();
    const path = join(this.#folder, `${randomUUID()}.jsonl`);
    const entries = this.#entries;
    function* lines() {
      for (const { key, text } of entries) yield `${jsonLine(key)}\t${text}\n`;
    }
    this.#runs.push(path);
    await pipeline(Readable.from(lines()), createWriteStream(path));
    this.#entries = [];
    this.#characters = 0;
  }

  #sort(): void {
    this.#entries.sort((a, b) => compareKeys(a.key, b.key));
  }
}

async function* readRun(path: string): AsyncGenerator<Entry> {
  const lines = createInterface({ input: createReadStream(path), crlfDelay: Number.POSITIVE_INFINITY });
  for await (const line of lines) {
    const tab = line.indexOf('\t');
    yield { key: JSON.parse(line.slice(0, tab)) as string, text: line.slice(tab + 1) };
  }
}

async function* ofMemory(entries: readonly Entry[]): AsyncGenerator<Entry> {
  yield* entries;
}

/** Sorted runs as one; of equal keys the earlier run's come first. */
async function* merged(runs: AsyncIterator<Entry>[]): AsyncGenerator<Entry> {
  const heads: { entry: Entry; run: number }[] = [];
  const before = (a: { entry: Entry; run: number }, b: { entry: Entry; run: number }) =>
    (compareKeys(a.entry.key, b.entry.key) || a.run - b.run) < 0;
  const push = async (run: number) => {
    const next = await runs[run]?.next();
    if (!next || next.done) return;
    const head = { entry: next.value, run };
    // As many as there are runs, in order: a binary search finds the place.
    let low = 0;
    let high = heads.length;
    while (low < high) {
      const middle = (low + high) >>> 1;
      const other = heads[middle];
      if (other && before(other, head)) low = middle + 1;
      else high = middle;
    }
    heads.splice(low, 0, head);
  };
  try {
    for (const run of runs.keys()) await push(run);
    for (let head = heads.shift(); head; head = heads.shift()) {
      yield head.entry;
      await push(head.run);
    }
  } finally {
    for (const run of runs) await run.return?.();
  }
}

/** One of the streams that are read side by side, sorted by `key`. */
export interface Sorted<T> {
  items: AsyncIterable<T>;
  key(item: T): string;
}

/** Reads sorted streams side by side: for each key what each of them has under it. */
export async function* align<A, B, C = never>(
  a: Sorted<A>,
  b: Sorted<B>,
  c?: Sorted<C>,
): AsyncGenerator<{ key: string; a: A[]; b: B[]; c: C[] }> {
  const streams = [
    new Grouped(a),
    new Grouped(b),
    new Grouped(c ?? { items: ofNothing<C>(), key: String }),
  ] as const;
  try {
    for (;;) {
      const keys = [];
      for (const stream of streams) {
        const key = await stream.peek();
        if (key !== undefined) keys.push(key);
      }
      const [first] = keys;
      if (first === undefined) return;
      const key = keys.reduce((least, next) => (compareKeys(next, least) < 0 ? next : least), first);
      yield {
        key,
        a: await streams[0].take(key),
        b: await streams[1].take(key),
        c: await streams[2].take(key),
      };
    }
  } finally {
    for (const stream of streams) await stream.close();
  }
}

async function* ofNothing<T>(): AsyncGenerator<T> {}

/** A stream is not in the order that it must have; what is made of it would be wrong. */
export class NotSorted extends Error {
  override readonly name = 'NotSorted';
}

/** A sorted stream, one item ahead. */
class Grouped<T> {
  readonly #items: AsyncIterator<T>;
  readonly #key: (item: T) => string;
  #ahead: { key: string; item: T } | undefined;
  #last: string | undefined;
  #started = false;

  constructor({ items, key }: Sorted<T>) {
    this.#items = items[Symbol.asyncIterator]();
    this.#key = key;
  }

  async peek(): Promise<string | undefined> {
    if (!this.#started) {
      this.#started = true;
      await this.#advance();
    }
    return this.#ahead?.key;
  }

  async take(key: string): Promise<T[]> {
    const items: T[] = [];
    while (this.#ahead?.key === key) {
      items.push(this.#ahead.item);
      await this.#advance();
    }
    return items;
  }

  async close(): Promise<void> {
    await this.#items.return?.();
  }

  async #advance(): Promise<void> {
    const next = await this.#items.next();
    this.#ahead = next.done ? undefined : { key: this.#key(next.value), item: next.value };
    const key = this.#ahead?.key;
    if (key === undefined) return;
    if (this.#last !== undefined && compareKeys(key, this.#last) < 0) {
      throw new NotSorted(`${key} comes after ${this.#last}`);
    }
    this.#last = key;
  }
}
