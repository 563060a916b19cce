/**
 * What is known of a run while it goes on, from AWS's own interfaces: slides from the state table, the stage from the
 * execution's history, tiles from the jobs' logs.
 */
import {
  DescribeLogStreamsCommand,
  GetLogEventsCommand,
  ResourceNotFoundException,
} from '@aws-sdk/client-cloudwatch-logs';
import { DescribeExecutionCommand, GetExecutionHistoryCommand, type HistoryEvent } from '@aws-sdk/client-sfn';
import { paginateQuery } from '@aws-sdk/lib-dynamodb';
import { z } from 'zod';
import type { Plan, PlannedSlide, Reason, RunItem, SlideItem, SlideState } from '../core/contracts.ts';
import { planKey, slidesKey } from '../core/keys.ts';
import { readJson, readLines } from '../core/store.ts';
import type { Deployment } from './deployment.ts';

const LOG_GROUP = '/aws/sagemaker/ProcessingJobs';

/** Tiles of a slide, over all its models. */
export interface Tiles {
  done: number;
  total: number;
  perSecond: number;
}

export interface SlideView {
  slideId: string;
  slide: string;
  state: SlideState;
  reason?: Reason | undefined;
  bytes?: number | undefined;
  tiles?: Tiles | undefined;
  /** Every model has read the slide, or given it up. */
  analysed: boolean;
}

export interface RunView {
  run: RunItem;
  stage: Stage;
  /** In the order of the manifest; empty until the run is planned. */
  slides: SlideView[];
  /** The execution has ended. */
  ended: boolean;
}

export const STAGES = ['plan', 'copy', 'analyse', 'aggregate', 'publish'] as const;
export type Stage = (typeof STAGES)[number];

/** Stages by the state of the state machine that begins them; states between belong to the stage before. */
const STAGE_OF: Record<string, Stage> = {
  'Claim manifest': 'plan',
  'Plan run': 'plan',
  'Ingest slides': 'copy',
  'Plan inference': 'analyse',
  'Run inference': 'analyse',
  'Aggregate slides': 'aggregate',
  'Publish run': 'publish',
  'Publish failed run': 'publish',
};

const progressSchema = z.object({
  event: z.enum([
    'slide-started',
    'slide-progress',
    'slide-complete',
    'slide-skipped',
    'slide-quarantined',
    'slide-failed',
  ]),
  slideId: z.string(),
  model: z.string().default(''),
  tilesDone: z.number().optional(),
  tilesTotal: z.number().optional(),
  tilesPerSecond: z.number().optional(),
});
type ProgressEvent = z.infer<typeof progressSchema>;

const DONE: ReadonlySet<string> = new Set(['slide-complete', 'slide-skipped']);
const ENDS: ReadonlySet<string> = new Set(['slide-quarantined', 'slide-failed']);

/** Progress of the slides, kept up to date from log lines. */
export class TileProgress {
  /** By slide, then by model. */
  readonly #slides = new Map<string, Map<string, { tiles: Tiles; ended: boolean }>>();

  /**
   * Takes a log line; lines that are no progress are passed over. `tiling`: of a job that only cuts the tiles, so that
   * a slide which it has done well is not done.
   */
  add(line: string, tiling = false): void {
    const event = parseEvent(line);
    if (!event) return;
    const { slideId, model, tilesDone, tilesTotal, tilesPerSecond } = event;
    const models = this.#slides.get(slideId) ?? new Map<string, { tiles: Tiles; ended: boolean }>();
    this.#slides.set(slideId, models);
    const before = models.get(model)?.tiles ?? { done: 0, total: 0, perSecond: 0 };
    const ended = ENDS.has(event.event) || (!tiling && DONE.has(event.event));
    models.set(model, {
      tiles: {
        done: tilesDone ?? before.done,
        total: tilesTotal ?? before.total,
        perSecond: ended ? 0 : (tilesPerSecond ?? before.perSecond),
      },
      ended,
    });
  }

  tiles(slideId: string): Tiles | undefined {
    const models = this.#slides.get(slideId);
    if (!models) return undefined;
    const sum = { done: 0, total: 0, perSecond: 0 };
    for (const { tiles } of models.values()) {
      sum.done += tiles.done;
      sum.total += tiles.total;
      sum.perSecond += tiles.perSecond;
    }
    return sum;
  }

