/**
 * What a run cost, from what was counted: requests and instance seconds as they are on record, transitions and
 * invocations from the flow. Not in it: Lambda's running time, storage, logs, and retries of the state machine.
 */
import type { JobItem, JobKind, RunCost } from './contracts.ts';
import { addCounts } from './metering.ts';
import { PRICES, type Prices } from './prices.ts';

/** States that slide-run.asl.yml enters, where nothing is retried. Express children are not billed by state. */
export const TRANSITIONS = {
  /** Claim manifest, Is the run ours?, Plan run, Is there anything to do?, Publish run, How did it end?, its end. */
  run: 7,
  /** Ingest slides, Plan inference, Is there anything to infer?. */
  ingestion: 3,
  /** Is it to be ingested?, then Ingest slide or Nothing to ingest; for every line of the plan. */
  row: 2,
  /** Is it all copied?, Slide decided; for every slide that was to be ingested. Hand-overs come on top. */
  slide: 2,
  /** Run inference, Aggregate slides. */
  inference: 2,
  /** Which job?, Run job, Record job, What comes next?, Job ended; for a model in processing mode. */
  process: 5,
  /** Which job?, Tile slides, Record job, What comes next?, Begin scoring, Plan transform, Are packs to be scored? */
  tile: 7,
  /** Run transform job, Record job, What comes next?, Score again, Plan transform, Are packs to be scored? */
  transform: 6,
  /** Begin joining, Join predictions, Record job, What comes next?. */
  join: 4,
  /** Create model, Delete model; for every model that had a Transform job. */
  model: 2,
  /** Is anything to be joined?, Job ended; for every model in transform mode. */
  joining: 2,
  /** Why did the job fail? */
  failed: 1,
} as const;

/** Functions that every run invokes: claim-manifest, plan-run, plan-inference, publish-run. */
const INVOCATIONS_OF_A_RUN = 4;

export interface CountedRun {
  /** Lines of the plan, those of them that were to be ingested, and those that went into inference. */
  rows: number;
  expected: number;
  inferred: number;
  jobs: Pick<JobItem, 'kind' | 'model' | 'state' | 'instanceType' | 'instanceCount' | 'instanceSeconds'>[];
  /** Requests of all slides, by class. */
  requests: Record<string, number>;
}

export function transitionsOf({ rows, expected, jobs }: CountedRun): number {
  const ingestion =
    expected > 0 ? TRANSITIONS.ingestion + rows * TRANSITIONS.row + expected * TRANSITIONS.slide : 0;
  let inference = jobs.length > 0 ? TRANSITIONS.inference : 0;
  for (const { kind = 'process', state } of jobs)
    inference += TRANSITIONS[kind] + (state === 'FAILED' ? TRANSITIONS.failed : 0);
  const modelsOf = (wanted: JobKind) =>
    new Set(jobs.filter(({ kind }) => kind === wanted).map(({ model }) => model)).size;
  inference += modelsOf('transform') * TRANSITIONS.model + modelsOf('tile') * TRANSITIONS.joining;
  return TRANSITIONS.run + ingestion + inference;
}

/** record-job once a job, and plan-transform before the first Transform job and after each. */
const invocationsOf = (jobs: CountedRun['jobs']): number =>
  jobs.length + jobs.filter(({ kind }) => kind === 'tile' || kind === 'transform').length;

export function costOf(run: CountedRun, prices: Prices = PRICES): RunCost {
  const transitions = transitionsOf(run);
  const lambda = INVOCATIONS_OF_A_RUN + run.expected + run.inferred + invocationsOf(run.jobs);
  const requests = addCounts(run.requests, { lambda });

  let usd = transitions * prices.transition;
  for (const [name, count] of Object.entries(requests)) usd += count * (prices.requests[name] ?? 0);
  let instanceSeconds = 0;
  const unpriced = new Set<string>();
  for (const job of run.jobs) {
    instanceSeconds += job.instanceSeconds;
    const hour = prices.instanceHour[job.instanceType];
    if (hour === undefined) unpriced.add(job.instanceType);
    else usd += (job.instanceSeconds / 3600) * hour;
  }
  return {
    requests: Object.fromEntries(Object.entries(requests).sort(([a], [b]) => (a < b ? -1 : 1))),
    transitions,
    instanceSeconds,
    estimatedUsd: Number(usd.toFixed(6)),
    prices: prices.date,
    unpriced: [...unpriced].sort(),
  };
}
