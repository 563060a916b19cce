/**
 * PublishRun: the end of a run on record and before people. The plan's lines are the master list; whatever happened to
 * a slide, its line is in every document. May be repeated: the first publication fixes state, reason and time of the
 * end, and the message goes out once it is not on record as sent.
 */

import type { S3Client } from '@aws-sdk/client-s3';
import { PublishCommand, type SNSClient } from '@aws-sdk/client-sns';
import { z } from 'zod';

import { runInputSchema } from './claim.ts';
import { forEachConcurrently } from './concurrency.ts';
import {
  type JobItem,
  type Plan,
  type PlannedSlide,
  type Reason,
  type RunContext,
  type RunItem,
  type RunState,
  runContextSchema,
  type SlideItem,
  type SlideState,
} from './contracts.ts';
import { type CountedRun, costOf } from './cost.ts';
import { endFailed } from './jobs.ts';
import {
  messageKey,
  planKey,
  reportKey,
  reportPrefix,
  resultsCsvKey,
  runJsonKey,
  slidesKey,
} from './keys.ts';
import { contentId, type Lineage } from './lineage.ts';
import { addCounts } from './metering.ts';
import {
  claimMessage,
  linkTo,
  MAX_PROBLEMS,
  type Problem,
  runMessage,
  shorten,
  withoutPatientData,
} from './notification.ts';
import { slideIdOf } from './plan.ts';
import type { Prices } from './prices.ts';
import { reportPages } from './report.ts';
import {
  isProblem,
  type RunHead,
  resultsCsv,
  runJson,
  runStateOf,
  type SlideEnd,
  type SlideRow,
  slideRow,
  UNFINISHED,
  withoutWaiting,
} from './results.ts';
import type { StateTable } from './state.ts';
import { readJson, readLines, type Written, writeJson, writeObject, writeText } from './store.ts';

/** Pages of the report whose checksums go on record; the rest says what run.json says, which is on record. */
const PAGES_ON_RECORD = 100;
const S3_ADDRESS = 's3://{bucket}/{key}';

const failureSchema = z.object({ stage: z.string(), error: z.string(), cause: z.string().default('') });
export type Failure = z.infer<typeof failureSchema>;

/** A run, perhaps with what ended it early; or, where no run could be claimed, the event that asked for one. */
export const publishInputSchema = z.union([
  z.object({ run: runContextSchema, failure: failureSchema.optional() }),
  z.object({
    event: z.object({ event: runInputSchema }).or(runInputSchema),
    /** The execution that asked: it may have claimed the run before it failed. */
    execution: z.object({ arn: z.string(), startedAt: z.string() }).optional(),
    failure: failureSchema,
  }),
]);
export type PublishInput = z.infer<typeof publishInputSchema>;

export interface PublishDependencies {
  s3: S3Client;
  sns: SNSClient;
  state: StateTable;
  lineage: Lineage;
  silver: string;
  topicArn: string;
  codeVersion: string;
  prices: Prices;
  /** How the message points at objects, with `{bucket}` and `{key}`. Default: by their S3 addresses. */
  links?: string;
  now(): Date;
}

export interface Published {
  runId: string | null;
  state: RunState;
  counts: Partial<Record<SlideState, number>>;
  estimatedUsd: number;
  durationSeconds: number;
  tiles: { ok: number; unreadable: number };
  seconds: StepSeconds;
  /** False when the run had been published before. */
  first: boolean;
}

/** Seconds that the run was in each step; absent for a step that it never came to. */
export interface StepSeconds {
  plan?: number;
  ingest?: number;
  inference?: number;
  aggregate?: number;
}

export async function publish(input: PublishInput, deps: PublishDependencies): Promise<Published> {
  return 'run' in input ? publishRun(input.run, input.failure, deps) : publishClaim(input, deps);
}

