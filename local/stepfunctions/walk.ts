/**
 * One walk through a program, from its start to its end: an execution, a child of a Distributed Map, an iteration
 * of a Map or a branch of a Parallel. The library leads the way; what waits, calls or iterates is done here, with
 * retries, and put on record so that a walk that was cut off can be taken again.
 */
import { setImmediate as nextTurn } from 'node:timers/promises';
import { LOCAL_REGION } from '../types.ts';
import {
  type DistributedMapStep,
  type LibraryValue,
  libraryFailure,
  type MapStep,
  type ParallelStep,
  type Program,
  type Retrier,
  type Step,
  type TaskStep,
  type WaitStep,
} from './definition.ts';
import { mapRun, runDistributedMap } from './distributed-map.ts';
import { asFailure, Interrupted, matches, payloadSize, StateError } from './errors.ts';
import type { Recorder } from './history.ts';
import { delay, integrationOf, type Services } from './integrations.ts';
import { addTally, type Entry, fingerprint, type Journal, noTally, type Tally } from './journal.ts';

/** AWS ends an execution at this many events. */
const EVENT_LIMIT = 25_000;
/** AWS: iterations of an inline Map at once. */
const INLINE_CONCURRENCY = 40;
const MAX_INTERVAL_SECONDS = 31_622_400;

/** The execution that walks belong to: the root, or a child of a Distributed Map. */
export interface Frame {
  arn: string;
  name: string;
  /** ISO 8601; the first start, also after a restart. */
  startTime: string;
  input: unknown;
  roleArn: string;
  stateMachine: { Id: string; Name: string };
  express: boolean;
  /** Folder of the execution on disk; maps have their own folders below. */
  folder: string;
  journal: Journal;
  history: Recorder;
  /** Events so far, kept or not. */
  events: { count: number };
  tally: Tally;
  services: Services;
  /** Told of each Distributed Map that runs. */
  onMapRun(run: { mapRunArn: string; describe(): Record<string, unknown> }): void;
}

/** Aborts with its parent, or alone. */
export function linkedController(parent: AbortSignal): { controller: AbortController; release(): void } {
  const controller = new AbortController();
  const abort = () => controller.abort(parent.reason);
  if (parent.aborted) abort();
  parent.addEventListener('abort', abort, { once: true });
  return { controller, release: () => parent.removeEventListener('abort', abort) };
}

export class Walk {
  readonly #frame: Frame;
  readonly #program: Program;
  /** Says where in the execution this walk is; empty for the execution itself. */
  readonly #path: string;
  readonly #signal: AbortSignal;
  readonly #context: Record<string, unknown>;
  readonly #visits = new Map<string, number>();
  #current: Promise<unknown> | undefined;
  #violation: StateError | undefined;

