/**
 * From a result back to Landing: the events that made it, the newest first, each with who, when, what from, what
 * came of it, and under which parameters. What the record does not hold is said, not passed over.
 */
import { runPrefix } from './keys.ts';
import { type LineageItem, type LineageObject, lineagePk } from './lineage.ts';
import type { LineageReader } from './record.ts';

/** What a person asks after. */
export type Target =
  | { kind: 'object'; key: string; runId: string; slideId?: string; model?: string }
  | { kind: 'slide'; slideId: string }
  | { kind: 'run'; runId: string };

/** One way from a result to Landing. */
export interface TracePath {
  runId: string;
  slideId?: string;
  model?: string;
  /** The newest first. */
  steps: LineageItem[];
  /** Links that the record does not hold, in words; none when the path is whole. */
  missing: string[];
}

export interface Trace {
  target: Target;
  /** The object that was asked after, as it is on record; the last time it was written. */
  object?: LineageObject;
  paths: TracePath[];
}

/** What the text means; undefined when neither record nor form tell. Keys may be given with `s3://<bucket>/`. */
export async function findTarget(text: string, record: LineageReader): Promise<Target | undefined> {
  const key = text.replace(/^s3:\/\/[^/]+\//, '');
  const [, runId, slideId, model] = /^runs\/([^/]+)\/(?:slides\/([^/]+)\/([^/]+)\/)?[^/]/.exec(key) ?? [];
  if (runId) return { kind: 'object', key, runId, ...(slideId && model && { slideId, model }) };
  const has = async (pk: string) => (await record.chain(pk)).events.length > 0;
  if (await has(lineagePk({ slideId: text }))) return { kind: 'slide', slideId: text };
  if (await has(lineagePk({ runId: text }))) return { kind: 'run', runId: text };
  return undefined;
}

/** Keys of the chains that a target's verification covers, without the slides of a run. */
export async function chainsOf(target: Target, record: LineageReader): Promise<string[]> {
  if (target.kind !== 'slide') {
    const slide = 'slideId' in target && target.slideId !== undefined ? [{ slideId: target.slideId }] : [];
    return [...slide, { runId: target.runId }].map(lineagePk);
  }
  const pk = lineagePk(target);
  const { events } = await record.chain(pk);
  return [pk, ...new Set(events.map(({ runId }) => lineagePk({ runId })))];
}

export async function trace(target: Target, record: LineageReader): Promise<Trace> {
  const run = async (runId: string) => (await record.chain(lineagePk({ runId }))).events;
  if (target.kind === 'run') {
    return { target, paths: [runPath(target.runId, await run(target.runId))] };
  }
  if (target.kind === 'slide') {
    const { events } = await record.chain(lineagePk(target));
    const paths: TracePath[] = [];
    for (const { runId, model } of resultsOf(events).reverse()) {
      paths.push(slidePath({ runId, slideId: target.slideId, model }, events, await run(runId)));
    }
    return { target, paths };
  }
  const { key, runId, slideId, model } = target;
  const ofRun = await run(runId);
  const ofSlide = slideId === undefined ? [] : (await record.chain(lineagePk({ slideId }))).events;
  const whole =
    slideId === undefined ? runPath(runId, ofRun) : slidePath({ runId, slideId, model }, ofSlide, ofRun);
  const maker = whole.steps.find(({ outputs }) => outputs?.some((output) => output.key === key));
  const object = maker?.outputs?.find((output) => output.key === key);
  if (!maker || !object) {
    return { target, paths: [{ ...whole, missing: [...whole.missing, `${key} itself is not on record`] }] };
  }
  // What came after it did not make it.
  const steps = whole.steps.slice(whole.steps.indexOf(maker));
  return { target, object, paths: [{ ...whole, steps }] };
}

/** Runs and models of which a slide's chain tells, in its order. */
function resultsOf(events: LineageItem[]): { runId: string; model: string | undefined }[] {
  const found = new Map<string, { runId: string; model: string | undefined }>();
  const inferred = events.filter(({ action }) => action === 'SLIDE_INFERRED');
  for (const event of inferred) {
    const model = modelOf(event);
    found.set(`${event.runId} ${model}`, { runId: event.runId, model });
  }
  for (const { runId } of events) {
    if (!inferred.some((event) => event.runId === runId)) found.set(runId, { runId, model: undefined });
  }
  return [...found.values()];
}

const modelOf = ({ parameters }: LineageItem): string | undefined =>
  typeof parameters?.model === 'string' ? parameters.model : undefined;

function runPath(runId: string, events: LineageItem[]): TracePath {
  const missing: string[] = [];
  if (events.length === 0) missing.push(`the run ${runId} is not on record`);
  else if (!events.some(({ action }) => action === 'RUN_CLAIMED'))
    missing.push('no event claims the manifest');
  return { runId, steps: newestFirst(events), missing };
}

function slidePath(
  { runId, slideId, model }: { runId: string; slideId: string; model?: string | undefined },
  ofSlide: LineageItem[],
  ofRun: LineageItem[],
): TracePath {
  const own = ofSlide.filter(
    (event) => event.runId === runId && (event.action !== 'SLIDE_INFERRED' || modelOf(event) === model),
  );
  const missing = runPath(runId, ofRun).missing;
  const inferred = own.findLast(({ action }) => action === 'SLIDE_INFERRED');
  const job = inferred?.parameters?.jobName;
  const steps = [
    ...own,
    ...ofRun.filter(({ action, parameters }) => !action.startsWith('JOB_') || parameters?.jobName === job),
  ];
  if (model !== undefined && !inferred) missing.push(`no event tells of ${model} reading the slide`);
  if (inferred && !steps.some(({ action }) => action.startsWith('JOB_'))) {
    missing.push(`the end of the job ${job} is not on record`);
  }
  const ingested = own.findLast(({ action }) => action === 'SLIDE_INGESTED');
  for (const source of inferred ? bronzeOf(inferred) : (ingested?.outputs ?? [])) {
    // An earlier run may have taken the bytes in; its event is the one that leads to Landing.
    const maker = ofSlide.find((event) => makes(event, source));
    if (maker && !steps.includes(maker)) steps.push(maker);
    if (!maker || maker.inputs?.length === 0 || maker.inputs?.some((input) => isSame(input, source))) {
      missing.push(`no event tells how ${source.key} came into Bronze`);
    }
  }
  if (own.length === 0) missing.push(`the record of the slide ${slideId} does not speak of the run ${runId}`);
  return { runId, slideId, ...(model && { model }), steps: newestFirst(steps), missing };
}

/** What was read of the slide: everything but the model package and what lies in the run's own folder. */
const bronzeOf = (inferred: LineageItem): LineageObject[] =>
  (inferred.inputs ?? []).filter(
    ({ key }) => !key.startsWith('models/') && !key.startsWith(runPrefix(inferred.runId)),
  );

const isSame = (a: LineageObject, b: LineageObject): boolean =>
  a.bucket === b.bucket && a.key === b.key && a.versionId === b.versionId;

const makes = ({ outputs }: LineageItem, object: LineageObject): boolean =>
  outputs?.some((output) => isSame(output, object)) ?? false;

/** By time; events of one chain keep their order where the clock did not move. */
const newestFirst = (events: LineageItem[]): LineageItem[] =>
  [...events].sort((a, b) =>
    a.time === b.time ? (a.pk === b.pk && a.sk < b.sk ? 1 : -1) : a.time < b.time ? 1 : -1,
  );
