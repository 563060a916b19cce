/**
 * One running container of a job: started under supervision, its lines sent to the logs as they come, ended
 * politely or at once, and never left behind.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import type { Readable } from 'node:stream';
import type { Command } from './executors.ts';
import { endSession, markOf, type ProcessMark, signalSession } from './processes.ts';

const SUPERVISOR = join(import.meta.dirname, 'supervise.ts');
/** CloudWatch's limit for one event; longer lines are cut into several. */
const LINE_LIMIT = 256 * 1024;

export interface Container {
  readonly mark: ProcessMark;
  /** Resolves with the exit code (128 + n after signal n) when nothing of the container lives any more. */
  readonly exited: Promise<number>;
  /** SIGTERM to all its processes, SIGKILL to those that live after `graceMs`; 0 is SIGKILL at once. */
  stop(graceMs: number): Promise<void>;
}

function eachLines(stream: Readable, onLines: (lines: string[]) => void): void {
  let rest = '';
  stream.setEncoding('utf8');
  stream.on('data', (chunk: string) => {
    const lines = (rest + chunk).split(/\r?\n|\r/);
    rest = lines.pop() ?? '';
    while (rest.length > LINE_LIMIT) {
      lines.push(rest.slice(0, LINE_LIMIT));
      rest = rest.slice(LINE_LIMIT);
    }
    if (lines.length > 0) onLines(lines);
  });
  stream.on('end', () => {
    if (rest !== '') onLines([rest]);
  });
}

/**
 * Starts `command`. `onStarted` is called with the process before the container's own code runs, so that what may
 * have to be ended later is on record first.
 */
export async function startContainer(
  command: Command,
  onStarted: (mark: ProcessMark) => void,
  onLines: (lines: string[]) => void,
): Promise<Container> {
  const child = spawn(process.execPath, [SUPERVISOR], { detached: true, stdio: 'pipe' });
  await once(child, 'spawn');
  // The end of a supervisor shows in its exit; a pipe that broke before is no news.
  child.stdin.on('error', () => undefined);
  eachLines(child.stdout, onLines);
  eachLines(child.stderr, onLines);
  const mark = child.pid === undefined ? null : markOf(child.pid);
  if (mark === null) throw new Error('The supervisor ended before it began.');
  onStarted(mark);
  child.stdin.write(`${JSON.stringify(command)}\n`);

  const closed = once(child, 'close');
  const exited = once(child, 'exit').then(async ([code, signal]: (number | string | null)[]) => {
    // Whatever the container left in the background goes with it, and with it the last holder of the pipes.
    await endSession(mark);
    await closed;
    return typeof code === 'number' ? code : signal === 'SIGTERM' ? 143 : 137;
  });
  let stopping: Promise<void> | undefined;
  return {
    mark,
    exited,
    async stop(graceMs) {
      if (graceMs === 0) return endSession(mark);
      stopping ??= (async () => {
        signalSession(mark, 'SIGTERM');
        const grace = new AbortController();
        const waited = new Promise<void>((resolve) => {
          const timer = setTimeout(resolve, graceMs);
          grace.signal.addEventListener('abort', () => {
            clearTimeout(timer);
            resolve();
          });
        });
        await Promise.race([exited, waited]);
        grace.abort();
        await endSession(mark);
      })();
      return stopping;
    },
  };
}
