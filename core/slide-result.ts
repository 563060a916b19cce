/**
 * What one slide came to: for each of its models the container's marker is checked against what was planned and
 * what lies beside it, tile values become `result.json` and `heatmap.png`, and the slide takes its final state.
 * The same input gives the same bytes, so that a repeated invocation changes nothing.
 */
import { HeadObjectCommand, type S3Client } from '@aws-sdk/client-s3';

import { aggregateOutput, aggregatesOf, highest, inOrder, Vote } from './aggregate.ts';
import {
  ATTENTION,
  type BronzeSlide,
  type Completion,
  completionSchema,
  type HeadResult,
  type HeatmapGeometry,
  type InferenceSlide,
  JOB_KINDS,
  type JobItem,
  type Model,
  outputNames,
  type Plan,
  type Reason,
  type ResultSummary,
  type RunContext,
  type SlideResult,
  type SlideState,
} from './contracts.ts';
import { isNotFound, reasonOf, SlidewayError } from './errors.ts';
import { drawHeatmap } from './heatmap.ts';
import { planKey, resultPrefix } from './keys.ts';
import { contentId, type Lineage, type LineageObject } from './lineage.ts';
import { addCounts } from './metering.ts';
import type { StateTable } from './state.ts';
import { readJson, readVersion, sha256, type Written, writeJson, writeObject } from './store.ts';
import { ResultCorrupt, readTiles, type TileTable } from './tiles.ts';

/** The job ended well, yet there is no answer for the slide. */
export class ResultMissing extends SlidewayError {}
/** The job that had the slide failed before it came to it; goes by the name of the job's own reason. */
export class JobFailed extends SlidewayError {
  constructor({ jobName, reason }: JobItem) {
    super(`the job ${jobName} failed: ${reason?.message ?? 'it gave no reason'}`);
    if (reason) this.name = reason.error;
  }
}

export interface AggregateInput {
  run: RunContext;
  slide: InferenceSlide;
}

export interface AggregateDependencies {
  s3: S3Client;
  state: StateTable;
  lineage: Lineage;
  silver: string;
  codeVersion: string;
  /** AWS requests that this invocation has made so far. */
  countedRequests(): Record<string, number>;
}

/** How one model's answer ended. */
interface Outcome {
  model: string;
  state: Extract<SlideState, 'AGGREGATED' | 'QUARANTINED' | 'FAILED'>;
  reason?: Reason;
  summary?: ResultSummary;
  /** What the answer was made of, and what was made, as they go on record. */
  made?: { inputs: LineageObject[]; outputs: LineageObject[] };
  requests?: Completion['requests'];
}

type PlannedModel = Plan['models'][number];

export async function aggregateSlide(
  input: AggregateInput,
  deps: AggregateDependencies,
): Promise<{ slideId: string; state: SlideState }> {
  const { run, slide } = input;
  const plan = (await readJson(deps.s3, { bucket: deps.silver, key: planKey(run.runId) })) as
    | Plan
    | undefined;
  if (!plan) throw new ResultMissing(`plan.json of the run ${run.runId} is not there; plan the run again`);
  const item = await deps.state.slide(run.runId, slide.slideId);

  const outcomes: Outcome[] = [];
  for (const name of slide.models) {
    const model = plan.models.find((planned) => planned.name === name);
    outcomes.push(
      model
        ? await aggregateModel(input, model, item?.bronze, deps)
        : failed(name, new ResultMissing(`the model ${name} is not in the run's plan`)),
    );
  }

  const state = together(outcomes);
  const reason = reasonFor(outcomes);
  const results = outcomes.flatMap(({ summary }) => summary ?? []);
  const outputs = outcomes.flatMap(({ made }) => made?.outputs ?? []);
  await deps.lineage.append(
    { slideId: slide.slideId },
    {
      id: `${run.runId}/aggregate/${state}/${contentId(outputs)}`,
      action: `SLIDE_${state}`,
      runId: run.runId,
      ...(reason && { reason: `${reason.error}: ${reason.message}` }),
      inputs: outcomes.flatMap(({ made }) => made?.inputs ?? []),
      outputs,
      parameters: { models: slide.models },
    },
  );
  const container = outcomes.map(({ requests }) => ({
    s3Get: requests?.get ?? 0,
    s3Put: requests?.put ?? 0,
  }));
  const requests = [deps.countedRequests(), ...container].reduce(addCounts, item?.requests ?? {});
  const moved = await deps.state.transition(run.runId, slide.slideId, state, {
    slide: slide.slide,
    ...(reason && { reason }),
    results,
    requests,
  });
  // A slide that had ended before keeps the state it ended in.
  return { slideId: slide.slideId, state: moved ? state : (item?.state ?? state) };
}

