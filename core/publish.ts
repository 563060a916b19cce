/**
 * PublishRun: the end of a run on record and before people. The plan's lines are the master list; whatever happened to
 * a slide, its line is in every document. May be repeated: the first publication fixes state, reason and time of the
 * end, and the message goes out once it is not on record as sent.
 */

import type { S3Client } from '@aws-sdk/client-s3';
import { PublishCommand, type SNSClient } from '@aws-sdk/client-sns';
import { z } from 'zod';

import { objectCreatedSchema } from './claim.ts';
import {
  type JobItem,
  type Plan,
  type PlannedSlide,
  type Reason,
  type RunContext,
  type RunState,
  runContextSchema,
  type SlideState,
} from './contracts.ts';
import { type CountedRun, costOf } from './cost.ts';
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
  MAX_PROBLEMS,
  type Problem,
  runMessage,
  shorten,
  withoutPatientData,
} from './notification.ts';
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
} from './results.ts';
import type { StateTable } from './state.ts';
import { readJson, readLines, type Written, writeJson, writeObject, writeText } from './store.ts';

/** Pages of the report whose checksums go on record; the rest says what run.json says, which is on record. */
const PAGES_ON_RECORD = 100;

const failureSchema = z.object({ stage: z.string(), error: z.string(), cause: z.string().default('') });
export type Failure = z.infer<typeof failureSchema>;

/** A run, perhaps with what ended it early; or, where no run could be claimed, the event that asked for one. */
export const publishInputSchema = z.union([
  z.object({ run: runContextSchema, failure: failureSchema.optional() }),
  z.object({
    event: z.object({ event: objectCreatedSchema }).or(objectCreatedSchema),
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
  now(): Date;
}

export interface Published {
  runId: string | null;
  state: RunState;
  counts: Partial<Record<SlideState, number>>;
  estimatedUsd: number;
  durationSeconds: number;
  /** False when the run had been published before. */
  first: boolean;
}

export async function publish(input: PublishInput, deps: PublishDependencies): Promise<Published> {
  return 'run' in input ? publishRun(input.run, input.failure, deps) : publishClaim(input, deps);
}

/** A manifest that never became a run has no record to write to; its message is all there is. */
async function publishClaim(
  { event, failure }: Extract<PublishInput, { event: unknown }>,
  { sns, topicArn }: PublishDependencies,
): Promise<Published> {
  const { bucket, object } = 'event' in event ? event.event.detail : event.detail;
  const { subject, text } = claimMessage(`s3://${bucket.name}/${object.key}`, reasonOfFailure(failure));
  await sns.send(new PublishCommand({ TopicArn: topicArn, Subject: subject, Message: text }));
  return { runId: null, state: 'FAILED', counts: {}, estimatedUsd: 0, durationSeconds: 0, first: true };
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

  const lines = () => readLines<PlannedSlide>(s3, { bucket: silver, key: slidesKey(runId) });
  const tally = await tallyOf(lines(), ends);
  const ended =
    before?.endedAt === undefined
      ? { ...endOf(tally, failure), endedAt: deps.now().toISOString() }
      : { state: before.state, reason: before.reason ?? null, endedAt: before.endedAt };
  const head: RunHead = {
    runId,
    study: run.study,
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
  return {
    runId,
    state: head.state,
    counts: head.counts,
    estimatedUsd: head.cost.estimatedUsd,
    durationSeconds: (Date.parse(head.endedAt) - Date.parse(head.startedAt)) / 1000,
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
    for await (const { slideId, state: at, reason, bronze, results, requests } of state.slides(runId)) {
      const end: SlideEnd = {
        state: at,
        ...(reason && { reason }),
        ...(results && { results }),
        ...(bronze && { checksum: bronze.checksum }),
      };
      all.#ends.set(slideId, JSON.stringify(end));
      all.requests = addCounts(all.requests, requests);
    }
    return all;
  }

  of(slideId: string): SlideEnd | undefined {
    const end = this.#ends.get(slideId);
    return end === undefined ? undefined : (JSON.parse(end) as SlideEnd);
  }
}

interface Tally extends Pick<CountedRun, 'rows' | 'expected' | 'inferred'> {
  counts: Partial<Record<SlideState, number>>;
  /** The first of them, for the message. */
  problems: Problem[];
  /** How often each reason was given. */
  reasons: Map<string, { reason: Reason; count: number }>;
}

async function tallyOf(lines: AsyncIterable<PlannedSlide>, ends: SlideEnds): Promise<Tally> {
  const tally: Tally = { rows: 0, expected: 0, inferred: 0, counts: {}, problems: [], reasons: new Map() };
  for await (const planned of lines) {
    const row = slideRow(planned, ends.of(planned.slideId));
    tally.rows += 1;
    if (planned.state === 'EXPECTED') tally.expected += 1;
    if (row.results.length > 0) tally.inferred += 1;
    tally.counts[row.state] = (tally.counts[row.state] ?? 0) + 1;
    if (!isProblem(row)) continue;
    const known = row.reason && tally.reasons.get(row.reason.error);
    if (known) known.count += 1;
    if (known && tally.problems.length >= MAX_PROBLEMS) continue;
    const problem = withoutPatientData(row, planned.metadata);
    if (tally.problems.length < MAX_PROBLEMS) tally.problems.push(problem);
    if (problem.reason && !known)
      tally.reasons.set(problem.reason.error, { reason: problem.reason, count: 1 });
  }
  return tally;
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
  model,
  version,
  state,
  reason,
  instanceType,
  instanceCount,
  instanceSeconds,
}: JobItem): JobItem {
  return {
    jobName,
    model,
    version,
    state,
    ...(reason && { reason }),
    instanceType,
    instanceCount,
    instanceSeconds,
  };
}

// --- telling ----------------------------------------------------------------------------------------

/** Sends the message unless it is on record as sent. It goes out twice only if the record of it could not be written. */
async function announce(
  head: RunHead,
  problems: Problem[],
  { s3, sns, silver, topicArn, now }: PublishDependencies,
): Promise<void> {
  const record = { bucket: silver, key: messageKey(head.runId) };
  if (await readJson(s3, record)) return;
  const { subject, text } = runMessage(head, problems, {
    report: `s3://${silver}/${reportKey(head.runId)}`,
    results: `s3://${silver}/${resultsCsvKey(head.runId)}`,
    summary: `s3://${silver}/${runJsonKey(head.runId)}`,
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