  constructor(
    frame: Frame,
    program: Program,
    path: string,
    signal: AbortSignal,
    mapItem?: { Index: number; Value: unknown },
  ) {
    this.#frame = frame;
    this.#program = program;
    this.#path = path;
    this.#signal = signal;
    this.#context = {
      TrueExecution: {
        Id: frame.arn,
        Name: frame.name,
        Input: frame.input,
        RoleArn: frame.roleArn,
        StartTime: frame.startTime,
        RedriveCount: 0,
      },
      StateMachine: frame.stateMachine,
      ...(mapItem ? { Map: { Item: mapItem } } : {}),
    };
  }

  /** The walk's output; rejects with {@link StateError} or {@link Interrupted}. */
  async run(input: unknown): Promise<unknown> {
    this.#measure(input, 'The input');
    const handlers = this.#program.steps.map((step) => [
      step.name,
      (effective: unknown) => {
        this.#current = this.#perform(step, effective);
        return this.#current;
      },
    ]);
    const run = this.#program.machine.run(input as LibraryValue, {
      context: this.#context,
      overrides: { taskResourceLocalHandlers: Object.fromEntries(handlers) },
    });
    const watching = this.#watch(run.eventLogs, run.abort);
    try {
      const output = await run.result;
      await watching;
      if (this.#violation) throw this.#violation;
      return output;
    } catch (error) {
      // A walk that is over leaves nothing running.
      await Promise.allSettled([watching, this.#current]);
      throw this.#violation ?? libraryFailure(error);
    }
  }

  /** Follows the library's events: the history, the counts and the sizes come from them. */
  async #watch(events: ReturnType<Program['machine']['run']>['eventLogs'], abort: () => void): Promise<void> {
    for await (const event of events) {
      if (event.type !== 'StateEntered' && event.type !== 'StateExited') continue;
      const { name, input, output } = event.state;
      const type = this.#program.types.get(name);
      try {
        if (event.type === 'StateEntered') {
          this.#transition();
          this.#record(`${type}StateEntered`, {
            stateEnteredEventDetails: { name, input: JSON.stringify(input), inputDetails: WHOLE },
          });
        } else {
          this.#measure(output, `The output of state '${name}'`);
          this.#record(`${type}StateExited`, {
            stateExitedEventDetails: { name, output: JSON.stringify(output), outputDetails: WHOLE },
          });
        }
      } catch (error) {
        this.#violation ??= asFailure(error) as StateError;
        abort();
      }
    }
  }

  #record(type: string, details: Record<string, unknown>, scope = this.#path): void {
    const { events, history } = this.#frame;
    events.count += 1;
    if (events.count > EVENT_LIMIT) {
      throw new StateError(
        'States.Runtime',
        `The execution reached the maximum number of history events (${EVENT_LIMIT}).`,
      );
    }
    history.record(scope, type, details);
  }

  #transition(): void {
    this.#frame.tally[this.#frame.express ? 'express' : 'standard'] += 1;
  }

  #measure(payload: unknown, of: string): void {
    const { tally } = this.#frame;
    tally.largest = Math.max(tally.largest, payloadSize(payload, of));
  }

  /** Does a state of ours, with its retries. */
  async #perform(step: Step, input: unknown): Promise<unknown> {
    // The library's event of entering this state comes first.
    await nextTurn();
    const visit = (this.#visits.get(step.name) ?? 0) + 1;
    this.#visits.set(step.name, visit);
    const retried = step.retry.map(() => 0);
    for (let attempt = 1; ; attempt++) {
      const key = `${this.#path}${step.name}#${visit}.${attempt}`;
      try {
        this.#signal.throwIfAborted();
        if (this.#violation) throw this.#violation;
        this.#measure(input, `The input of state '${step.name}'`);
        const output = await this.#attempt(step, key, input);
        this.#measure(output, `The result of state '${step.name}'`);
        return output;
      } catch (error) {
        const failure = asFailure(error);
        if (failure instanceof Interrupted) throw failure;
        const index = step.retry.findIndex((retrier) => matches(retrier.ErrorEquals, failure.name));
        const retrier = step.retry[index];
        const before = retried[index] ?? 0;
        if (retrier === undefined || before >= (retrier.MaxAttempts ?? 3)) {
          failure.isCatchable = step.catch.some((catcher) => matches(catcher.ErrorEquals, failure.name));
          throw failure;
        }
        retried[index] = before + 1;
        await this.#pause(
          `${key}:retry`,
          Date.now() + intervalMs(retrier, before) * this.#frame.services.timeScale,
        );
        this.#transition();
      }
    }
  }

  #attempt(step: Step, key: string, input: unknown): Promise<unknown> {
    switch (step.kind) {
      case 'task':
        return this.#task(step, key, input);
      case 'wait':
        return this.#wait(step, key, input);
      case 'map':
        return this.#map(step, key, input);
      case 'parallel':
        return this.#parallel(step, key, input);
      case 'distributed':
        return this.#distributedMap(step, key, input);
    }
  }

  /** Takes the outcome from the journal, or does the work and puts its outcome there before anything goes on. */
  async #journaled(
    key: string,
    input: unknown,
    work: (begunAt: number | undefined, begin: () => void) => Promise<unknown>,
    tally?: Tally,
  ): Promise<unknown> {
    const { journal } = this.#frame;
    const print = fingerprint(input);
    const entry = journal.take(key);
    const known = entry?.input === print ? entry : undefined;
    if (known?.tally) addTally(this.#frame.tally, known.tally);
    if (known?.failure) throw new StateError(known.failure.error, known.failure.cause);
    if (known && 'output' in known) return known.output;
    const put = (entry: Entry) => journal.put(key, { input: print, ...entry, ...(tally ? { tally } : {}) });
    try {
      const output = (await work(known?.begun, () => put({ begun: Date.now() }))) ?? null;
      put({ output });
      return output;
    } catch (error) {
      const failure = asFailure(error);
      if (failure instanceof StateError) put({ failure: { error: failure.name, cause: failure.message } });
      throw failure;
    }
  }

  async #task(step: TaskStep, key: string, input: unknown): Promise<unknown> {
    const integration = integrationOf(step.resource);
    if (integration === undefined)
      throw new StateError('States.Runtime', `No integration '${step.resource}'.`);
    // A plain function ARN has events of its own kind.
    const plain = integration.action === 'function';
    const [events, details] = plain ? ['LambdaFunction', 'lambdaFunction'] : ['Task', 'task'];
    const about = plain ? {} : { resourceType: integration.type, resource: integration.action };
    const note = (what: string, more: Record<string, unknown>) =>
      this.#record(`${events}${what}`, { [`${details}${what}EventDetails`]: { ...about, ...more } });
    note(
      'Scheduled',
      plain ? { resource: step.resource } : { region: LOCAL_REGION, parameters: JSON.stringify(input) },
    );

    const frame = this.#frame;
    const { controller, release } = linkedController(this.#signal);
    const limit = (begunAt: number) => {
      if (step.timeoutSeconds === undefined) return;
      const end = begunAt + step.timeoutSeconds * 1000;
      delay(end - Date.now(), controller.signal).then(
        () =>
          controller.abort(
            new StateError('States.Timeout', `The task ran longer than ${step.timeoutSeconds} s.`),
          ),
        () => undefined,
      );
    };
    try {
      const output = await this.#journaled(key, input, async (begunAt, begin) => {
        limit(begunAt ?? Date.now());
        return integration.call(
          {
            input,
            resource: step.resource,
            roleArn: frame.roleArn,
            signal: controller.signal,
            begunBefore: begunAt !== undefined,
            begin,
          },
          frame.services,
        );
      });
      note('Succeeded', { output: JSON.stringify(output), outputDetails: WHOLE });
      return output;
    } catch (error) {
      const failure = asFailure(error);
      if (failure instanceof StateError) {
        const what = failure.name === 'States.Timeout' ? 'TimedOut' : 'Failed';
        note(what, { error: failure.name, cause: failure.message });
      }
      throw failure;
    } finally {
      release();
      controller.abort(new Interrupted('superseded'));
    }
  }

  async #wait(step: WaitStep, key: string, input: unknown): Promise<unknown> {
    const until = await step.until(input, this.#context);
    const end =
      typeof until === 'number'
        ? Date.now() + until * 1000 * this.#frame.services.timeScale
        : Date.parse(String(until));
    if (Number.isNaN(end))
      throw new StateError('States.Runtime', `'${String(until)}' is no time to wait for.`);
    await this.#pause(key, end);
    return input;
  }

  /** Waits until `end`; after a restart until the end that was set first. */
  async #pause(key: string, end: number): Promise<void> {
    let until = this.#frame.journal.take(key)?.until;
    if (until === undefined) {
      until = end;
      this.#frame.journal.put(key, { until });
    }
    await delay(until - Date.now(), this.#signal);
  }

  async #map(step: MapStep, key: string, input: unknown): Promise<unknown> {
    const items = step.items ? await step.items(input, this.#context) : input;
    if (!Array.isArray(items))
      throw new StateError('States.Runtime', `The items of state '${step.name}' are no array.`);
    const concurrency = Number(await step.maxConcurrency(input, this.#context)) || INLINE_CONCURRENCY;
    this.#record('MapStateStarted', { mapStateStartedEventDetails: { length: items.length } });
    const output = await this.#together(items.length, concurrency, async (index, signal) => {
      const item = { Index: index, Value: items[index] };
      const path = `${key}/${index}/`;
      const selected = step.selector
        ? await step.selector(input, { ...this.#context, Map: { Item: item } })
        : item.Value;
      const note = (what: string) => {
        const details = { [`mapIteration${what}EventDetails`]: { name: step.name, index } };
        this.#record(`MapIteration${what}`, details, path);
      };
      note('Started');
      try {
        const result = await new Walk(this.#frame, step.processor, path, signal, item).run(selected);
        note('Succeeded');
        return result;
      } catch (error) {
        if (error instanceof StateError) note('Failed');
        throw error;
      }
    });
    this.#record('MapStateSucceeded', {});
    return output;
  }

  async #parallel(step: ParallelStep, key: string, input: unknown): Promise<unknown> {
    this.#record('ParallelStateStarted', {});
    const output = await this.#together(step.branches.length, INLINE_CONCURRENCY, (index, signal) =>
      new Walk(this.#frame, step.branches[index] as Program, `${key}/${index}/`, signal).run(input),
    );
    this.#record('ParallelStateSucceeded', {});
    return output;
  }

  async #distributedMap(step: DistributedMapStep, key: string, input: unknown): Promise<unknown> {
    const tally = noTally();
    const call = {
      step,
      key,
      input,
      context: this.#context,
      frame: this.#frame,
      signal: this.#signal,
      tally,
    };
    this.#record('MapRunStarted', { mapRunStartedEventDetails: { mapRunArn: mapRun(call).arn } });
    try {
      const output = await this.#journaled(key, input, () => runDistributedMap(call), tally);
      this.#record('MapRunSucceeded', {});
      return output;
    } catch (error) {
      const failure = asFailure(error);
      if (failure instanceof StateError) {
        this.#record('MapRunFailed', {
          mapRunFailedEventDetails: { error: failure.name, cause: failure.message },
        });
      }
      throw failure;
    }
  }

  /** Runs walks side by side; the first that fails ends the others, and none is begun after it. */
  async #together(
    count: number,
    concurrency: number,
    work: (index: number, signal: AbortSignal) => Promise<unknown>,
  ): Promise<unknown[]> {
    const { controller, release } = linkedController(this.#signal);
    const results = new Array<unknown>(count);
    let next = 0;
    let failure: unknown;
    const worker = async () => {
      while (next < count && !controller.signal.aborted) {
        const index = next++;
        try {
          results[index] = await work(index, controller.signal);
        } catch (error) {
          failure ??= error;
          controller.abort(new Interrupted('superseded'));
        }
      }
    };
    await Promise.all(Array.from({ length: Math.min(count, concurrency) }, worker));
    release();
    this.#signal.throwIfAborted();
    if (failure) throw failure;
    return results;
  }
}

const WHOLE = { truncated: false };

/** Milliseconds before the next retry, `before` being those already made. */
function intervalMs(retrier: Retrier, before: number): number {
  const grown = (retrier.IntervalSeconds ?? 1) * (retrier.BackoffRate ?? 2) ** before;
  const seconds = Math.min(grown, retrier.MaxDelaySeconds ?? MAX_INTERVAL_SECONDS);
  return (retrier.JitterStrategy === 'FULL' ? Math.random() : 1) * seconds * 1000;
}
