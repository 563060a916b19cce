/**
 * One engine per state folder. The lock is the highest-numbered file of `<state>/lock/`: whoever creates the next
 * number has it, and only the file system decides who that is. What a dead process left is passed by.
 */
import { randomBytes } from 'node:crypto';
import { linkSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { z } from 'zod';

const holderSchema = z.object({
  pid: z.number().int(),
  /** Clock ticks from boot to the process's start, where the system tells: a pid alone is used again. */
  processStart: z.string().optional(),
  released: z.boolean(),
});
export type Holder = z.infer<typeof holderSchema>;

/** Another living process has the folder. */
export class FolderLocked extends Error {
  override readonly name = 'FolderLocked';
  readonly pid: number;
  constructor(folder: string, pid: number) {
    super(`${folder} is locked by process ${pid}.`);
    this.pid = pid;
  }
}

/** Takes the lock or throws {@link FolderLocked}. The result releases it. */
export function lock(folder: string): () => void {
  const locks = join(folder, 'lock');
  mkdirSync(locks, { recursive: true });
  const self: Holder = { ...thisProcess(), released: false };
  const fresh = join(locks, `new-${process.pid}-${randomBytes(4).toString('hex')}`);
  writeFileSync(fresh, JSON.stringify(self));
  try {
    for (;;) {
      const last = Math.max(0, ...numbers(locks));
      const holder = last > 0 ? readHolder(join(locks, fileOf(last))) : undefined;
      if (holder && !holder.released && isAlive(holder)) throw new FolderLocked(folder, holder.pid);
      const own = join(locks, fileOf(last + 1));
      try {
        linkSync(fresh, own);
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code === 'EEXIST') continue;
        throw error;
      }
      // Numbers only grow: a higher one means that this one was created from an old look at the folder.
      if (Math.max(...numbers(locks)) > last + 1) {
        rmSync(own, { force: true });
        continue;
      }
      for (const number of numbers(locks))
        if (number <= last) rmSync(join(locks, fileOf(number)), { force: true });
      return () => {
        // It stays as the highest number, marked, so that numbers go on growing.
        const released = `${fresh}-released`;
        writeFileSync(released, JSON.stringify({ ...self, released: true }));
        renameSync(released, own);
      };
    }
  } finally {
    rmSync(fresh, { force: true });
  }
}

/** This process, in the form that {@link isAlive} checks. */
export function thisProcess(): { pid: number; processStart?: string } {
  const processStart = statOf(process.pid)?.start;
  return { pid: process.pid, ...(processStart === undefined ? {} : { processStart }) };
}

/** Whether this very process lives, not another that has its number now. */
export function isAlive(holder: { pid: number; processStart?: string | undefined }): boolean {
  try {
    process.kill(holder.pid, 0);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ESRCH') return false;
  }
  const found = statOf(holder.pid);
  if (found === undefined) return true;
  // A zombie holds nothing any more.
  if (found.state === 'Z') return false;
  return holder.processStart === undefined || found.start === holder.processStart;
}

/** Fields 3 and 22 of /proc/<pid>/stat; the command before them may hold anything, and ends with the last parenthesis. */
function statOf(pid: number): { state: string | undefined; start: string | undefined } | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    return { state: fields[0], start: fields[19] };
  } catch {
    return undefined;
  }
}

function fileOf(number: number): string {
  return `${String(number).padStart(9, '0')}.json`;
}

function numbers(locks: string): number[] {
  return readdirSync(locks)
    .filter((name) => /^\d+\.json$/.test(name))
    .map((name) => Number.parseInt(name, 10));
}

/** The holder as written; undefined when the file has just been removed by a newer holder. */
function readHolder(path: string): Holder | undefined {
  try {
    return holderSchema.parse(JSON.parse(readFileSync(path, 'utf8')));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}
