/**
 * Slides that come late. A row whose slide is not in Landing waits in the state table, where an object's arrival finds
 * it at once by its key; slides that have come, and have been quiet for a while, are started together as one run that
 * follows the run which missed them. Everything here may be repeated, and be done by several at the same time.
 */

import { ConditionalCheckFailedException } from '@aws-sdk/client-dynamodb';
import type { S3Client } from '@aws-sdk/client-s3';
import { type SFNClient, StartExecutionCommand } from '@aws-sdk/client-sfn';
import {
  BatchWriteCommand,
  DeleteCommand,
  type DynamoDBDocumentClient,
  GetCommand,
  paginateQuery,
  UpdateCommand,
} from '@aws-sdk/lib-dynamodb';
import { forEachConcurrently } from './concurrency.ts';
import type { Plan, PlannedSlide, RunContext, RunItem } from './contracts.ts';
import { FollowUpTaken, ServiceUnavailable } from './errors.ts';
import { type FollowUpInput, followUpManifest, landingOf, writeFollowUp } from './follow-up.ts';
import { followUpKey, planKey, slidesKey } from './keys.ts';
import { LandingListing } from './landing.ts';
import { parseManifest, splitModels } from './manifest.ts';
import { runPk, type StateTable } from './state.ts';
import { readJson, readLines, readVersion } from './store.ts';

/** A row that waits for its slide: `pk = WAITING#<bucket>/<place>`, `sk = RUN#<runId>#<line>`. */
interface WaitingRow {
  runId: string;
  study: string;
  startedAt: string;
  line: number;
  slideId: string;
}

/** A slide that has come: `pk = RUN#<runId>`, `sk = ARRIVED#<line>`. Times in milliseconds since 1970. */
interface ArrivedRow {
  line: number;
  slideId: string;
  /** Where it waits. */
  place: string;
  lastAt: number;
}

/** A run whose slides have come: `pk = ARRIVED`, `sk = <runId>`. */
interface ArrivedRun {
  runId: string;
  firstAt: number;
  lastAt: number;
}

const LINE_DIGITS = 9;
const lineKey = (line: number) => String(line).padStart(LINE_DIGITS, '0');
const waitingPk = (bucket: string, place: string) => `WAITING#${bucket}/${place}`;
const waitingSk = ({ runId, line }: Pick<WaitingRow, 'runId' | 'line'>) => `RUN#${runId}#${lineKey(line)}`;
const arrivedSk = (line: number) => `ARRIVED#${lineKey(line)}`;

/**
 * Where a slide waits: its path without what its files do not share. `x.mrxs` and `x/Data.dat` are of `x`, `x.vsi` and
 * `_x_/stack/frame.ets` too; any other file, or folder of DICOM files, is its own path.
 */
export const placeOf = (key: string): string => key.replace(/\.(mrxs|vsi)$/i, '');

/** The places at which the slide that an object belongs to may wait, the object's own first. */
export function placesOf(key: string): string[] {
  const places = new Set([placeOf(key)]);
  const folders = key.split('/').slice(0, -1);
  // The first is the study's own, or a part of its path.
  for (let depth = folders.length; depth > 1; depth--) {
    const path = folders.slice(0, depth);
    places.add(path.join('/'));
    const companion = /^_(.+)_$/.exec(path.at(-1) ?? '')?.[1];
    if (companion) places.add([...path.slice(0, -1), companion].join('/'));
  }
  return [...places];
}

/** The table's side of it. */
export class Late {
  readonly #client: DynamoDBDocumentClient;
  readonly #table: string;

  constructor(client: DynamoDBDocumentClient, table: string) {
    this.#client = client;
    this.#table = table;
  }

  /** Has rows of a run wait for their slides. */
  async wait(run: RunContext, rows: readonly PlannedSlide[]): Promise<void> {
    const { runId, study, startedAt } = run;
    const bucket = landingOf(run);
    const batches: PlannedSlide[][] = [];
    for (let at = 0; at < rows.length; at += 25) batches.push(rows.slice(at, at + 25));
    await forEachConcurrently(batches, 4, async (batch) => {
      const items = batch.map(({ line, slideId, slide }) => {
        const row: WaitingRow = { runId, study, startedAt, line, slideId };
        return { pk: waitingPk(bucket, placeOf(`${study}/${slide}`)), sk: waitingSk(row), ...row };
      });
      await this.#write(items.map((Item) => ({ PutRequest: { Item } })));
    });
  }