/** A manifest that never became a run has no record to write to; its message is all there is. */
async function publishClaim(
  { event, execution, failure }: Extract<PublishInput, { event: unknown }>,
  deps: PublishDependencies,
): Promise<Published> {
  const { sns, topicArn, state } = deps;
  const run = execution && (await state.runOf(execution));
  if (run) return publishRun(runContextSchema.parse(run), failure, deps);
  const asked = 'event' in event ? event.event : event;
  const { bucket, key } =
    'followUp' in asked
      ? asked.followUp.manifest
      : { bucket: asked.detail.bucket.name, key: asked.detail.object.key };
  const { subject, text } = claimMessage(`s3://${bucket}/${key}`, reasonOfFailure(failure));
  await sns.send(new PublishCommand({ TopicArn: topicArn, Subject: subject, Message: text }));
  return {
    ...{ runId: null, state: 'FAILED', counts: {}, estimatedUsd: 0, durationSeconds: 0 },
    ...{ tiles: { ok: 0, unreadable: 0 }, seconds: {}, first: true },
  };
}

async function publishRun(
  run: RunContext,
  failure: Failure | undefined,
  deps: PublishDependencies,
): Promise<Published> {
  const { s3, state, lineage, silver } = deps;
  const { runId } = run;
  const before = await state.run(runId);
  const plan = (await readJson(s3, { bucket: silver, key: planKey(runId) })) as Plan | undefined;
  const ends = await SlideEnds.read(state, runId);
  const jobs: JobItem[] = [];
  for await (const job of state.jobs(runId)) jobs.push(jobWithoutKeys(job));

  const broken = before?.plannedAt === undefined;
  async function* lines() {
    for await (const line of readLines<PlannedSlide>(s3, { bucket: silver, key: slidesKey(runId) }))
      yield broken ? withoutWaiting(line) : line;
  }
  if (before?.endedAt === undefined) await endStragglers(runId, lines(), ends, deps);
  const tally = await tallyOf(lines(), ends, run.study);
  const ended =
    before?.endedAt === undefined
      ? { ...endOf(tally, failure), endedAt: deps.now().toISOString() }
      : { state: before.state, reason: before.reason ?? null, endedAt: before.endedAt };
  const head: RunHead = {
    runId,
    study: run.study,
    ...(run.followUp && { followUp: run.followUp }),
    manifest: run.manifest,
    ...ended,
    startedAt: run.startedAt,
    models: (plan?.models ?? []).map(({ name, version, digest, model }) => ({
      name,
      version,
      digest,
      license: model.license,
    })),
    parameters: run.parameters,
    codeVersion: plan?.codeVersion ?? deps.codeVersion,
    counts: tally.counts,
    jobs,
    cost: costOf({ ...tally, jobs, requests: ends.requests }, deps.prices),
  };

  async function* rows(which: (row: SlideRow) => boolean = () => true) {
    for await (const planned of lines()) {
      const row = slideRow(planned, ends.of(planned.slideId));
      if (which(row)) yield row;
    }
  }
  async function* problemsFirst() {
    yield* rows(isProblem);
    yield* rows((row) => !isProblem(row));
  }
  const csv = await writeText(
    s3,
    { bucket: silver, key: resultsCsvKey(runId) },
    resultsCsv(rows(), plan?.models ?? []),
    'text/csv; charset=utf-8',
  );
  const pages: Written[] = [];
  for await (const { name, html } of reportPages(head, problemsFirst())) {
    const page = { bucket: silver, key: `${reportPrefix(runId)}${name}` };
    const object = await writeObject(s3, page, html, 'text/html; charset=utf-8');
    if (pages.length < PAGES_ON_RECORD) pages.push(object);
  }
  const summary = await writeText(
    s3,
    { bucket: silver, key: runJsonKey(runId) },
    runJson(head, rows()),
    'application/json',
  );

  const first = await state.updateRun(runId, {
    state: head.state,
    ...(head.reason && { reason: head.reason }),
    endedAt: head.endedAt,
    counts: head.counts,
  });
  await lineage.append(
    { runId },
    {
      id: `${runId}/published/${contentId([summary, csv])}`,
      runId,
      action: `RUN_${head.state}`,
      ...(head.reason && { reason: `${head.reason.error}: ${head.reason.message}` }),
      outputs: [summary, csv, ...pages],
      parameters: {
        ...run.parameters,
        counts: head.counts,
        models: head.models.map(({ name, version, digest }) => ({ name, version, digest })),
      },
    },
  );
  await announce(head, tally.problems, deps);
  if (before?.publishedAt === undefined) await state.published(runId, deps.now().toISOString());
  return {
    runId,
    state: head.state,
    counts: head.counts,
    estimatedUsd: head.cost.estimatedUsd,
    durationSeconds: (Date.parse(head.endedAt) - Date.parse(head.startedAt)) / 1000,
    tiles: tally.tiles,
    seconds: stepSeconds(head, before),
    first,
  };
}

