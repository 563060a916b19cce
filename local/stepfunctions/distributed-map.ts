/**
 * A Distributed Map: its items are read from S3 (or the state's input), each runs as a child execution, and the
 * results are written to S3. Neither items nor children are ever all in memory. All that is needed to go on after
 * a crash is in the run's folder:
 *
 *   run.json        what DescribeMapRun tells
 *   items.jsonl     one item a line, read once
 *   children.jsonl  journal of the children's tasks, and a line with the outcome of each child that ended
 */
import {
  createReadStream,
  createWriteStream,
  existsSync,
  mkdirSync,
  readFileSync,
  renameSync,
  statSync,
} from 'node:fs';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { GetObjectCommand, paginateListObjectsV2, S3Client } from '@aws-sdk/client-s3';
import { Upload } from '@aws-sdk/lib-storage';
import { parse } from 'csv-parse';
import { LOCAL_REGION } from '../types.ts';
import type { DistributedMapStep, ItemReader, ResultWriter } from './definition.ts';
import { asFailure, Interrupted, payloadSize, StateError } from './errors.ts';
import { NO_HISTORY } from './history.ts';
import {
  addTally,
  type Entry,
  Journal,
  LineLog,
  learn,
  noTally,
  readLines,
  stableUuid,
  type Tally,
  writeDocument,
} from './journal.ts';
import { type Frame, linkedController, Walk } from './walk.ts';

type Fields = Record<string, unknown>;

/** AWS runs up to 10,000 at once; one machine gains nothing from that. */
const CHILDREN_AT_ONCE = 100;
const EXPRESS_LIMIT_MS = 5 * 60 * 1000;

export interface MapCall {
  step: DistributedMapStep;
  /** The attempt of the Map state within the execution. */
  key: string;
  input: unknown;
  context: Fields;
  frame: Frame;
  signal: AbortSignal;
  /** Counts what the children count, as the frame's does with all else. */
  tally: Tally;
}

type ChildStatus = 'SUCCEEDED' | 'FAILED' | 'TIMED_OUT' | 'ABORTED';

/** How a child ended; input and output as JSON text. */
interface Ended {
  status: ChildStatus;
  input: string;
  output?: string;
  error?: string;
  cause?: string;
  /** Epoch milliseconds. */
  start: number;
  stop: number;
  tally: Tally;
}

type ChildLine = { child: number } & ({ ended: Ended } | (Entry & { key: string }));

/** The run's identity, the same after a restart. */
export function mapRun({ step, key, frame }: MapCall): { arn: string; uuid: string } {
  const uuid = stableUuid(`${frame.arn} ${key}`);
  return {
    arn: `${frame.stateMachine.Id.replace(':stateMachine:', ':mapRun:')}/${step.label}:${uuid}`,
    uuid,
  };
}

/** Runs the map to its end. Resolves with the state's result. */
export function runDistributedMap(call: MapCall): Promise<unknown> {
  const run = new MapRun(call);
  call.frame.onMapRun({ mapRunArn: mapRun(call).arn, describe: () => run.describe() });
  return run.toEnd();
}

/** What is written to run.json; times in epoch seconds, as on the wire. */
interface RunDocument {
  mapRunArn: string;
  executionArn: string;
  stateMachineArn: string;
  status: 'RUNNING' | 'SUCCEEDED' | 'FAILED' | 'ABORTED';
  startDate: number;
  stopDate?: number;
  maxConcurrency: number;
  toleratedFailurePercentage: number;
  toleratedFailureCount: number;
  itemCounts: Record<
    'pending' | 'running' | 'succeeded' | 'failed' | 'timedOut' | 'aborted' | 'total' | 'resultsWritten',
    number
  >;
}

const NO_ITEMS: RunDocument['itemCounts'] = {
  ...{ pending: 0, running: 0, succeeded: 0, failed: 0, timedOut: 0, aborted: 0 },
  ...{ total: 0, resultsWritten: 0 },
};