/** The slide is AGGREGATED when all its models are; one that only a person can help weighs less than a failure. */
function together(outcomes: Outcome[]): Outcome['state'] {
  if (outcomes.some(({ state }) => state === 'FAILED')) return 'FAILED';
  return outcomes.some(({ state }) => state === 'QUARANTINED') ? 'QUARANTINED' : 'AGGREGATED';
}

function reasonFor(outcomes: Outcome[]): Reason | undefined {
  const state = together(outcomes);
  const troubled = outcomes.filter(({ reason }) => reason);
  const first = troubled.find((outcome) => outcome.state === state)?.reason;
  if (!first || outcomes.length === 1) return first;
  return {
    error: first.error,
    message: troubled.map(({ model, reason }) => `${model}: ${reason?.message}`).join('; '),
  };
}

const failed = (model: string, error: unknown): Outcome => ({
  model,
  state: 'FAILED',
  reason: reasonOf(error),
});

async function aggregateModel(
  input: AggregateInput,
  planned: PlannedModel,
  bronze: BronzeSlide | undefined,
  deps: AggregateDependencies,
): Promise<Outcome> {
  const { run, slide } = input;
  const prefix = resultPrefix(run.runId, slide.slideId, planned.name);
  try {
    const found = await readMarker(input, planned, prefix, deps);
    if (!found) return failed(planned.name, await whyNothing(run.runId, planned.name, deps));
    const { marker } = found;
    if (marker.state !== 'INFERRED') {
      return {
        model: planned.name,
        state: marker.state,
        reason: {
          error: marker.error ?? 'InferenceFailed',
          message: marker.message ?? 'no message was left',
        },
        requests: marker.requests,
      };
    }
    const { summary, made } = await writeResult({ input, planned, prefix, ...found, bronze }, deps);
    return {
      model: planned.name,
      state: 'AGGREGATED',
      summary,
      made,
      requests: marker.requests,
    };
  } catch (error) {
    if (error instanceof ResultCorrupt) return failed(planned.name, error);
    throw error;
  }
}

/** The container's marker, if there is one and it speaks of what was planned. */
async function readMarker(
  { run, slide }: AggregateInput,
  planned: PlannedModel,
  prefix: string,
  { s3, silver }: AggregateDependencies,
): Promise<{ marker: Completion; markerObject: Written } | undefined> {
  const found = await readVersion(s3, { bucket: silver, key: `${prefix}complete.json` });
  if (!found) return undefined;
  const { bytes, ...ref } = found;
  let document: unknown;
  try {
    document = JSON.parse(Buffer.from(bytes).toString('utf8'));
  } catch {
    throw new ResultCorrupt('complete.json is not JSON');
  }
  const parsed = completionSchema.safeParse(document);
  if (!parsed.success) {
    const issue = parsed.error.issues[0];
    throw new ResultCorrupt(`complete.json, ${issue?.path.join('.')}: ${issue?.message}`);
  }
  const marker = parsed.data;
  expectSame('complete.json', 'run', marker.runId, run.runId);
  expectSame('complete.json', 'slide', marker.slideId, slide.slideId);
  expectSame('complete.json', 'checksum of the slide', marker.checksum, slide.checksum);
  expectSame('complete.json', 'digest of the model', marker.model.digest, planned.digest);
  return { marker, markerObject: { ...ref, checksum: sha256(bytes) } };
}

function expectSame(file: string, what: string, found: unknown, expected: unknown): void {
  if (found !== expected) throw new ResultCorrupt(`${file}: the ${what} is ${found}, expected ${expected}`);
}