  /** Puts on record which run of a study is the newest. */
  async newest({ study, runId, startedAt, ...run }: RunContext): Promise<void> {
    await this.#update(
      { pk: `STUDY#${landingOf(run)}/${study}`, sk: 'NEWEST' },
      {
        UpdateExpression: 'SET runId = :runId, startedAt = :startedAt',
        ConditionExpression: 'attribute_not_exists(pk) OR startedAt <= :startedAt',
        ExpressionAttributeValues: { ':runId': runId, ':startedAt': startedAt },
      },
    );
  }

  async newestOf(run: Pick<RunItem, 'study' | 'landing' | 'manifest'>): Promise<string | undefined> {
    const { Item } = await this.#client.send(
      new GetCommand({
        TableName: this.#table,
        Key: { pk: `STUDY#${landingOf(run)}/${run.study}`, sk: 'NEWEST' },
        ConsistentRead: true,
      }),
    );
    return Item?.runId as string | undefined;
  }

  /**
   * Marks the slides that an object of Landing belongs to as come; says how many. Of several runs of one study that
   * wait for it, the newest gets it.
   */
  async arrived(bucket: string, key: string, now = Date.now()): Promise<number> {
    let marked = 0;
    for (const place of placesOf(key)) {
      for (const row of await this.#waiting(bucket, place)) {
        await this.mark(row, place, now);
        marked += 1;
      }
    }
    return marked;
  }

  /** Marks one row's slide as come. */
  async mark(
    { runId, line, slideId }: Pick<WaitingRow, 'runId' | 'line' | 'slideId'>,
    place: string,
    now = Date.now(),
  ): Promise<void> {
    // The run last: whoever finds the run finds the row.
    await this.#update(
      { pk: runPk(runId), sk: arrivedSk(line) },
      {
        UpdateExpression: 'SET line = :line, slideId = :slideId, place = :place, lastAt = :now',
        ConditionExpression: 'attribute_not_exists(lastAt) OR lastAt < :now',
        ExpressionAttributeValues: { ':line': line, ':slideId': slideId, ':place': place, ':now': now },
      },
    );
    await this.#update(
      { pk: 'ARRIVED', sk: runId },
      {
        UpdateExpression: 'SET runId = :runId, firstAt = if_not_exists(firstAt, :now), lastAt = :now',
        ConditionExpression: 'attribute_not_exists(lastAt) OR lastAt < :now',
        ExpressionAttributeValues: { ':runId': runId, ':now': now },
      },
    );
  }

  runs(): AsyncGenerator<ArrivedRun> {
    return this.#query<ArrivedRun>('ARRIVED', '');
  }

  rows(runId: string): AsyncGenerator<ArrivedRow> {
    return this.#query<ArrivedRow>(runPk(runId), 'ARRIVED#');
  }

  /** How many follow-up runs have been started for a run. */
  async followed(runId: string): Promise<number> {
    const { Item } = await this.#client.send(
      new GetCommand({
        TableName: this.#table,
        Key: { pk: runPk(runId), sk: 'LATE' },
        ConsistentRead: true,
      }),
    );
    return (Item?.started as number | undefined) ?? 0;
  }

  async countFollowed(runId: string, started: number): Promise<void> {
    await this.#update(
      { pk: runPk(runId), sk: 'LATE' },
      {
        UpdateExpression: 'SET started = :started',
        ConditionExpression: 'attribute_not_exists(started) OR started < :started',
        ExpressionAttributeValues: { ':started': started },
      },
    );
  }

  /** Rows that wait no longer: no run of the study waits for these slides any more. */
  async done(bucket: string, runId: string, study: string, rows: readonly ArrivedRow[]): Promise<void> {
    await forEachConcurrently(rows, 8, async ({ line, place }) => {
      const pk = waitingPk(bucket, place);
      const keys: { pk: string; sk: string }[] = [{ pk: runPk(runId), sk: arrivedSk(line) }];
      for await (const row of this.#query<WaitingRow>(pk, 'RUN#'))
        if (row.study === study) keys.push({ pk, sk: waitingSk(row) });
      for (let at = 0; at < keys.length; at += 25)
        await this.#write(keys.slice(at, at + 25).map((Key) => ({ DeleteRequest: { Key } })));
    });
  }

  /** A slide that has not come whole waits on for its next object. */
  async notYet(runId: string, { line, lastAt }: ArrivedRow): Promise<void> {
    await this.#delete({ pk: runPk(runId), sk: arrivedSk(line) }, lastAt);
  }

  /** Forgets a run of which nothing has come since it was looked at. */
  async forget({ runId, lastAt }: ArrivedRun): Promise<void> {
    await this.#delete({ pk: 'ARRIVED', sk: runId }, lastAt);
  }

  /** Of each study the rows of the newest run. */
  async #waiting(bucket: string, place: string): Promise<WaitingRow[]> {
    const all = await Array.fromAsync(this.#query<WaitingRow>(waitingPk(bucket, place), 'RUN#'));
    const newest = new Map<string, string>();
    for (const { study, startedAt } of all) {
      const known = newest.get(study);
      if (known === undefined || known < startedAt) newest.set(study, startedAt);
    }
    return all.filter(({ study, startedAt }) => newest.get(study) === startedAt);
  }

  async *#query<T>(pk: string, prefix: string): AsyncGenerator<T> {
    const pages = paginateQuery(
      { client: this.#client },
      {
        TableName: this.#table,
        KeyConditionExpression: prefix ? 'pk = :pk AND begins_with(sk, :prefix)' : 'pk = :pk',
        ExpressionAttributeValues: { ':pk': pk, ...(prefix && { ':prefix': prefix }) },
        ConsistentRead: true,
      },
    );
    for await (const page of pages) yield* (page.Items ?? []) as T[];
  }

  async #update(
    Key: Record<string, string>,
    update: Pick<
      ConstructorParameters<typeof UpdateCommand>[0],
      'UpdateExpression' | 'ConditionExpression' | 'ExpressionAttributeValues'
    >,
  ): Promise<void> {
    await this.#unlessChanged(new UpdateCommand({ TableName: this.#table, Key, ...update }));
  }

  async #delete(Key: Record<string, string>, lastAt: number): Promise<void> {
    await this.#unlessChanged(
      new DeleteCommand({
        TableName: this.#table,
        Key,
        ConditionExpression: 'lastAt = :lastAt',
        ExpressionAttributeValues: { ':lastAt': lastAt },
      }),
    );
  }

  async #unlessChanged(command: UpdateCommand | DeleteCommand): Promise<void> {
    try {
      await (command instanceof UpdateCommand ? this.#client.send(command) : this.#client.send(command));
    } catch (error) {
      if (!(error instanceof ConditionalCheckFailedException)) throw error;
    }
  }

  async #write(requests: Record<string, unknown>[]): Promise<void> {
    let left: Record<string, unknown>[] | undefined = requests;
    for (let attempt = 0; left && left.length > 0; attempt++) {
      if (attempt === 8) throw new ServiceUnavailable('DynamoDB did not take all rows of a batch.');
      if (attempt > 0) await new Promise((done) => setTimeout(done, 50 * 2 ** attempt));
      const answer: { UnprocessedItems?: Record<string, Record<string, unknown>[]> | undefined } =
        await this.#client.send(new BatchWriteCommand({ RequestItems: { [this.#table]: left } }));
      left = answer.UnprocessedItems?.[this.#table];
    }
  }
}

