/** `slideway trace`: the chain from a result back to Landing, as the record has it. */
import type { LineageItem, LineageObject } from '../../core/lineage.ts';
import { LineageReader } from '../../core/record.ts';
import { findTarget, type Target, type Trace, type TracePath, trace } from '../../core/trace.ts';
import type { Deployment } from '../deployment.ts';
import { EXIT, type Paint, UserError, usageError } from '../terminal.ts';
import { listRuns } from '../watch.ts';
import type { Streams } from './run.ts';
import { pick, reading, type ShowOptions } from './show.ts';

/** Objects that an event lists before the rest is left to `--json`. */
const MAX_OBJECTS = 20;

/** What each action is, to somebody who has not read the code. */
const IN_WORDS: Record<string, string> = {
  RUN_CLAIMED: 'Manifest taken for a run',
  RUN_PLANNED: 'Manifest read, run planned',
  RUN_FOLLOWED: 'Followed by another run',
  SLIDE_INGESTED: 'Slide taken into Bronze',
  SLIDE_QUARANTINED: 'Slide set aside for a person',
  SLIDE_FAILED: 'Slide failed',
  INFERENCE_PLANNED: 'Slides dealt to jobs',
  JOB_SUCCEEDED: 'Inference job succeeded',
  JOB_FAILED: 'Inference job failed',
  SLIDE_INFERRED: 'Tiles predicted',
  SLIDE_AGGREGATED: 'Result and heatmap made',
  RUN_SUCCEEDED: 'Run published: succeeded',
  RUN_PARTIAL: 'Run published: partial',
  RUN_FAILED: 'Run published: failed',
  OVERLAYS_PUSHED: 'Heatmaps put into the catalogue',
};

export const traceCommand = (text: string, options: ShowOptions, streams: Streams): Promise<number> =>
  reading(options, streams, async (deployment) => {
    if (!deployment) throw new UserError('Nothing has run yet, so nothing is on record.');
    const record = readerOf(deployment);
    const found = await trace(await targetOf(text, deployment), record);
    const { answer } = streams;
    if (options.json) answer.print(JSON.stringify(found, null, 2));
    else for (const line of describeTrace(found, answer.paint)) answer.print(line);
    return found.paths.every(({ missing }) => missing.length === 0) ? EXIT.succeeded : EXIT.partial;
  });

export const readerOf = ({ documents, outputs }: Deployment): LineageReader =>
  new LineageReader(documents, outputs.LineageTable);

/** What a key, a slide's id, or a run's id or the beginning of one means. */
export async function targetOf(text: string, deployment: Deployment): Promise<Target> {
  const target = await findTarget(text, readerOf(deployment));
  if (target) return target;
  const runs = (await listRuns(deployment)).filter(({ runId }) => runId.startsWith(text));
  if (runs.length === 0) {
    throw usageError(
      `The record knows no slide, run or key \`${text}\`. \`slideway runs\` lists the runs, \`slideway show <run>\` its slides.`,
    );
  }
  return { kind: 'run', runId: pick(runs, text).runId };
}

export function describeTrace({ target, object, paths }: Trace, paint: Paint): string[] {
  const head =
    target.kind === 'object'
      ? target.key
      : target.kind === 'slide'
        ? `Slide ${target.slideId}`
        : target.runId;
  return [
    paint('bold', head),
    ...(object ? [`  on record as ${nameOf(object)}`, `  ${versionOf(object)}`] : []),
    ...paths.flatMap((path) => ['', ...describePath(path, paint)]),
  ];
}

function describePath({ runId, slideId, model, steps, missing }: TracePath, paint: Paint): string[] {
  const what = [slideId && `slide ${slideId}`, model && `model ${model}`, `run ${runId}`].filter(Boolean);
  return [
    paint('bold', what.join(', ')),
    ...steps.flatMap((step) => ['', ...describeStep(step, paint)]),
    '',
    ...(missing.length === 0
      ? [paint('green', 'Whole: every link back to Landing is on record.')]
      : missing.map((text) => paint('red', `Not whole: ${text}.`))),
    ...(slideId === undefined ? [paint('dim', 'slideway trace <slide> shows a slide of it.')] : []),
  ];
}

function describeStep(step: LineageItem, paint: Paint): string[] {
  const line = (label: string, text: string) => `  ${paint('dim', label.padEnd(8))} ${text}`;
  const objects = (label: string, list: LineageObject[] = []) => [
    ...list
      .slice(0, MAX_OBJECTS)
      .flatMap((object) => [line(label, nameOf(object)), line('', versionOf(object))]),
    ...(list.length > MAX_OBJECTS
      ? [line('', `… and ${list.length - MAX_OBJECTS} more; --json has all`)]
      : []),
  ];
  return [
    `${paint('cyan', '▸')} ${paint('bold', IN_WORDS[step.action] ?? step.action)}  ${paint('dim', step.action)}`,
    line('when', step.time),
    line('who', `${step.actor}, code version ${step.codeVersion}`),
    ...(step.reason ? [line('why', step.reason)] : []),
    ...objects('from', step.inputs),
    ...objects('made', step.outputs),
    ...Object.entries(step.parameters ?? {}).map(([name, value], index) =>
      line(
        index === 0 ? 'with' : '',
        `${name} = ${typeof value === 'string' ? value : JSON.stringify(value)}`,
      ),
    ),
    line('event', `${step.pk} ${step.sk}  ${step.hash}`),
  ];
}

const nameOf = ({ bucket, key }: LineageObject) => `s3://${bucket}/${key}`;
const versionOf = ({ versionId, checksum }: LineageObject) =>
  [versionId && `version ${versionId}`, checksum].filter(Boolean).join('  ');