/** Why there is no marker: the reason of the job that the model's inference ended with, where it failed. */
async function whyNothing(runId: string, model: string, { state }: AggregateDependencies): Promise<Error> {
  const all: JobItem[] = [];
  for await (const job of state.jobs(runId)) if (job.model === model) all.push(job);
  const last = JOB_KINDS.findLast((kind) => all.some((job) => kindOf(job) === kind));
  const jobs = all.filter((job) => kindOf(job) === last);
  // Transform jobs are followed by joining, unless what came after them failed and is on record as one of them.
  const telling = last === 'transform' ? 'FAILED' : 'SUCCEEDED';
  const job = jobs.findLast(({ state }) => state === telling) ?? jobs.at(-1);
  if (job?.state === 'FAILED') return new JobFailed(job);
  return new ResultMissing(
    `the job ${job?.jobName ?? `of ${model}`} left nothing for this slide; drop the manifest again to have it done`,
  );
}

const kindOf = ({ kind = 'process' }: JobItem) => kind;

interface Answer {
  input: AggregateInput;
  planned: PlannedModel;
  prefix: string;
  marker: Completion;
  markerObject: Written;
  bronze: BronzeSlide | undefined;
}

async function writeResult(
  answer: Answer,
  deps: AggregateDependencies,
): Promise<{ summary: ResultSummary; made: NonNullable<Outcome['made']> }> {
  const { tiles, tilesObject } = await readAnswer(answer, deps);
  await recordInference(answer, tilesObject, deps);
  const heatmap = await writeHeatmap(answer, tiles, deps);
  const result = slideResult(answer, tiles, await numbersOf(tiles, answer.planned.model), heatmap, deps);
  const key = `${answer.prefix}result.json`;
  const written = await writeJson(deps.s3, { bucket: deps.silver, key }, result);
  return {
    summary: summaryOf(result, answer.planned, key),
    made: {
      inputs: [answer.markerObject, tilesObject],
      outputs: [written, ...(heatmap ? [heatmap.object] : [])],
    },
  };
}

/** Puts on record what the container made of the slide: which bytes, with which model, by which job. */
async function recordInference(
  { input, planned, prefix, marker, markerObject, bronze }: Answer,
  tilesObject: Written,
  deps: AggregateDependencies,
): Promise<void> {
  const { run, slide } = input;
  const outputs: LineageObject[] = [markerObject, tilesObject];
  for (const [file, { sha256 }] of Object.entries(marker.outputs)) {
    if (file === 'tiles.parquet') continue;
    const ref = { bucket: deps.silver, key: `${prefix}${file}` };
    outputs.push({
      ...ref,
      versionId: await versionOf(deps.s3, ref),
      checksum: `sha256:${bare(sha256)}`,
    });
  }
  await deps.lineage.append(
    { slideId: slide.slideId },
    {
      id: `${run.runId}/infer/${planned.name}/${contentId(outputs)}`,
      action: 'SLIDE_INFERRED',
      runId: run.runId,
      inputs: [
        ...(bronze
          ? bronze.files.map(({ key, versionId, checksum }) => ({
              bucket: bronze.bucket,
              key,
              ...(versionId && { versionId }),
              checksum,
            }))
          : []),
        {
          bucket: planned.bucket,
          key: planned.key,
          ...(planned.versionId && { versionId: planned.versionId }),
          checksum: planned.digest,
        },
      ],
      outputs,
      parameters: {
        ...marker.parameters,
        model: planned.name,
        modelVersion: planned.version,
        modelDigest: planned.digest,
        jobName: marker.jobName,
        mode: marker.mode,
        // Which tiles were scored, and how they were encoded: lossy ones change the numbers a little.
        ...(marker.tileset && { tileset: marker.tileset }),
        device: marker.device,
        inferenceCodeVersion: marker.codeVersion,
        completedAt: marker.completedAt,
      },
    },
  );
}

/** The version that an object has now; `undefined` where there is none. */
async function versionOf(
  s3: S3Client,
  { bucket, key }: { bucket: string; key: string },
): Promise<string | undefined> {
  try {
    return (await s3.send(new HeadObjectCommand({ Bucket: bucket, Key: key }))).VersionId;
  } catch (error) {
    if (isNotFound(error)) return undefined;
    throw error;
  }
}