/**
 * Has the MISSING rows of a plan wait. What came after Landing was listed, and before the rows waited, no arrival would
 * ever tell of: Landing is looked at again.
 */
export async function awaitMissing(
  run: RunContext,
  slides: readonly PlannedSlide[],
  { s3, late, quietMs }: { s3: S3Client; late: Late; quietMs?: number },
): Promise<void> {
  await late.newest(run);
  const missing = slides.filter(({ state }) => state === 'MISSING');
  if (missing.length === 0) return;
  await late.wait(run, missing);
  const landing = await LandingListing.read(s3, landingOf(run), run.study, quietMs);
  for (const { line, slideId, slide } of missing) {
    const found = landing.find(slide);
    if ('state' in found && found.reason.error === 'SlideMissing') continue;
    await late.mark({ runId: run.runId, line, slideId }, placeOf(`${run.study}/${slide}`));
  }
}

// --- follow-up runs -----------------------------------------------------------------------------------------------

export interface FollowUpDependencies {
  s3: S3Client;
  stepFunctions: SFNClient;
  state: StateTable;
  late: Late;
  silverBucket: string;
  stateMachineArn: string;
  /** How long nothing of a run's slides must have come before they are started. */
  quietMs: number;
  /** Slides that have come are started after so long, though others still come. */
  patienceMs: number;
  now?(): number;
}

export interface Started {
  /** runId of the run that is followed. */
  of: string;
  execution: string;
  slides: number;
}

/**
 * Starts a follow-up run for every run whose missing slides have come. One run's trouble holds up no other: it is
 * given back, and met again by the next call.
 */
export async function startFollowUps(
  deps: FollowUpDependencies,
): Promise<{ started: Started[]; failed: { of: string; error: unknown }[] }> {
  const started: Started[] = [];
  const failed: { of: string; error: unknown }[] = [];
  for await (const run of deps.late.runs()) {
    try {
      const one = await startFollowUp(run, deps);
      if (one) started.push(one);
    } catch (error) {
      failed.push({ of: run.runId, error });
    }
  }
  return { started, failed };
}