// --- what became of the slides --------------------------------------------------------------------------------

/**
 * The ends of all slides of a run, as they are at one moment. Held as text: a hundred thousand slides take about as
 * many kilobytes, where objects would take several times that.
 */
class SlideEnds {
  readonly #ends = new Map<string, string>();
  requests: Record<string, number> = {};

  static async read(state: StateTable, runId: string): Promise<SlideEnds> {
    const all = new SlideEnds();
    for await (const item of state.slides(runId)) {
      all.put(item);
      all.requests = addCounts(all.requests, item.requests);
    }
    return all;
  }

  put({ slideId, state, reason, bronze, results }: SlideItem): void {
    const end: SlideEnd = {
      state,
      ...(reason && { reason }),
      ...(results && { results }),
      ...(bronze && { checksum: bronze.checksum }),
    };
    this.#ends.set(slideId, JSON.stringify(end));
  }

  of(slideId: string): SlideEnd | undefined {
    const end = this.#ends.get(slideId);
    return end === undefined ? undefined : (JSON.parse(end) as SlideEnd);
  }
}

/**
 * Ends the slides that are under way when their run ends: what comes of them later would be in no document. One that
 * ends by itself meanwhile ends as it does.
 */
async function endStragglers(
  runId: string,
  lines: AsyncIterable<PlannedSlide>,
  ends: SlideEnds,
  deps: PublishDependencies,
): Promise<void> {
  await forEachConcurrently(lines, 16, async (planned) => {
    const { slideId, slide } = planned;
    const item = ends.of(slideId);
    const { reason } = slideRow(planned, item);
    if (planned.state !== 'EXPECTED' || reason?.error !== UNFINISHED) return;
    const ended = await endFailed({ runId, slideId, slide, stage: 'PublishRun', reason, item }, deps);
    if (ended) ends.put(ended);
  });
}

interface Tally extends Pick<CountedRun, 'rows' | 'expected' | 'inferred'> {
  tiles: { ok: number; unreadable: number };
  counts: Partial<Record<SlideState, number>>;
  /** The first of them, for the message. */
  problems: Problem[];
  /** How often each reason was given. */
  reasons: Map<string, { reason: Reason; count: number }>;
}

async function tallyOf(lines: AsyncIterable<PlannedSlide>, ends: SlideEnds, study: string): Promise<Tally> {
  const tally: Tally = {
    ...{ rows: 0, expected: 0, inferred: 0, counts: {}, problems: [], reasons: new Map() },
    tiles: { ok: 0, unreadable: 0 },
  };
  for await (const planned of lines) {
    const row = slideRow(planned, ends.of(planned.slideId));
    tally.rows += 1;
    if (planned.state === 'EXPECTED') tally.expected += 1;
    if (row.results.length > 0) tally.inferred += 1;
    for (const { tiles } of row.results) {
      tally.tiles.ok += tiles.ok;
      tally.tiles.unreadable += tiles.unreadable;
    }
    tally.counts[row.state] = (tally.counts[row.state] ?? 0) + 1;
    if (!isProblem(row)) continue;
    const known = row.reason && tally.reasons.get(row.reason.error);
    if (known) known.count += 1;
    if (known && tally.problems.length >= MAX_PROBLEMS) continue;
    const made = slideIdOf(study, { slide: planned.slide }) === planned.slideId;
    const problem = withoutPatientData(row, planned.metadata, made);
    if (tally.problems.length < MAX_PROBLEMS) tally.problems.push(problem);
    if (problem.reason && !known)
      tally.reasons.set(problem.reason.error, { reason: problem.reason, count: 1 });
  }
  return tally;
}