/** A hash as the container or this code writes it, without its prefix. */
const bare = (hash: string) => hash.replace(/^sha256:/, '');

/** tiles.parquet, checked: the bytes that the marker names, of the slide and model that were planned. */
async function readAnswer(
  { input, planned, prefix, marker }: Answer,
  { s3, silver }: AggregateDependencies,
): Promise<{ tiles: TileTable; tilesObject: Written }> {
  const found = await readVersion(s3, { bucket: silver, key: `${prefix}tiles.parquet` });
  if (!found) throw new ResultCorrupt('complete.json is there, tiles.parquet is not');
  const { bytes, ...ref } = found;
  const checksum = sha256(bytes);
  expectSame('tiles.parquet', 'SHA-256', bare(checksum), bare(marker.outputs['tiles.parquet']?.sha256 ?? ''));
  const tiles = await readTiles(bytes, planned.model);
  expectSame('tiles.parquet', 'slide', tiles.metadata.get('slideId'), input.slide.slideId);
  expectSame(
    'tiles.parquet',
    'checksum of the slide',
    tiles.metadata.get('slideChecksum'),
    input.slide.checksum,
  );
  expectSame('tiles.parquet', 'digest of the model', tiles.metadata.get('modelDigest'), planned.digest);
  expectSame('tiles.parquet', 'number of tiles', tiles.rows, marker.tiles?.kept);
  const ok = countReadable(tiles);
  expectSame('tiles.parquet', 'number of readable tiles', ok, marker.tiles?.ok);
  const { head } = planned.model;
  if (head && ok > 0) {
    expectSame(
      'complete.json',
      "outputs of the package's head",
      names(marker.head?.outputs),
      head.outputs.join(),
    );
    expectSame('complete.json', 'number of tiles of the head', marker.head?.tiles, ok);
  }
  return { tiles, tilesObject: { ...ref, checksum } };
}

const names = (numbers: Record<string, number> | undefined) => numbers && Object.keys(numbers).join();

function countReadable({ readable }: TileTable): number {
  let count = 0;
  for (const ok of readable) count += ok;
  return count;
}

interface Heatmap {
  geometry: HeatmapGeometry;
  object: Written;
  bytes: number;
}

/** What is drawn: the output that the model names, else its head's attention, else its first; of an embedding none of them. */
function drawnOutput({ heatmap, head, task, outputs }: Model): string | undefined {
  if (heatmap) return heatmap.output;
  if (head?.attention) return ATTENTION;
  return task === 'embedding' ? undefined : outputs[0];
}

/** The slide's heatmap; none where there is nothing to draw. */
async function writeHeatmap(
  { planned, prefix, marker }: Answer,
  tiles: TileTable,
  { s3, silver }: AggregateDependencies,
): Promise<Heatmap | undefined> {
  const { model } = planned;
  const output = drawnOutput(model);
  if (!output || !marker.slide || !marker.tile || tiles.rows === 0) return undefined;
  const { png, geometry } = await drawHeatmap({
    tiles,
    output,
    values: await tiles.values(output),
    colormap: model.heatmap?.colormap ?? 'inferno',
    model,
    slide: marker.slide,
    footprint: marker.tile.footprintX,
  });
  const object = await writeObject(s3, { bucket: silver, key: `${prefix}heatmap.png` }, png, 'image/png');
  return { geometry, object, bytes: png.byteLength };
}

/** What the tiles come to, output after output. */
async function numbersOf(
  tiles: TileTable,
  model: Model,
): Promise<Pick<SlideResult, 'aggregates' | 'outputs' | 'classes'>> {
  const given = aggregatesOf(model);
  const vote = model.task === 'classification' ? new Vote(tiles) : undefined;
  const outputs: SlideResult['outputs'] = {};
  for (const name of outputNames(model)) {
    const values = await tiles.values(name);
    const numbers = aggregateOutput(tiles, values, model.top_k, given);
    outputs[name] = numbers;
    vote?.add(name, values, numbers.mean ?? null);
  }
  return {
    aggregates: { given, asked: inOrder(model.aggregate) },
    outputs,
    classes: vote?.count() ?? null,
  };
}