  /** Whether `models` models have ended with the slide. */
  analysed(slideId: string, models: number): boolean {
    const known = [...(this.#slides.get(slideId)?.values() ?? [])];
    return known.filter(({ ended }) => ended).length >= models;
  }
}

function parseEvent(line: string): ProgressEvent | undefined {
  if (!line.startsWith('{')) return undefined;
  try {
    return progressSchema.safeParse(JSON.parse(line)).data;
  } catch {
    return undefined;
  }
}

/** The stage and the names of the jobs, from the events of an execution, newest first. */
export function readHistory(events: HistoryEvent[]): { stage: Stage; jobs: string[] } {
  let stage: Stage | undefined;
  let jobs: string[] = [];
  for (const { stateEnteredEventDetails: entered, stateExitedEventDetails: exited } of events) {
    if (entered?.name) stage ??= STAGE_OF[entered.name];
    if (exited?.name === 'Plan inference' && exited.output) {
      const planned = plannedJobsSchema.safeParse(JSON.parse(exited.output));
      jobs = planned.data?.inference.jobs.map(({ jobName }) => jobName) ?? [];
    }
  }
  return { stage: stage ?? 'plan', jobs };
}

const plannedJobsSchema = z.object({
  inference: z.object({ jobs: z.array(z.object({ jobName: z.string() })) }),
});

export class RunWatch {
  readonly #deployment: Deployment;
  readonly #runId: string;
  readonly #progress = new TileProgress();
  /** Position in each log stream. */
  readonly #positions = new Map<string, string | undefined>();
  #planned: PlannedSlide[] = [];

  constructor(deployment: Deployment, runId: string) {
    this.#deployment = deployment;
    this.#runId = runId;
  }

  /** The run as it is now; `undefined` when there is none. */
  async look(): Promise<RunView | undefined> {
    const { state, stepFunctions } = this.#deployment;
    const run = await state.run(this.#runId);
    if (!run) return undefined;
    const items = new Map<string, SlideItem>();
    for await (const item of state.slides(this.#runId)) items.set(item.slideId, item);
    if (this.#planned.length === 0) this.#planned = await readPlanned(this.#deployment, this.#runId);
    const executionArn = run.executionArn;
    const execution = await stepFunctions.send(new DescribeExecutionCommand({ executionArn }));
    const { events = [] } = await stepFunctions.send(
      new GetExecutionHistoryCommand({ executionArn, reverseOrder: true, maxResults: 1000 }),
    );
    const { stage, jobs } = readHistory(events);
    for (const job of jobs) await this.#readLogs(job);
    return {
      run,
      stage,
      slides: this.#planned.map((planned) => this.#slide(planned, items)),
      ended: execution.status !== 'RUNNING',
    };
  }

  #slide(planned: PlannedSlide, items: Map<string, SlideItem>): SlideView {
    const { slideId, slide, models } = planned;
    // A line that the plan has decided keeps to that, whatever another line of the same slide does.
    const item = planned.state === 'EXPECTED' ? items.get(slideId) : undefined;
    return {
      slideId,
      slide,
      state: item?.state ?? planned.state,
      reason: item?.reason ?? planned.reason,
      bytes: planned.source?.size ?? planned.bronze?.size,
      tiles: this.#progress.tiles(slideId),
      analysed: models.length > 0 && this.#progress.analysed(slideId, models.length),
    };
  }

  async #readLogs(job: string): Promise<void> {
    const { logs } = this.#deployment;
    const named = { logGroupName: LOG_GROUP };
    try {
      const { logStreams = [] } = await logs.send(
        new DescribeLogStreamsCommand({ ...named, logStreamNamePrefix: job }),
      );
      for (const { logStreamName: name = '' } of logStreams) {
        for (;;) {
          const token = this.#positions.get(name);
          const { events = [], nextForwardToken } = await logs.send(
            new GetLogEventsCommand({
              ...named,
              logStreamName: name,
              startFromHead: true,
              ...(token !== undefined && { nextToken: token }),
            }),
          );
          const tiling = name.startsWith(`${job}-tile-`);
          for (const { message = '' } of events) this.#progress.add(message, tiling);
          this.#positions.set(name, nextForwardToken);
          if (events.length === 0 || nextForwardToken === token) break;
        }
      }
    } catch (error) {
      // No job has written a line yet.
      if (!(error instanceof ResourceNotFoundException)) throw error;
    }
  }
}

/** The plan's lines; empty until there are any. */
export async function readPlanned({ s3, outputs }: Deployment, runId: string): Promise<PlannedSlide[]> {
  const lines: PlannedSlide[] = [];
  for await (const line of readLines<PlannedSlide>(s3, {
    bucket: outputs.SilverBucket,
    key: slidesKey(runId),
  })) {
    lines.push(line);
  }
  return lines;
}

/** The head of the plan; `undefined` for a run that was never planned. */
export const readPlan = async ({ s3, outputs }: Deployment, runId: string): Promise<Plan | undefined> =>
  (await readJson(s3, { bucket: outputs.SilverBucket, key: planKey(runId) })) as Plan | undefined;

/** Every run, the newest first. */
export async function listRuns({ documents, outputs }: Deployment): Promise<RunItem[]> {
  const runs: RunItem[] = [];
  const pages = paginateQuery(
    { client: documents },
    {
      TableName: outputs.StateTable,
      IndexName: 'runs',
      KeyConditionExpression: 'runs = :runs',
      ExpressionAttributeValues: { ':runs': 'RUNS' },
      ScanIndexForward: false,
    },
  );
  for await (const page of pages) runs.push(...((page.Items ?? []) as RunItem[]));
  return runs;
}
