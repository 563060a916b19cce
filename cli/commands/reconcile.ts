/** `slideway reconcile`: whether everything of a study is where it ought to be. */
import { ListObjectsV2Command } from '@aws-sdk/client-s3';
import type { RunItem } from '../../core/contracts.ts';
import { type Reconciled, reconcile, STATUSES, type Status } from '../../core/reconcile.ts';
import { sourcesOf } from '../../core/study.ts';
import type { Deployment } from '../deployment.ts';
import { EXIT, plural, UserError, usageError } from '../terminal.ts';
import { listRuns } from '../watch.ts';
import type { Streams } from './run.ts';
import { reading, type ShowOptions } from './show.ts';

export interface ReconcileOptions extends ShowOptions {
  /** Hours after which a slide that has not moved is stuck. */
  stuckAfter: number;
}

const STYLES = {
  'in order': 'green',
  missing: 'yellow',
  extra: 'yellow',
  changed: 'red',
  stuck: 'yellow',
} as const satisfies Record<Status, string>;

export const reconcileCommand = (
  study: string,
  options: ReconcileOptions,
  streams: Streams,
  signal: AbortSignal,
): Promise<number> =>
  reading(options, streams, async (deployment) => {
    if (!deployment) throw new UserError('Nothing has run yet.');
    const { screen, answer } = streams;
    const { LandingBucket, BronzeBucket, SilverBucket } = deployment.outputs;
    const runs = await listRuns(deployment);
    if (!runs.some((run) => run.study === study)) await refuseUnknown(study, runs, deployment);
    const sources = sourcesOf(study, runs, {
      ...deployment,
      landingBucket: LandingBucket,
      bronzeBucket: BronzeBucket,
      silverBucket: SilverBucket,
    });
    const counts = Object.fromEntries(STATUSES.map((status) => [status, 0])) as Record<Status, number>;
    let seen = 0;
    await screen.task(`Reconciling ${study}`, async (at) => {
      const found = reconcile(sources, {
        now: new Date(),
        stuckAfterMs: options.stuckAfter * 3600 * 1000,
        signal,
      });
      // Said as it is found: a study may be larger than what can be held.
      if (options.json) answer.print(`{ "study": ${JSON.stringify(study)}, "findings": [`);
      for await (const each of found) {
        counts[each.status] += 1;
        if (options.json) answer.print(`${seen > 0 ? ',' : ''}${JSON.stringify(each)}`);
        else if (each.status !== 'in order') {
          screen.clear();
          answer.print(`${answer.paint(STYLES[each.status], each.status.padEnd(8))}  ${describe(each)}`);
        }
        seen += 1;
        if (seen % 1000 === 0) at(plural(seen, 'finding'));
      }
      if (options.json) answer.print(`], "counts": ${JSON.stringify(counts)} }`);
    });
    if (!options.json) {
      answer.print(STATUSES.map((status) => `${counts[status].toLocaleString('en')} ${status}`).join(', '));
    }
    return counts['in order'] === seen ? EXIT.succeeded : EXIT.partial;
  });

/** A study without a run is one only where it has files in Landing. */
async function refuseUnknown(study: string, runs: RunItem[], { s3, outputs }: Deployment): Promise<void> {
  const { KeyCount } = await s3.send(
    new ListObjectsV2Command({ Bucket: outputs.LandingBucket, Prefix: `${study}/`, MaxKeys: 1 }),
  );
  if (KeyCount !== 0) return;
  const known = [...new Set(runs.map((run) => run.study))].slice(0, 20).join(', ');
  throw usageError(`There is no study ${study}.${known ? ` There are: ${known}.` : ''}`);
}

function describe({ slideId, slide, runId, object, notes }: Reconciled): string {
  const what =
    slideId === undefined ? object : slide && slide !== slideId ? `${slideId} (${slide})` : slideId;
  return `${what}: ${notes.join(' ')}${slideId !== undefined && runId ? ` [${runId}]` : ''}`;
}