/** The head's answer as the container gives it; of classes also the one with the highest number. */
function headResult(head: NonNullable<Completion['head']>): HeadResult {
  const classes = Object.keys(head.outputs);
  const predicted = classes[highest(Object.values(head.outputs))];
  return { ...head, ...(head.task === 'classification' && predicted && { predicted }) };
}

function slideResult(
  { input, planned, marker, bronze }: Answer,
  tiles: TileTable,
  { aggregates, outputs, classes }: Awaited<ReturnType<typeof numbersOf>>,
  heatmap: Heatmap | undefined,
  { codeVersion }: AggregateDependencies,
): SlideResult {
  const { model } = planned;
  const ok = countReadable(tiles);
  return {
    runId: input.run.runId,
    slideId: input.slide.slideId,
    slide: input.slide.slide,
    model: { name: planned.name, version: planned.version, digest: planned.digest, task: model.task },
    mode: marker.mode ?? 'processing',
    ...(marker.tileset && { tileset: marker.tileset }),
    tiles: {
      grid: marker.tiles?.grid ?? tiles.rows,
      kept: tiles.rows,
      ok,
      unreadable: tiles.rows - ok,
    },
    aggregates,
    outputs,
    topK: model.top_k,
    classes,
    head: marker.head ? headResult(marker.head) : null,
    note: noteOn(tiles.rows, ok, marker.tissue?.inkFraction ?? 0),
    tissueAreaMm2: marker.tissue?.areaMm2 ?? 0,
    tile: marker.tile ?? null,
    slideGeometry: marker.slide ?? null,
    heatmap: heatmap?.geometry ?? null,
    timings: marker.timings,
    ...(marker.bound ? { bound: marker.bound } : {}),
    lineage: {
      jobName: marker.jobName,
      device: marker.device,
      completedAt: marker.completedAt,
      parameters: marker.parameters,
      codeVersion: { inference: marker.codeVersion, aggregation: codeVersion },
      input: {
        checksum: marker.checksum,
        object: bronze ? { bucket: bronze.bucket, key: bronze.key } : null,
      },
      outputs: {
        ...marker.outputs,
        ...(heatmap && { 'heatmap.png': { sha256: bare(heatmap.object.checksum), bytes: heatmap.bytes } }),
      },
    },
  };
}

/** Above this share of all that is dense, what was taken for pen marks may be a stain of their colour. */
const MUCH_INK = 0.5;

function noteOn(kept: number, ok: number, inkFraction: number): string | null {
  const notes = [];
  if (kept === 0) notes.push('No tissue was found, so there was no tile to look at.');
  else if (ok === 0) notes.push(`None of the ${kept} tiles could be read.`);
  else if (ok < kept) notes.push(`${kept - ok} of ${kept} tiles could not be read; no number counts them.`);
  if (inkFraction > MUCH_INK)
    notes.push('Most of what is dense was taken for pen marks: see whether it is a stain of their colour.');
  return notes.join(' ') || null;
}

/** The columns that the model's author chose, for tables and the report; an embedding's numbers are for programs. */
function summaryOf(result: SlideResult, { model }: PlannedModel, key: string): ResultSummary {
  const outputs: ResultSummary['outputs'] = {};
  for (const aggregate of model.task === 'embedding' ? [] : result.aggregates.asked) {
    for (const [name, all] of Object.entries(result.outputs))
      outputs[`${aggregate}_${name}`] = all[aggregate] ?? null;
  }
  if (result.classes) {
    outputs.predicted_mean = result.classes.predictedByMean;
    outputs.predicted_vote = result.classes.predictedByVote;
  }
  for (const name of model.head?.outputs ?? []) outputs[`head_${name}`] = result.head?.outputs[name] ?? null;
  if (model.head?.task === 'classification') outputs.predicted_head = result.head?.predicted ?? null;
  const { kept, ok, unreadable } = result.tiles;
  return {
    model: result.model.name,
    version: result.model.version,
    key,
    tiles: { kept, ok, unreadable },
    tissueMm2: result.tissueAreaMm2,
    ...(result.note !== null && { note: result.note }),
    outputs,
    ...(result.slideGeometry && {
      size: { width: result.slideGeometry.width, height: result.slideGeometry.height },
    }),
    ...(result.heatmap && { heatmap: result.heatmap }),
  };
}
