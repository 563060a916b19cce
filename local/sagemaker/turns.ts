/**
 * Jobs of every kind take turns on this machine: as many instances at once as it may run, in the order in which they
 * were asked for. A job that runs is a {@link Run}: how it is brought to its end, by whom, and why.
 */
import type { Container } from './container.ts';
import type { JobRecord } from './records.ts';

/** Why a job is being brought to its end. */
export type Ending =
  | { by: 'stop' }
  | { by: 'maxRuntime' }
  | { by: 'failure'; reason: string; exitMessage?: string | undefined }
  | { by: 'close' };

/** A job within this engine, from its turn to its end. */
export class Run {
  readonly abort = new AbortController();
  readonly containers: Container[] = [];
  readonly #graceMs: number;
  ending: Ending | undefined;
  #stopped: Promise<unknown> = Promise.resolve();

  constructor(graceMs: number) {
    this.#graceMs = graceMs;
  }

  /** Ends the job. Who comes first says why; only closing, which must not wait, comes over another. */
  end(ending: Ending): Promise<unknown> {
    if (this.ending === undefined || ending.by === 'close') {
      this.ending = ending;
      this.abort.abort();
      const graceMs = ending.by === 'close' ? 0 : this.#graceMs;
      this.#stopped = Promise.all(this.containers.map((container) => container.stop(graceMs)));
    }
    return this.#stopped;
  }

  /** SIGTERM to one container, whose work is done, and SIGKILL after the grace. */
  dismiss(container: Container): Promise<void> {
    return container.stop(this.#graceMs);
  }
}

interface Turn {
  job: JobRecord;
  /** Takes the job to its end; what it throws is its own fault. */
  start(run: Run): Promise<void>;
}

export class Turns {
  readonly #room: number;
  readonly #graceMs: number;
  readonly #queue: Turn[] = [];
  readonly #runs = new Map<JobRecord, { run: Run; done: Promise<void> }>();
  #closed = false;

  /** `room`: instances at once; a job of more runs alone. */
  constructor(room: number, graceMs: number) {
    this.#room = room;
    this.#graceMs = graceMs;
  }

  add(turn: Turn): void {
    this.#queue.push(turn);
    this.next();
  }

  /** Starts the jobs at the head of the queue, as far as there is room. */
  next(): void {
    for (let turn = this.#queue[0]; turn && !this.#closed; turn = this.#queue[0]) {
      const busy = [...this.#runs.keys()].reduce((sum, running) => sum + running.instances.length, 0);
      if (busy > 0 && busy + turn.job.instances.length > this.#room) return;
      this.#queue.shift();
      this.#start(turn);
    }
  }

  #start({ job, start }: Turn): void {
    const run = new Run(this.#graceMs);
    const done = start(run).finally(() => {
      this.#runs.delete(job);
      this.next();
    });
    this.#runs.set(job, { run, done });
  }

  /** The run of a job whose turn it is; one that still waits loses its place. */
  stop(job: JobRecord): Run | undefined {
    const running = this.#runs.get(job);
    if (running) return running.run;
    const place = this.#queue.findIndex((turn) => turn.job === job);
    if (place >= 0) this.#queue.splice(place, 1);
    return undefined;
  }

  /** Ends what runs, at once, and starts nothing more. */
  async close(): Promise<void> {
    this.#closed = true;
    const runs = [...this.#runs.values()];
    await Promise.all(runs.map(({ run }) => run.end({ by: 'close' })));
    await Promise.all(runs.map(({ done }) => done));
  }
}