async function startFollowUp(arrived: ArrivedRun, deps: FollowUpDependencies): Promise<Started | undefined> {
  const { state, late, quietMs, patienceMs, now = Date.now } = deps;
  const { runId, firstAt, lastAt } = arrived;
  const at = now();
  if (lastAt > at - quietMs && firstAt > at - patienceMs) return undefined;
  const run = await state.run(runId);
  if (!run) return undefined;
  const rows = await Array.fromAsync(late.rows(runId));
  const quiet = rows.filter((row) => row.lastAt <= at - quietMs);
  const ready = await whole(run, quiet, deps);
  let started: Started | undefined;
  if (ready.length > 0) {
    const n = (await late.followed(runId)) + 1;
    const { input, slideIds } = await followUpOf(run, n, ready, deps);
    const execution = `${runId}-late-${n}`;
    await start(execution, input, deps);
    const taken = rows.filter(({ slideId }) => slideIds.has(slideId));
    await late.done(landingOf(run), runId, run.study, taken);
    await late.countFollowed(runId, n);
    started = { of: runId, execution, slides: slideIds.size };
  }
  const left = await Array.fromAsync(late.rows(runId));
  if (left.length === 0) await late.forget(arrived);
  return started;
}

/** A row that has come, with its line of the plan. */
type Ready = ArrivedRow & { planned: PlannedSlide };

/** Those of the rows whose slides lie in Landing whole, and which no newer run of the study has taken. */
async function whole(
  run: RunItem,
  rows: readonly ArrivedRow[],
  { s3, state, late, silverBucket }: FollowUpDependencies,
): Promise<Ready[]> {
  if (rows.length === 0) return [];
  const { runId, study } = run;
  const landing = await LandingListing.read(s3, landingOf(run), study);
  const newest = await late.newestOf(run);
  const byLine = new Map(rows.map((row) => [row.line, row]));
  const ready: Ready[] = [];
  const lines = readLines<PlannedSlide>(s3, { bucket: silverBucket, key: slidesKey(runId) });
  for await (const planned of lines) {
    const row = byLine.get(planned.line);
    if (!row) continue;
    const found = landing.find(planned.slide);
    const elsewhere = newest !== undefined && newest !== runId && (await state.slide(newest, row.slideId));
    if (elsewhere) await late.done(landingOf(run), runId, study, [row]);
    else if ('state' in found && found.state === 'MISSING') await late.notYet(runId, row);
    else ready.push({ ...row, planned });
  }
  return ready;
}

/**
 * The n-th follow-up of a run. Its manifest is written once; where an earlier call wrote it and came no further, its
 * rows are the ones that count, and what has come since is for the next.
 */
async function followUpOf(
  run: RunItem,
  n: number,
  rows: readonly Ready[],
  { s3, silverBucket }: FollowUpDependencies,
): Promise<{ input: FollowUpInput; slideIds: Set<string> }> {
  const { runId: of } = run;
  const id = String(n);
  const plan = (await readJson(s3, { bucket: silverBucket, key: planKey(of) })) as Plan | undefined;
  const lines = rows.map(({ planned }) => ({
    ...planned,
    wantedModels: (planned.wantedModels ?? splitModels(run.defaultModel)).map(
      (text) => plan?.versions?.[text] ?? text,
    ),
  }));
  try {
    const manifest = followUpManifest(lines);
    const input = await writeFollowUp(s3, silverBucket, { kind: 'late', of, id, manifest });
    return { input, slideIds: new Set(rows.map(({ slideId }) => slideId)) };
  } catch (error) {
    if (!(error instanceof FollowUpTaken)) throw error;
    const there = await readVersion(s3, { bucket: silverBucket, key: followUpKey(of, 'late', id) });
    if (!there) throw error;
    const manifest = Buffer.from(there.bytes).toString('utf8');
    const input = await writeFollowUp(s3, silverBucket, { kind: 'late', of, id, manifest });
    const slideIds = parseManifest(there.bytes).flatMap(({ slideId }) => slideId ?? []);
    return { input, slideIds: new Set(slideIds) };
  }
}

/** Starts the run; one that has been started before is not started again. */
async function start(
  name: string,
  input: FollowUpInput,
  { stepFunctions, stateMachineArn }: FollowUpDependencies,
): Promise<void> {
  try {
    await stepFunctions.send(
      new StartExecutionCommand({ stateMachineArn, name, input: JSON.stringify(input) }),
    );
  } catch (error) {
    if (!(error instanceof Error) || error.name !== 'ExecutionAlreadyExists') throw error;
  }
}
