/**
 * Step Functions on one machine: state machines are compiled, executions run, and both what they did and what
 * they answer is on disk, so that an execution goes on where it was after a SIGKILL.
 *
 *   <folder>/definitions/<hash>.json            definitions that executions were started with
 *   <folder>/<state machine>/<execution>/       execution.json, journal.jsonl, history.jsonl, maps/<uuid>/
 */
import { randomUUID } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { type Caller, type JsonOperation, type JsonService, ServiceError } from '../types.ts';
import { compile, type Program } from './definition.ts';
import { asFailure, Interrupted, PAYLOAD_LIMIT, StateError } from './errors.ts';
import { History, historyPage } from './history.ts';
import { delay, type Services } from './integrations.ts';
import { fingerprint, noTally, openJournal, type Tally, writeDocument } from './journal.ts';
import { type Frame, linkedController, Walk } from './walk.ts';

export interface StepFunctionsOptions extends Omit<Services, 'timeScale'> {
  folder: string;
  /** Waits and retry intervals × this; default 1. */
  timeScale?: number;
}

type Status = 'RUNNING' | 'SUCCEEDED' | 'FAILED' | 'TIMED_OUT' | 'ABORTED';

interface Machine {
  name: string;
  arn: string;
  roleArn: string;
  definitionHash: string;
  program: Program;
}

/** execution.json; times in epoch milliseconds, input and output as JSON text. */
interface ExecutionRecord {
  arn: string;
  name: string;
  stateMachineArn: string;
  stateMachineName: string;
  roleArn: string;
  definitionHash: string;
  input: string;
  status: Status;
  startDate: number;
  stopDate?: number;
  output?: string;
  error?: string;
  cause?: string;
  tally?: Tally;
}

interface Running {
  controller: AbortController;
  tally: Tally;
  done: Promise<void>;
}

interface Page {
  maxResults?: number;
  nextToken?: string;
}
interface StartInput {
  stateMachineArn: string;
  name?: string;
  input?: string;
}
interface StopInput {
  executionArn: string;
  error?: string;
  cause?: string;
}

export class StepFunctions implements JsonService {
  readonly #folder: string;
  readonly #services: Services;
  readonly #machines = new Map<string, Machine>();
  readonly #records = new Map<string, ExecutionRecord>();
  readonly #running = new Map<string, Running>();
  /** Distributed Maps of this process, by ARN: fresher than what is on disk. */
  readonly #mapRuns = new Map<string, { executionArn: string; describe(): Record<string, unknown> }>();
  #closed = false;

  constructor({ folder, ...services }: StepFunctionsOptions) {
    this.#folder = folder;
    this.#services = { timeScale: 1, ...services };
    mkdirSync(join(folder, 'definitions'), { recursive: true });
    for (const path of executionFolders(folder)) {
      const file = join(path, 'execution.json');
      // Without its record it was never answered for.
      if (!existsSync(file)) continue;
      const record = JSON.parse(readFileSync(file, 'utf8')) as ExecutionRecord;
      this.#records.set(record.arn, record);
    }
  }