const COUNT_OF: Record<ChildStatus, 'succeeded' | 'failed' | 'timedOut' | 'aborted'> = {
  SUCCEEDED: 'succeeded',
  FAILED: 'failed',
  TIMED_OUT: 'timedOut',
  ABORTED: 'aborted',
};

class MapRun {
  readonly #arn: string;
  readonly #call: MapCall;
  readonly #uuid: string;
  readonly #folder: string;
  #document: RunDocument;
  #children: Children | undefined;
  #tolerated: { count: number | undefined; percentage: number | undefined } = {
    count: 0,
    percentage: undefined,
  };

  constructor(call: MapCall) {
    const { frame, step } = call;
    this.#call = call;
    ({ arn: this.#arn, uuid: this.#uuid } = mapRun(call));
    this.#folder = join(frame.folder, 'maps', this.#uuid);
    const path = join(this.#folder, 'run.json');
    const before = existsSync(path) ? (JSON.parse(readFileSync(path, 'utf8')) as RunDocument) : undefined;
    this.#document = {
      mapRunArn: this.#arn,
      executionArn: frame.arn,
      stateMachineArn: `${frame.stateMachine.Id}/${step.label}`,
      status: 'RUNNING',
      startDate: before?.startDate ?? Date.now() / 1000,
      maxConcurrency: 0,
      toleratedFailurePercentage: 0,
      toleratedFailureCount: 0,
      // Those that ended are counted again from the children's own file.
      itemCounts: { ...NO_ITEMS, total: before?.itemCounts.total ?? 0 },
    };
  }

  describe(): Fields {
    const counts = this.#document.itemCounts;
    return { ...this.#document, itemCounts: counts, executionCounts: counts, redriveCount: 0 };
  }

  async toEnd(): Promise<unknown> {
    mkdirSync(this.#folder, { recursive: true });
    try {
      const result = await this.#run();
      this.#end('SUCCEEDED');
      return result;
    } catch (error) {
      const failure = asFailure(error);
      if (failure instanceof StateError) this.#end('FAILED');
      else if (failure.why !== 'closed') this.#end('ABORTED');
      throw failure;
    } finally {
      this.#children?.log.close();
    }
  }

  #end(status: RunDocument['status']): void {
    this.#document = { ...this.#document, status, stopDate: Date.now() / 1000 };
    this.#save();
  }

  #save(): void {
    writeDocument(join(this.#folder, 'run.json'), this.#document);
  }

  async #run(): Promise<unknown> {
    const { step, input, context } = this.#call;
    await this.#prepareItems();
    const number = async (template: typeof step.toleratedCount) => {
      const value = await template(input, context);
      return value === undefined ? undefined : Number(value);
    };
    const count = await number(step.toleratedCount);
    const percentage = await number(step.toleratedPercentage);
    this.#tolerated =
      count === undefined && percentage === undefined ? { count: 0, percentage } : { count, percentage };
    Object.assign(this.#document, {
      maxConcurrency: (await number(step.maxConcurrency)) ?? 0,
      toleratedFailureCount: count ?? 0,
      toleratedFailurePercentage: percentage ?? 0,
    });
    this.#save();
    this.#children = openChildren(join(this.#folder, 'children.jsonl'), (ended) => this.#count(ended));
    this.#document.itemCounts.pending = this.#document.itemCounts.total - this.#children.ended.size;
    await this.#runChildren(this.#children);
    const result = step.writer ? await this.#writeResults(step.writer) : undefined;
    if (this.#exceeded()) {
      throw new StateError(
        'States.ExceedToleratedFailureThreshold',
        'The specified tolerated failure threshold was exceeded',
      );
    }
    return result ?? this.#outputs();
  }

  /** Reads the items once; after that they are here, whatever becomes of the object. */
  async #prepareItems(): Promise<void> {
    const path = join(this.#folder, 'items.jsonl');
    if (existsSync(join(this.#folder, 'run.json')) && existsSync(path)) return;
    const { step, input, context, frame } = this.#call;
    const counts = this.#document.itemCounts;
    counts.total = 0;
    const source = step.reader
      ? readItems(step.reader, frame, input, context)
      : itemsOf(step.items ? await step.items(input, context) : input);
    const maxItems = step.reader
      ? Number((await step.reader.maxItems(input, context)) ?? Infinity)
      : Infinity;
    async function* lines(): AsyncGenerator<string> {
      for await (const item of source) {
        if (counts.total >= maxItems) return;
        counts.total += 1;
        yield `${JSON.stringify(item)}\n`;
      }
    }
    try {
      await pipeline(Readable.from(lines()), createWriteStream(`${path}.tmp`), { signal: this.#call.signal });
    } catch (error) {
      this.#call.signal.throwIfAborted();
      if (error instanceof StateError) throw error;
      throw new StateError('States.ItemReaderFailed', readable(error));
    }
    renameSync(`${path}.tmp`, path);
    this.#save();
  }

  async #runChildren(children: Children): Promise<void> {
    const { controller, release } = linkedController(this.#call.signal);
    if (this.#exceeded()) controller.abort(new Interrupted('superseded'));
    const atOnce = Math.min(this.#document.maxConcurrency || CHILDREN_AT_ONCE, CHILDREN_AT_ONCE);
    const slots = new Slots(atOnce);
    const faults: unknown[] = [];
    try {
      let index = -1;
      for await (const line of lines(createReadStream(join(this.#folder, 'items.jsonl')))) {
        index += 1;
        if (children.ended.has(index)) continue;
        await slots.take();
        if (controller.signal.aborted) {
          slots.free();
          break;
        }
        this.#child(children, index, line, controller)
          .catch((error: unknown) => {
            faults.push(error);
            controller.abort(new Interrupted('superseded'));
          })
          .finally(() => slots.free());
      }
    } finally {
      // Children write to the journal until they have ended.
      await slots.allFree();
      release();
    }
    this.#call.signal.throwIfAborted();
    if (faults.length > 0) throw faults[0];
  }

  /** Runs one child to its end and puts that on record. Rejects only when the whole map cannot go on. */
  async #child(children: Children, index: number, line: string, map: AbortController): Promise<void> {
    const { step, frame } = this.#call;
    const counts = this.#document.itemCounts;
    counts.pending -= 1;
    counts.running += 1;
    const tally = noTally();
    const known = children.known.get(index);
    children.known.delete(index);
    const journal = new Journal(children.log, known, index);
    const begun = journal.take('child')?.begun;
    const start = begun ?? Date.now();
    if (begun === undefined) journal.put('child', { begun: start });
    const { controller, release } = linkedController(map.signal);
    const timeout = step.express
      ? setTimeout(() => controller.abort(new Interrupted('timeout')), EXPRESS_LIMIT_MS)
      : undefined;
    let input = line;
    let outcome: Pick<Ended, 'status' | 'output' | 'error' | 'cause'>;
    try {
      const effective = await this.#select(index, line);
      input = JSON.stringify(effective);
      payloadSize(effective, `The input of child ${index}`);
      const child: Frame = {
        ...frame,
        ...this.#identity(index),
        startTime: new Date(start).toISOString(),
        input: effective,
        express: step.express,
        journal,
        history: NO_HISTORY,
        events: { count: 0 },
        tally,
      };
      const output = await new Walk(child, step.processor, `${this.#uuid}/${index}/`, controller.signal).run(
        effective,
      );
      outcome = { status: 'SUCCEEDED', output: JSON.stringify(output) };
    } catch (error) {
      const failure = asFailure(error);
      if (failure instanceof StateError) {
        outcome = { status: 'FAILED', error: failure.name, cause: failure.message };
      } else if (failure.why === 'timeout') {
        outcome = {
          status: 'TIMED_OUT',
          error: 'States.Timeout',
          cause: 'EXPRESS executions end after 5 minutes.',
        };
      } else if (failure.why === 'superseded' && !this.#call.signal.aborted) {
        outcome = { status: 'ABORTED' };
      } else {
        return;
      }
    } finally {
      clearTimeout(timeout);
      release();
      counts.running -= 1;
    }
    const ended: Ended = { ...outcome, input, start, stop: Date.now(), tally };
    children.log.append({ child: index, ended });
    this.#count(ended);
    if (this.#exceeded()) map.abort(new Interrupted('superseded'));
  }

  async #select(index: number, line: string): Promise<unknown> {
    const { step, input, context } = this.#call;
    const item: unknown = JSON.parse(line);
    if (step.selector === undefined) return item;
    return step.selector(input, { ...context, Map: { Item: { Index: index, Value: item } } });
  }

  #identity(index: number): { arn: string; name: string; stateMachine: { Id: string; Name: string } } {
    const { step, frame } = this.#call;
    const machine = `${frame.stateMachine.Id}/${step.label}`;
    const name = stableUuid(`${this.#uuid} ${index}`);
    const arn = `${machine.replace(':stateMachine:', step.express ? ':express:' : ':execution:')}:${name}`;
    return { arn, name, stateMachine: { Id: machine, Name: `${frame.stateMachine.Name}/${step.label}` } };
  }

  #count({ status, tally }: Ended): void {
    this.#document.itemCounts[COUNT_OF[status]] += 1;
    addTally(this.#call.tally, tally);
    addTally(this.#call.frame.tally, tally);
  }

  #exceeded(): boolean {
    const { failed, timedOut, total } = this.#document.itemCounts;
    const { count, percentage } = this.#tolerated;
    const failures = failed + timedOut;
    return (
      (count !== undefined && failures > count) ||
      (percentage !== undefined && failures * 100 > percentage * total)
    );
  }

  *#ended(): Generator<{ index: number; ended: Ended }> {
    for (const { line } of readLines<ChildLine>(join(this.#folder, 'children.jsonl'))) {
      if ('ended' in line) yield { index: line.child, ended: line.ended };
    }
  }

  /** Without a ResultWriter the outputs of the children that succeeded are the result, in the order of the items. */
  #outputs(): unknown[] {
    const outputs: { index: number; output: string }[] = [];
    let size = 0;
    for (const { index, ended } of this.#ended()) {
      if (ended.output === undefined) continue;
      size += ended.output.length;
      // Above the limit it will be refused as a whole; no need to hold more than shows it.
      if (size <= 2 * 256 * 1024) outputs.push({ index, output: ended.output });
    }
    const result = outputs
      .sort((a, b) => a.index - b.index)
      .map(({ output }) => JSON.parse(output) as unknown);
    payloadSize(result, 'The result of the Map; without a ResultWriter it');
    return result;
  }

  async #writeResults(writer: ResultWriter): Promise<unknown> {
    const { frame, input, context } = this.#call;
    const { Bucket: bucket, Prefix: prefix = '' } = (await writer.parameters(input, context)) as Record<
      string,
      string
    >;
    const base = `${prefix.replace(/\/$/, '')}${prefix === '' ? '' : '/'}${this.#uuid}/`;
    const client = s3Client(frame);
    const put = (name: string, body: string | Readable) =>
      new Upload({ client, params: { Bucket: bucket, Key: `${base}${name}`, Body: body } }).done();
    try {
      const files: Record<string, { Key: string; Size: number }[]> = {
        FAILED: [],
        PENDING: [],
        SUCCEEDED: [],
      };
      const groups = {
        SUCCEEDED: (status: ChildStatus | 'PENDING') => status === 'SUCCEEDED',
        FAILED: (status: ChildStatus | 'PENDING') => status !== 'SUCCEEDED' && status !== 'PENDING',
        PENDING: (status: ChildStatus | 'PENDING') => status === 'PENDING',
      };
      for (const [group, holds] of Object.entries(groups)) {
        const name = `${group}_0.${writer.lines ? 'jsonl' : 'json'}`;
        const path = join(this.#folder, name);
        const results = group === 'PENDING' ? this.#pendingResults() : this.#results(writer, holds);
        await pipeline(Readable.from(asText(results, writer.lines)), createWriteStream(path));
        const { size } = statSync(path);
        if (size <= (writer.lines ? 0 : 2)) continue;
        await put(name, createReadStream(path));
        files[group]?.push({ Key: `${base}${name}`, Size: size });
      }
      const manifest = { DestinationBucket: bucket, MapRunArn: this.#arn, ResultFiles: files };
      await put('manifest.json', JSON.stringify(manifest));
    } catch (error) {
      throw new StateError('States.ResultWriterFailed', readable(error));
    } finally {
      client.destroy();
    }
    const counts = this.#document.itemCounts;
    counts.resultsWritten = counts.succeeded + counts.failed + counts.timedOut + counts.aborted;
    return { MapRunArn: this.#arn, ResultWriterDetails: { Bucket: bucket, Key: `${base}manifest.json` } };
  }

  *#results(writer: ResultWriter, holds: (status: ChildStatus) => boolean): Generator<unknown> {
    for (const { index, ended } of this.#ended()) {
      if (!holds(ended.status)) continue;
      if (ended.output === undefined || writer.transformation === 'NONE') {
        yield this.#result(index, ended);
        continue;
      }
      const output: unknown = JSON.parse(ended.output);
      if (writer.transformation === 'FLATTEN' && Array.isArray(output)) yield* output;
      else yield output;
    }
  }

  /** The items that were never begun, because the map failed. */
  async *#pendingResults(): AsyncGenerator<unknown> {
    if (this.#document.itemCounts.pending === 0) return;
    const ended = new Set<number>();
    for (const { index } of this.#ended()) ended.add(index);
    let index = -1;
    for await (const line of lines(createReadStream(join(this.#folder, 'items.jsonl')))) {
      index += 1;
      if (ended.has(index)) continue;
      const { arn, name, stateMachine } = this.#identity(index);
      const input = JSON.stringify(await this.#select(index, line));
      yield {
        ExecutionArn: arn,
        Input: input,
        InputDetails: { Included: true },
        Name: name,
        StateMachineArn: stateMachine.Id,
        Status: 'PENDING',
      };
    }
  }

  #result(index: number, ended: Ended): Fields {
    const { arn, name, stateMachine } = this.#identity(index);
    return {
      ...(ended.cause === undefined ? {} : { Cause: ended.cause }),
      ...(ended.error === undefined ? {} : { Error: ended.error }),
      ExecutionArn: arn,
      Input: ended.input,
      InputDetails: { Included: true },
      Name: name,
      ...(ended.output === undefined ? {} : { Output: ended.output, OutputDetails: { Included: true } }),
      RedriveCount: 0,
      RedriveStatus: 'NOT_REDRIVABLE',
      RedriveStatusReason: "The local AWS does not redrive; replay from the project's own records.",
      StartDate: new Date(ended.start).toISOString(),
      StateMachineArn: stateMachine.Id,
      Status: ended.status,
      StopDate: new Date(ended.stop).toISOString(),
    };
  }
}

// --- children on record -----------------------------------------------------------------------------------------

interface Children {
  log: LineLog;
  ended: Set<number>;
  /** Outcomes of tasks of children that had not ended. */
  known: Map<number, Map<string, Entry>>;
}

function openChildren(path: string, onEnded: (ended: Ended) => void): Children {
  const ended = new Set<number>();
  const known = new Map<number, Map<string, Entry>>();
  let end = 0;
  for (const { line, end: lineEnd } of readLines<ChildLine>(path)) {
    end = lineEnd;
    if ('ended' in line) {
      ended.add(line.child);
      known.delete(line.child);
      onEnded(line.ended);
    } else {
      const { child, ...entry } = line;
      const entries = known.get(child) ?? new Map<string, Entry>();
      learn(entries, entry);
      known.set(child, entries);
    }
  }
  return { log: new LineLog(path, end), ended, known };
}

/** Lets `size` run at once. */
class Slots {
  readonly #size: number;
  #taken = 0;
  #waiting: (() => void) | undefined;

  constructor(size: number) {
    this.#size = size;
  }

  async take(): Promise<void> {
    await this.#until(() => this.#taken < this.#size);
    this.#taken += 1;
  }

  free(): void {
    this.#taken -= 1;
    this.#waiting?.();
  }

  allFree(): Promise<void> {
    return this.#until(() => this.#taken === 0);
  }

  async #until(condition: () => boolean): Promise<void> {
    while (!condition()) {
      await new Promise<void>((resolve) => {
        this.#waiting = resolve;
      });
    }
  }
}

// --- items ------------------------------------------------------------------------------------------------------

async function* readItems(
  reader: ItemReader,
  frame: Frame,
  input: unknown,
  context: Fields,
): AsyncGenerator<unknown> {
  const parameters = (await reader.parameters(input, context)) as Record<string, string>;
  const client = s3Client(frame);
  try {
    if (reader.resource === 'listObjectsV2') {
      for await (const page of paginateListObjectsV2(
        { client },
        { Bucket: parameters.Bucket, Prefix: parameters.Prefix },
      )) {
        for (const object of page.Contents ?? []) {
          yield {
            Etag: object.ETag,
            Key: object.Key,
            LastModified: (object.LastModified?.getTime() ?? 0) / 1000,
            Size: object.Size,
            StorageClass: object.StorageClass,
          };
        }
      }
      return;
    }
    const { Bucket, Key, VersionId } = parameters;
    const object = await client.send(new GetObjectCommand({ Bucket, Key, VersionId }));
    const body = object.Body as Readable;
    if (reader.inputType === 'CSV') {
      const parser = parse({
        bom: true,
        columns: reader.headers ?? true,
        delimiter: reader.delimiter,
        relax_column_count: true,
        skip_empty_lines: true,
      });
      // A body that breaks off ends the parser with its error.
      pipeline(body, parser).catch(() => undefined);
      yield* parser;
    } else if (reader.inputType === 'JSON') {
      const parts: Buffer[] = [];
      for await (const part of body) parts.push(part as Buffer);
      yield* itemsOf(JSON.parse(Buffer.concat(parts).toString('utf8')));
    } else {
      for await (const line of lines(body)) if (line.trim() !== '') yield JSON.parse(line);
    }
  } finally {
    client.destroy();
  }
}

function itemsOf(value: unknown): unknown[] {
  if (Array.isArray(value)) return value;
  throw new StateError('States.ItemReaderFailed', 'The items of a Distributed Map must be an array.');
}

/** Lines of a stream; unlike node:readline it fails when the stream does. */
async function* lines(stream: Readable): AsyncGenerator<string> {
  const decoder = new TextDecoder();
  let rest = '';
  for await (const chunk of stream) {
    const parts = (rest + decoder.decode(chunk as Buffer, { stream: true })).split('\n');
    rest = parts.pop() ?? '';
    yield* parts;
  }
  if (rest !== '') yield rest;
}

async function* asText(
  values: Iterable<unknown> | AsyncIterable<unknown>,
  asLines: boolean,
): AsyncGenerator<string> {
  let separator = asLines ? '' : '[';
  for await (const value of values) {
    yield `${separator}${JSON.stringify(value)}${asLines ? '\n' : ''}`;
    separator = asLines ? '' : ',';
  }
  if (!asLines) yield separator === '[' ? '[]' : ']';
}

const s3Client = (frame: Frame): S3Client =>
  new S3Client({
    endpoint: frame.services.endpoint(),
    region: LOCAL_REGION,
    credentials: frame.services.credentials(frame.roleArn),
    forcePathStyle: true,
  });

const readable = (error: unknown): string =>
  error instanceof Error ? `${error.name}: ${error.message}` : String(error);
