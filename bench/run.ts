/**
 * Where a run's time goes: the demo on the local AWS from nothing, stage by stage, and what is not work on tiles as
 * a share of it all.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { GetObjectCommand, paginateListObjectsV2 } from '@aws-sdk/client-s3';
import { type HistoryEvent, paginateGetExecutionHistory } from '@aws-sdk/client-sfn';
import { demo } from '../cli/commands/demo.ts';
import { type Deployment, openForReading } from '../cli/deployment.ts';
import { Screen, UserError } from '../cli/terminal.ts';
import { listRuns } from '../cli/watch.ts';
import { type Completion, completionSchema } from '../core/contracts.ts';
import { slidesPrefix } from '../core/keys.ts';
import type { Bench, Context, Measured } from './bench.ts';

export const run: Bench = {
  name: 'run',
  about: "where a run's time goes on the local AWS: stages of the state machine, job start-up, tile work",
  measure,
};

async function measure({ quick, screen, signal }: Context): Promise<Measured> {
  const folder = await mkdtemp(join(tmpdir(), 'slideway-bench-'));
  const state = join(folder, 'state');
  const quiet = new Screen({ write: () => true }, { quiet: true });
  try {
    const size = quick ? '2048x2048' : '8192x6144';
    const options = { slides: quick ? 1 : 3, size, out: join(folder, 'out'), state, stage: 'dev' };
    const begun = performance.now();
    const code = await screen.task(`Running ${options.slides} slides of ${size}`, () =>
      demo(options, { screen: quiet, answer: quiet, width: 100 }, signal),
    );
    const seconds = (performance.now() - begun) / 1000;
    if (code !== 0) throw new UserError(`The run ended with exit code ${code}.`);
    const deployment = await openForReading(quiet, { folder: state, stage: 'dev' });
    if (!deployment) throw new UserError('The run left no state.');
    try {
      return await figuresOf(deployment, seconds);
    } finally {
      await deployment.close();
    }
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

async function figuresOf(deployment: Deployment, seconds: number): Promise<Measured> {
  const [item] = await listRuns(deployment);
  if (!item) throw new UserError('The run is not in the state table.');
  const stages = await stagesOf(deployment, item.executionArn);
  const markers = await markersOf(deployment, item.runId);
  const whole = stages.reduce((sum, { seconds }) => sum + seconds, 0);
  // The job, as its slides tell it: from its state's beginning to the first slide, then to the last one's end.
  const inference = stages.find(({ name }) => name === 'Run inference');
  const ends = markers.map(({ completedAt }) => Date.parse(completedAt));
  const starts = markers.map(
    ({ completedAt, timings }) => Date.parse(completedAt) - (timings.total ?? 0) * 1000,
  );
  const tileWork = (Math.max(...ends) - Math.min(...starts)) / 1000;
  const startUp = inference ? (Math.min(...starts) - inference.entered) / 1000 : 0;
  const tiles = markers.reduce((sum, { tiles }) => sum + (tiles?.kept ?? 0), 0);
  const busy: Record<string, number> = {};
  for (const { timings } of markers) {
    for (const [name, value] of Object.entries(timings)) {
      if (name !== 'total') busy[name] = (busy[name] ?? 0) + value;
    }
  }
  return {
    figures: {
      slides: markers.length,
      tiles,
      command_seconds: seconds,
      state_machine_seconds: whole,
      ...Object.fromEntries(stages.map(({ name, seconds }) => [`stage: ${name}`, seconds])),
      'job: start-up': startUp,
      'job: tile work': tileWork,
      'job: winding down': (inference?.seconds ?? 0) - startUp - tileWork,
      ...Object.fromEntries(Object.entries(busy).map(([name, value]) => [`slides: ${name}`, value])),
      tiles_per_second: tiles / tileWork,
    },
    ratios: {
      'tile work / state machine': tileWork / whole,
      'overhead: all but tile work / state machine': 1 - tileWork / whole,
      'overhead: all but tile work and job start-up / state machine': 1 - (tileWork + startUp) / whole,
    },
  };
}

interface Stage {
  name: string;
  /** Milliseconds since the epoch. */
  entered: number;
  seconds: number;
}

/** The states of the execution in order, those of its maps left out. */
async function stagesOf({ stepFunctions }: Deployment, executionArn: string): Promise<Stage[]> {
  const events: HistoryEvent[] = [];
  for await (const page of paginateGetExecutionHistory({ client: stepFunctions }, { executionArn })) {
    events.push(...(page.events ?? []));
  }
  const stages: Stage[] = [];
  let current: { name: string; entered: number } | undefined;
  for (const event of events) {
    const at = event.timestamp?.getTime() ?? 0;
    const entered = event.stateEnteredEventDetails?.name;
    if (entered !== undefined && current === undefined) current = { name: entered, entered: at };
    if (current && event.stateExitedEventDetails?.name === current.name) {
      // Choices take no time.
      if (at > current.entered) stages.push({ ...current, seconds: (at - current.entered) / 1000 });
      current = undefined;
    }
  }
  return stages;
}

/** The completion markers of the run's slides. */
async function markersOf({ s3, outputs }: Deployment, runId: string): Promise<Completion[]> {
  const Bucket = outputs.SilverBucket;
  const markers: Completion[] = [];
  for await (const page of paginateListObjectsV2({ client: s3 }, { Bucket, Prefix: slidesPrefix(runId) })) {
    for (const { Key } of page.Contents ?? []) {
      if (!Key?.endsWith('/complete.json')) continue;
      const { Body } = await s3.send(new GetObjectCommand({ Bucket, Key }));
      markers.push(completionSchema.parse(JSON.parse((await Body?.transformToString()) ?? '')));
    }
  }
  return markers;
}