/** From one step's beginning to the next one's, as far as the run came. */
function stepSeconds({ startedAt, endedAt, jobs }: RunHead, run: RunItem | undefined): StepSeconds {
  const { plannedAt, ingestedAt } = run ?? {};
  const inferredAt = jobs
    .flatMap((job) => job.endedAt ?? [])
    .sort()
    .at(-1);
  const between = (from: string | undefined, to: string | undefined) =>
    from && to ? Math.max(0, (Date.parse(to) - Date.parse(from)) / 1000) : undefined;
  const steps = {
    plan: between(startedAt, plannedAt),
    ingest: between(plannedAt, ingestedAt),
    inference: between(ingestedAt, inferredAt),
    aggregate: between(inferredAt, endedAt),
  };
  return Object.fromEntries(Object.entries(steps).filter(([, seconds]) => seconds !== undefined));
}

/** How the run ended. One that failed for all its slides says what most of them failed for. */
function endOf(tally: Tally, failure: Failure | undefined): { state: RunState; reason: Reason | null } {
  if (failure) return { state: 'FAILED', reason: reasonOfFailure(failure) };
  const state = runStateOf(tally.counts);
  if (state !== 'FAILED') return { state, reason: null };
  const [most] = [...tally.reasons.values()].sort((a, b) => b.count - a.count);
  const message = most
    ? `No slide came through. Most often (${most.count} of ${tally.rows}): ${most.reason.message}`
    : 'The manifest names no slide that could be done.';
  return { state, reason: { error: 'NoResults', message } };
}

/** Lambda gives its error as JSON in the cause, SageMaker its job; the state machine passes on both as text. */
function reasonOfFailure({ stage, error, cause }: Failure): Reason {
  let message = cause;
  try {
    const parsed: unknown = JSON.parse(cause);
    const { errorMessage, FailureReason } = (parsed ?? {}) as Record<string, unknown>;
    message = String(errorMessage ?? FailureReason ?? cause);
  } catch {
    // Not JSON: the cause is the message.
  }
  return { error, message: `${stage}: ${shorten(message || 'no cause was given', 500)}` };
}

function jobWithoutKeys({
  jobName,
  kind,
  model,
  version,
  state,
  reason,
  packs,
  fruitless,
  instanceType,
  instanceCount,
  instanceSeconds,
  endedAt,
}: JobItem): JobItem {
  return {
    jobName,
    ...(kind && { kind }),
    model,
    version,
    state,
    ...(reason && { reason }),
    ...(packs !== undefined && { packs, fruitless }),
    instanceType,
    instanceCount,
    instanceSeconds,
    ...(endedAt && { endedAt }),
  };
}

// --- telling ----------------------------------------------------------------------------------------

/** Sends the message unless it is on record as sent. It goes out twice only if the record of it could not be written. */
async function announce(
  head: RunHead,
  problems: Problem[],
  { s3, sns, silver, topicArn, links = S3_ADDRESS, now }: PublishDependencies,
): Promise<void> {
  const record = { bucket: silver, key: messageKey(head.runId) };
  if (await readJson(s3, record)) return;
  const { subject, text } = runMessage(head, problems, {
    report: linkTo(links, silver, reportKey(head.runId)),
    results: linkTo(links, silver, resultsCsvKey(head.runId)),
    summary: linkTo(links, silver, runJsonKey(head.runId)),
  });
  const { MessageId } = await sns.send(
    new PublishCommand({
      TopicArn: topicArn,
      Subject: subject,
      Message: text,
      MessageAttributes: {
        runId: { DataType: 'String', StringValue: head.runId },
        state: { DataType: 'String', StringValue: head.state },
      },
    }),
  );
  await writeJson(s3, record, { messageId: MessageId, sentAt: now().toISOString(), subject, text });
}