  /** Creates or replaces a state machine. Throws `UnsupportedLocally` or `InvalidDefinition`. */
  createStateMachine(options: { name: string; arn: string; roleArn: string; definition: unknown }): void {
    const { name, arn, roleArn, definition } = options;
    const program = compile(definition, `state machine '${name}'`);
    const definitionHash = fingerprint(definition);
    writeDocument(join(this.#folder, 'definitions', `${definitionHash}.json`), definition);
    this.#machines.set(arn, { name, arn, roleArn, definitionHash, program });
  }

  /** State transitions so far, children included. Throws `ExecutionDoesNotExist`. */
  transitions(executionArn: string): { standard: number; express: number } {
    const { standard, express } = this.#tally(executionArn);
    return { standard, express };
  }

  /** Bytes of the largest input or output of any state, children included. Throws `ExecutionDoesNotExist`. */
  largestPayload(executionArn: string): number {
    return this.#tally(executionArn).largest;
  }

  /** Resolves when the execution has ended, or the service is closed. */
  async ended(executionArn: string): Promise<void> {
    await this.#running.get(executionArn)?.done;
  }

  /**
   * Goes on with executions that were running when the process ended, by the definition they began with. Throws
   * `UnsupportedLocally` when that was written by a version that knew more.
   */
  async recover(): Promise<void> {
    for (const record of this.#records.values()) {
      if (record.status !== 'RUNNING' || this.#running.has(record.arn)) continue;
      const path = join(this.#folder, 'definitions', `${record.definitionHash}.json`);
      const definition: unknown = JSON.parse(readFileSync(path, 'utf8'));
      this.#run(record, compile(definition, `state machine '${record.stateMachineName}'`));
    }
  }

  /** Stops where it is; executions stay RUNNING for the next `recover()`. */
  async close(): Promise<void> {
    this.#closed = true;
    const running = [...this.#running.values()];
    for (const { controller } of running) controller.abort(new Interrupted('closed'));
    await Promise.all(running.map(({ done }) => done));
  }

  readonly operations: Record<string, JsonOperation> = {
    StartExecution: (input: StartInput, caller: Caller) => this.#start(input, caller),
    StopExecution: (input: StopInput, caller: Caller) => this.#stop(input, caller),
    DescribeExecution: async ({ executionArn }: { executionArn: string }, caller: Caller) => {
      caller.authorize('states:DescribeExecution', executionArn);
      return describe(this.#record(executionArn));
    },
    ListExecutions: async (
      input: Page & { stateMachineArn: string; statusFilter?: Status },
      caller: Caller,
    ) => {
      caller.authorize('states:ListExecutions', input.stateMachineArn);
      this.#machine(input.stateMachineArn);
      const records = [...this.#records.values()]
        .filter((record) => record.stateMachineArn === input.stateMachineArn)
        .filter((record) => input.statusFilter === undefined || record.status === input.statusFilter)
        .sort((a, b) => b.startDate - a.startDate);
      const { items, ...more } = pageOf(records, input);
      return { executions: items.map(summary), ...more };
    },
    GetExecutionHistory: async (
      input: Page & { executionArn: string; reverseOrder?: boolean },
      caller: Caller,
    ) => {
      caller.authorize('states:GetExecutionHistory', input.executionArn);
      const path = join(this.#executionFolder(this.#record(input.executionArn)), 'history.jsonl');
      return historyPage(path, {
        reverse: input.reverseOrder ?? false,
        limit: input.maxResults || 100,
        token: input.nextToken,
      });
    },
    ListMapRuns: async (input: Page & { executionArn: string }, caller: Caller) => {
      caller.authorize('states:ListMapRuns', input.executionArn);
      const { items, ...more } = pageOf(this.#mapRunsOf(this.#record(input.executionArn)), input);
      const mapRuns = items.map(({ mapRunArn, executionArn, stateMachineArn, startDate, stopDate }) => ({
        ...{ mapRunArn, executionArn, stateMachineArn, startDate, stopDate },
      }));
      return { mapRuns, ...more };
    },
    DescribeMapRun: async ({ mapRunArn }: { mapRunArn: string }, caller: Caller) => {
      caller.authorize('states:DescribeMapRun', mapRunArn);
      const live = this.#mapRuns.get(mapRunArn)?.describe();
      if (live) return live;
      for (const record of this.#records.values()) {
        const found = this.#mapRunsOf(record).find((run) => run.mapRunArn === mapRunArn);
        if (found) return found;
      }
      throw new ServiceError('ResourceNotFound', `Map Run Does Not Exist: '${mapRunArn}'`);
    },
  };

  async #start({ stateMachineArn, name = randomUUID(), input = '{}' }: StartInput, caller: Caller) {
    caller.authorize('states:StartExecution', stateMachineArn);
    const machine = this.#machine(stateMachineArn);
    if (this.#closed) throw new ServiceError('ServiceUnavailable', 'The local AWS is closing.', 503);
    checkName(name);
    checkInput(input);
    const arn = `${stateMachineArn.replace(':stateMachine:', ':execution:')}:${name}`;
    const before = this.#records.get(arn);
    if (before) {
      if (before.status === 'RUNNING' && before.input === input)
        return { executionArn: arn, startDate: before.startDate / 1000 };
      throw new ServiceError('ExecutionAlreadyExists', `Execution Already Exists: '${arn}'`);
    }
    const record: ExecutionRecord = {
      arn,
      name,
      stateMachineArn,
      stateMachineName: machine.name,
      roleArn: machine.roleArn,
      definitionHash: machine.definitionHash,
      input,
      status: 'RUNNING',
      startDate: Date.now(),
    };
    mkdirSync(this.#executionFolder(record), { recursive: true });
    this.#save(record);
    this.#run(record, machine.program);
    return { executionArn: arn, startDate: record.startDate / 1000 };
  }

  async #stop({ executionArn, error, cause }: StopInput, caller: Caller) {
    caller.authorize('states:StopExecution', executionArn);
    const record = this.#record(executionArn);
    const running = this.#running.get(executionArn);
    if (running) {
      Object.assign(record, {
        ...(error === undefined ? {} : { error }),
        ...(cause === undefined ? {} : { cause }),
      });
      running.controller.abort(new Interrupted('stopped'));
      await running.done;
    }
    return { stopDate: (record.stopDate ?? Date.now()) / 1000 };
  }

  #run(record: ExecutionRecord, program: Program): void {
    const controller = new AbortController();
    const tally = noTally();
    const done = this.#execute(record, program, controller, tally).finally(() =>
      this.#running.delete(record.arn),
    );
    this.#running.set(record.arn, { controller, tally, done });
  }

  async #execute(
    record: ExecutionRecord,
    program: Program,
    controller: AbortController,
    tally: Tally,
  ): Promise<void> {
    const folder = this.#executionFolder(record);
    const { log, journal } = openJournal(join(folder, 'journal.jsonl'));
    const history = new History(join(folder, 'history.jsonl'));
    const input: unknown = JSON.parse(record.input);
    const frame: Frame = {
      arn: record.arn,
      name: record.name,
      startTime: new Date(record.startDate).toISOString(),
      input,
      roleArn: record.roleArn,
      stateMachine: { Id: record.stateMachineArn, Name: record.stateMachineName },
      express: false,
      folder,
      journal,
      history,
      events: { count: 0 },
      tally,
      services: this.#services,
      onMapRun: ({ mapRunArn, describe: current }) =>
        this.#mapRuns.set(mapRunArn, { executionArn: record.arn, describe: current }),
    };
    // The execution's own time limit counts from its first start.
    const { controller: limited, release } = linkedController(controller.signal);
    if (program.timeoutSeconds !== undefined) {
      delay(record.startDate + program.timeoutSeconds * 1000 - Date.now(), limited.signal).then(
        () => limited.abort(new Interrupted('timeout')),
        () => undefined,
      );
    }
    try {
      history.record('', 'ExecutionStarted', {
        executionStartedEventDetails: {
          input: record.input,
          inputDetails: { truncated: false },
          roleArn: record.roleArn,
        },
      });
      const output = JSON.stringify(await new Walk(frame, program, '', limited.signal).run(input));
      this.#end(record, tally, { status: 'SUCCEEDED', output }, history);
    } catch (error) {
      const failure = asFailure(error);
      if (failure instanceof StateError) {
        this.#end(record, tally, { status: 'FAILED', error: failure.name, cause: failure.message }, history);
      } else if (failure.why === 'timeout') {
        this.#end(record, tally, { status: 'TIMED_OUT' }, history);
      } else if (failure.why === 'stopped') {
        this.#end(record, tally, { status: 'ABORTED' }, history);
      }
    } finally {
      release();
      limited.abort(new Interrupted('superseded'));
      log.close();
      history.close();
    }
    if (record.status !== 'RUNNING') this.#forget(record);
  }

  /** Puts the end on record; the event first, so that a crash between the two adds none twice. */
  #end(
    record: ExecutionRecord,
    tally: Tally,
    end: Pick<ExecutionRecord, 'status' | 'output' | 'error' | 'cause'>,
    history: History,
  ): void {
    Object.assign(record, { ...end, tally, stopDate: Date.now() });
    const { error, cause, output } = record;
    const events: Record<string, [string, object]> = {
      SUCCEEDED: ['ExecutionSucceeded', { output, outputDetails: { truncated: false } }],
      FAILED: ['ExecutionFailed', { error, cause }],
      TIMED_OUT: ['ExecutionTimedOut', { error, cause }],
      ABORTED: ['ExecutionAborted', { error, cause }],
    };
    const [type, details] = events[end.status] as [string, object];
    history.record('', type, { [`e${type.slice(1)}EventDetails`]: details });
    this.#save(record);
  }

  /** What only a continued execution would need. */
  #forget(record: ExecutionRecord): void {
    for (const [arn, run] of this.#mapRuns) if (run.executionArn === record.arn) this.#mapRuns.delete(arn);
    const folder = this.#executionFolder(record);
    rmSync(join(folder, 'journal.jsonl'), { force: true });
    for (const map of mapFolders(folder)) {
      for (const file of readdirSync(map)) if (file !== 'run.json') rmSync(join(map, file), { force: true });
    }
  }

  #mapRunsOf(record: ExecutionRecord): Record<string, unknown>[] {
    return mapFolders(this.#executionFolder(record))
      .filter((folder) => existsSync(join(folder, 'run.json')))
      .map((folder) => JSON.parse(readFileSync(join(folder, 'run.json'), 'utf8')) as Record<string, unknown>)
      .map((run) => this.#mapRuns.get(String(run.mapRunArn))?.describe() ?? run);
  }

  #save(record: ExecutionRecord): void {
    writeDocument(join(this.#executionFolder(record), 'execution.json'), record);
    this.#records.set(record.arn, record);
  }

  #executionFolder({ stateMachineName, name }: ExecutionRecord): string {
    return join(this.#folder, encodeURIComponent(stateMachineName), `${encodeURIComponent(name)}.run`);
  }

  #machine(arn: string): Machine {
    const machine = this.#machines.get(arn);
    if (machine) return machine;
    throw new ServiceError('StateMachineDoesNotExist', `State Machine Does Not Exist: '${arn}'`);
  }

  #record(arn: string): ExecutionRecord {
    const record = this.#records.get(arn);
    if (record) return record;
    throw new ServiceError('ExecutionDoesNotExist', `Execution Does Not Exist: '${arn}'`);
  }

  #tally(executionArn: string): Tally {
    const record = this.#record(executionArn);
    return record.tally ?? this.#running.get(executionArn)?.tally ?? noTally();
  }
}

function executionFolders(folder: string): string[] {
  return readdirSync(folder, { withFileTypes: true })
    .filter((entry) => entry.isDirectory() && entry.name !== 'definitions')
    .flatMap((machine) =>
      readdirSync(join(folder, machine.name)).map((name) => join(folder, machine.name, name)),
    );
}

function mapFolders(executionFolder: string): string[] {
  const maps = join(executionFolder, 'maps');
  return existsSync(maps) ? readdirSync(maps).map((uuid) => join(maps, uuid)) : [];
}

function checkName(name: string): void {
  if (name.length === 0 || name.length > 80 || /[\s<>{}[\]?*"#%\\^|~`$&,;:/\p{Cc}]/u.test(name)) {
    throw new ServiceError(
      'InvalidName',
      `Invalid Name: '${name}' (1 to 80 characters, no spaces or special signs)`,
    );
  }
}

function checkInput(input: string): void {
  if (Buffer.byteLength(input) > PAYLOAD_LIMIT) {
    throw new ServiceError('ValidationException', `The input is above the limit of ${PAYLOAD_LIMIT} bytes.`);
  }
  try {
    JSON.parse(input);
  } catch (error) {
    throw new ServiceError(
      'InvalidExecutionInput',
      `Invalid State Machine Execution Input: ${(error as Error).message}`,
    );
  }
}

/** A page of a list; the token is where the page before ended. */
function pageOf<Item>(all: Item[], { maxResults, nextToken }: Page): { items: Item[]; nextToken?: string } {
  const start = Number(nextToken ?? 0);
  const end = start + (maxResults || 100);
  return { items: all.slice(start, end), ...(end < all.length ? { nextToken: String(end) } : {}) };
}

function summary(record: ExecutionRecord): Record<string, unknown> {
  const { arn, name, stateMachineArn, status, startDate, stopDate } = record;
  return {
    ...{ executionArn: arn, stateMachineArn, name, status, startDate: startDate / 1000 },
    ...(stopDate === undefined ? {} : { stopDate: stopDate / 1000 }),
  };
}

function describe(record: ExecutionRecord): Record<string, unknown> {
  const { input, output, error, cause } = record;
  return {
    ...summary(record),
    ...{ input, inputDetails: { included: true }, output, error, cause, redriveCount: 0 },
    ...(output === undefined ? {} : { outputDetails: { included: true } }),
  };
}
