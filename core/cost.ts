/**
 * What a run cost, from what was counted: requests and instance seconds as they are on record, transitions and
 * invocations from the flow. Not in it: Lambda's running time, storage, logs, and retries of the state machine.
 */
import type { JobItem, RunCost } from './contracts.ts';
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
  /** Run job, Record job. */
  job: 2,
} as const;

/** Functions that every run invokes: claim-manifest, plan-run, plan-inference, publish-run. */
const INVOCATIONS_OF_A_RUN = 4;

export interface CountedRun {
  /** Lines of the plan, those of them that were to be ingested, and those that went into inference. */
  rows: number;
  expected: number;
  inferred: number;
  jobs: Pick<JobItem, 'instanceType' | 'instanceCount' | 'instanceSeconds'>[];
  /** Requests of all slides, by class. */
  requests: Record<string, number>;
}

export function transitionsOf({ rows, expected, jobs }: CountedRun): number {
  const ingestion =
    expected > 0 ? TRANSITIONS.ingestion + rows * TRANSITIONS.row + expected * TRANSITIONS.slide : 0;
  const inference = jobs.length > 0 ? TRANSITIONS.inference + jobs.length * TRANSITIONS.job : 0;
  return TRANSITIONS.run + ingestion + inference;
}

export function costOf(run: CountedRun, prices: Prices = PRICES): RunCost {
  const transitions = transitionsOf(run);
  const lambda = INVOCATIONS_OF_A_RUN + run.expected + run.inferred + run.jobs.length;
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
