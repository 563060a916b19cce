/**
 * `slideway replay`: runs again what did not succeed, or a finished cohort with another model, from the project's own
 * records: the lines of the run's plan and what the state table says became of them. It is a run of its own that names
 * the one it follows; slides that are in Bronze are not copied again.
 */
import { ListObjectsV2Command } from '@aws-sdk/client-s3';
import { DescribeExecutionCommand, StartExecutionCommand } from '@aws-sdk/client-sfn';
import type { PlannedSlide, RunItem, SlideItem } from '../../core/contracts.ts';
import { FollowUpTaken } from '../../core/errors.ts';
import {
  canFollow,
  didNotSucceed,
  type FollowUpInput,
  followUpManifest,
  writeFollowUp,
} from '../../core/follow-up.ts';
import { followUpKey } from '../../core/keys.ts';
import { type Deployment, openDeployment, type Place, placeOf } from '../deployment.ts';
import { modelFor } from '../models.ts';
import { EXIT, plural, UserError, usageError } from '../terminal.ts';
import { listRuns, readPlanned } from '../watch.ts';
import { farewell, finish, follow, type Streams, whenStarted } from './run.ts';
import { pick } from './show.ts';

export interface ReplayOptions extends Place {
  failed?: boolean;
  slide?: string;
  model?: string;
  out?: string;
  json?: boolean;
}

/** A line of the plan, what became of it, and whether it is part of the replay. */
export type Choice = Pick<ReplayOptions, 'failed' | 'slide' | 'model'>;

/** Replays the run that `id` means; answers the exit code of the new run. */
export async function replay(
  id: string,
  options: ReplayOptions,
  streams: Streams,
  signal: AbortSignal,
): Promise<number> {
  const { screen } = streams;
  const deployment = await openDeployment(screen, placeOf(options));
  let runId: string | undefined;
  try {
    const first = pick(await listRuns(deployment), id);
    await assertEnded(deployment, first);
    const lines = await chosenLines(deployment, first, options);
    const model =
      options.model === undefined
        ? undefined
        : await modelFor(deployment.s3, deployment.outputs.ModelsBucket, options.model);
    const input = await nextReplay(deployment, first.runId, followUpManifest(lines, model));
    screen.print(
      `Replaying ${plural(lines.length, 'slide')} of ${first.runId}${model ? ` with ${model}` : ''}.`,
    );
    const { executionArn } = await deployment.stepFunctions.send(
      new StartExecutionCommand({
        stateMachineArn: deployment.outputs.StateMachineArn,
        input: JSON.stringify(input),
      }),
    );
    const run = await whenStarted(deployment, (item) => item.executionArn === executionArn, signal);
    runId = run.runId;
    const ended = await follow(deployment, runId, screen, signal);
    return await finish(deployment, ended, true, options, streams, signal);
  } catch (error) {
    if (!signal.aborted) throw error;
    screen.clear();
    screen.print(farewell(deployment, runId));
    return EXIT.interrupted;
  } finally {
    await deployment.close();
  }
}

/** A run under way is not replayed; one whose execution has ended without an end of its own is. */
async function assertEnded({ stepFunctions }: Deployment, run: RunItem): Promise<void> {
  if (run.state !== 'RUNNING') return;
  const { status } = await stepFunctions.send(
    new DescribeExecutionCommand({ executionArn: run.executionArn }),
  );
  if (status === 'RUNNING') {
    throw usageError(`The run ${run.runId} is under way. Replay what is left of it when it has ended.`);
  }
}

async function chosenLines(deployment: Deployment, run: RunItem, choice: Choice): Promise<PlannedSlide[]> {
  const planned = await readPlanned(deployment, run.runId);
  if (planned.length === 0) {
    throw usageError(
      `The run ${run.runId} was never planned${run.reason ? ` (${run.reason.message})` : ''}. Correct its manifest and drop that again.`,
    );
  }
  const items = new Map<string, SlideItem>();
  for await (const item of deployment.state.slides(run.runId)) items.set(item.slideId, item);
  const lines = choose(planned, items, choice);
  if (lines.length > 0) return lines;
  if (choice.slide !== undefined) {
    throw usageError(`The run ${run.runId} has no slide ${choice.slide} that can be done again.`);
  }
  if (choice.model !== undefined && !choice.failed) {
    throw usageError(`The run ${run.runId} has taken no slide in that another model could be run over.`);
  }
  throw usageError(
    `The run ${run.runId} has nothing to replay: every slide has its results, or its row must be corrected in the manifest.`,
  );
}

/**
 * The lines that are to be done again: one slide's; or with another model those that are in Bronze; else those that
 * did not come to their results.
 */
export function choose(
  planned: readonly PlannedSlide[],
  items: ReadonlyMap<string, SlideItem>,
  { failed, slide, model }: Choice,
): PlannedSlide[] {
  return planned.filter((line) => {
    const item = items.get(line.slideId);
    if (!canFollow(line)) return false;
    if (slide !== undefined) return line.slideId === slide;
    if (model !== undefined && !failed) return (item?.bronze ?? line.bronze) !== undefined;
    return didNotSucceed(line, item);
  });
}

/** Writes the manifest under the next free number. */
async function nextReplay({ s3, outputs }: Deployment, of: string, manifest: string): Promise<FollowUpInput> {
  const Prefix = followUpKey(of, 'replay', '').replace(/\/repo\.csv$/, '');
  const { KeyCount = 0 } = await s3.send(new ListObjectsV2Command({ Bucket: outputs.SilverBucket, Prefix }));
  for (let number = KeyCount + 1; number < KeyCount + 100; number++) {
    try {
      const id = String(number).padStart(4, '0');
      return await writeFollowUp(s3, outputs.SilverBucket, { kind: 'replay', of, id, manifest });
    } catch (error) {
      // Somebody else replays the same run just now.
      if (!(error instanceof FollowUpTaken)) throw error;
    }
  }
  throw new UserError(`${of} is replayed by many at once; try again later.`);
}
