/**
 * What makes executions survive a SIGKILL: append-only JSON lines. Each is in the file before the execution goes
 * on, so a restart reads what was done and does only the rest.
 */
import { createHash } from 'node:crypto';
import {
  closeSync,
  existsSync,
  ftruncateSync,
  openSync,
  readSync,
  renameSync,
  writeFileSync,
  writeSync,
} from 'node:fs';

const CHUNK_BYTES = 1024 * 1024;

/** The whole JSON lines of a file, one at a time; a torn last line (the process died writing it) is left out. */
export function* readLines<Line>(path: string): Generator<{ line: Line; end: number }> {
  if (!existsSync(path)) return;
  const file = openSync(path, 'r');
  try {
    const chunk = Buffer.allocUnsafe(CHUNK_BYTES);
    let parts: Buffer[] = [];
    let position = 0;
    for (let read = readSync(file, chunk); read > 0; read = readSync(file, chunk)) {
      let start = 0;
      for (let at = chunk.indexOf(10); at !== -1 && at < read; at = chunk.indexOf(10, start)) {
        parts.push(chunk.subarray(start, at));
        yield { line: JSON.parse(Buffer.concat(parts).toString('utf8')) as Line, end: position + at + 1 };
        parts = [];
        start = at + 1;
      }
      if (start < read) parts.push(Buffer.from(chunk.subarray(start, read)));
      position += read;
    }
  } finally {
    closeSync(file);
  }
}

/** An append-only file of JSON lines. Open it after its lines are read: what is torn at the end is cut off. */
export class LineLog {
  readonly #file: number;

  constructor(path: string, end: number) {
    this.#file = openSync(path, 'a');
    ftruncateSync(this.#file, end);
  }

  append(line: unknown): void {
    writeSync(this.#file, `${JSON.stringify(line)}\n`);
  }

  close(): void {
    closeSync(this.#file);
  }
}

/** What is counted along the way, children included. */
export interface Tally {
  /** State transitions that AWS charges: Standard executions, retries included. */
  standard: number;
  /** Those of EXPRESS children, charged by duration instead. */
  express: number;
  /** Bytes of the largest input or output of a state. */
  largest: number;
}

export const noTally = (): Tally => ({ standard: 0, express: 0, largest: 0 });

export function addTally(to: Tally, { standard, express, largest }: Tally): void {
  to.standard += standard;
  to.express += express;
  to.largest = Math.max(to.largest, largest);
}

/** What the journal knows of one attempt of a task, or of one pause. */
export interface Entry {
  /** Fingerprint of the input; an outcome for another input is not taken. */
  input?: string;
  /** Set before a job is created: after a crash, a job of that name is ours. Epoch milliseconds. */
  begun?: number;
  /** Present (with null for nothing) when the attempt succeeded. */
  output?: unknown;
  failure?: { error: string; cause: string };
  /** What the children of a Distributed Map counted, to be counted again when its outcome is taken. */
  tally?: Tally;
  /** End of a pause, epoch milliseconds. */
  until?: number;
}

/** The journal of one execution, root or child; several children write to one file. */
export class Journal {
  readonly #log: LineLog;
  readonly #child: number | undefined;
  readonly #known: Map<string, Entry> | undefined;

  /** `known` is what was read at a restart; a fresh execution has none. */
  constructor(log: LineLog, known?: Map<string, Entry>, child?: number) {
    this.#log = log;
    this.#known = known;
    this.#child = child;
  }

  /** What is on record under `key`, once: it is forgotten here then, so that memory does not hold it twice. */
  take(key: string): Entry | undefined {
    const entry = this.#known?.get(key);
    this.#known?.delete(key);
    return entry;
  }

  put(key: string, entry: Entry): void {
    this.#log.append({ child: this.#child, key, ...entry });
  }
}

/** Merges a journal line into what is known of its key. */
export function learn(known: Map<string, Entry>, { key, ...entry }: Entry & { key: string }): void {
  known.set(key, { ...known.get(key), ...entry });
}

export function openJournal(path: string): { log: LineLog; journal: Journal } {
  const known = new Map<string, Entry>();
  let end = 0;
  for (const read of readLines<Entry & { key: string }>(path)) {
    learn(known, read.line);
    end = read.end;
  }
  const log = new LineLog(path, end);
  return { log, journal: new Journal(log, known) };
}

export const fingerprint = (value: unknown): string =>
  createHash('sha256')
    .update(JSON.stringify(value) ?? 'null')
    .digest('hex');

/** A UUID that is the same for the same name, so that a restart finds what it had begun. */
export function stableUuid(name: string): string {
  const hex = createHash('sha256').update(name).digest('hex');
  return `${hex.slice(0, 8)}-${hex.slice(8, 12)}-4${hex.slice(13, 16)}-a${hex.slice(17, 20)}-${hex.slice(20, 32)}`;
}

/** Replaces a small document whole, or leaves the old one. */
export function writeDocument(path: string, document: unknown): void {
  writeFileSync(`${path}.tmp`, JSON.stringify(document));
  renameSync(`${path}.tmp`, path);
}
