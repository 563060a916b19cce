/**
 * PlanTransform: what a model's Transform jobs are still to do. The packs are those that tiling named, less those whose
 * predictions are there; so it is the same question before the first job, after one that failed for a few packs, and
 * after the last.
 */
import { HeadObjectCommand, paginateListObjectsV2, type S3Client } from '@aws-sdk/client-s3';
import { z } from 'zod';
import { forEachConcurrently } from './concurrency.ts';
import type { InferenceJob, RunContext, Shard, TransformSettings } from './contracts.ts';
import { isNotFound, ModelDigestMismatch, PackTooLarge } from './errors.ts';
import { concurrencyOf, MOST_IN_FLIGHT_MB } from './instances.ts';
import { packsKey, shardKey, TILES_PREFIX, tiledKey, transformedPrefix } from './keys.ts';
import { readJson, writeJson } from './store.ts';

/** Jobs in a row that may leave as many packs missing as they were given: of what they tried, once more is enough. */
const FRUITLESS_JOBS = 2;
/** Jobs of a model in all. One that is stopped at its time limit again and again gets its packs done in as many. */
const MOST_JOBS = 10;
/** SageMaker waits so much longer for an answer than the server works at it, so that the server's own reason comes. */
const ANSWER_SECONDS = 10;
const MB = 1_000_000;
const OUTPUT = '.out';

/** What tiling left on record for a slide, as far as it is needed here. */
const tiledSchema = z.object({
  slideId: z.string(),
  state: z.enum(['TILED', 'QUARANTINED', 'FAILED']),
  packs: z.array(z.object({ key: z.string(), bytes: z.number(), tiles: z.number() })).optional(),
});

/** What the plan before this one said of its job; empty before the first. */
export const previousPlanSchema = z.object({
  packs: z.number().int().optional(),
  fruitless: z.number().int().optional(),
});
export type PreviousPlan = z.infer<typeof previousPlanSchema>;

export interface TransformDependencies {
  s3: S3Client;
  silverBucket: string;
}

/** A Transform job to be run, or that there is none. */
export type TransformPlan =
  | {
      done: true;
      attempt: number;
      /** Slides that have tiles, and packs of theirs without predictions. */
      tiled: number;
      missing: number;
    }
  | {
      done: false;
      attempt: number;
      packs: number;
      /** Jobs just before this one that left no fewer packs missing than they were given. */
      fruitless: number;
      manifestUri: string;
      outputUri: string;
      instanceType: string;
      instanceCount: number;
      maxConcurrentTransforms: number;
      maxPayloadInMB: number;
      invocationTimeoutSeconds: number;
      /** What the server gives itself for a request. */
      requestSeconds: number;
    };

/** @throws {ModelDigestMismatch | PackTooLarge} */
export async function planTransform(
  { runId }: RunContext,
  job: InferenceJob,
  { attempt, previous = {} }: { attempt: number; previous?: PreviousPlan | undefined },
  { s3, silverBucket: bucket }: TransformDependencies,
): Promise<TransformPlan> {
  await checkPackage(s3, job);
  const { tiled, packs } = await tiledPacks(s3, bucket, runId, job.model);
  const prefix = transformedPrefix(runId, job.model);
  const answered = await answeredPacks(s3, bucket, prefix);
  const missing = [...packs].filter(([key]) => !answered.has(baseName(key))).sort();
  const { packs: given = Number.POSITIVE_INFINITY } = previous;
  const fruitless = missing.length < given ? 0 : (previous.fruitless ?? 0) + 1;
  if (missing.length === 0 || fruitless >= FRUITLESS_JOBS || attempt > MOST_JOBS)
    return { done: true, attempt, tiled, missing: missing.length };

  const key = packsKey(runId, job.model, attempt);
  const names = missing.map(([pack]) => pack.slice(TILES_PREFIX.length));
  await writeJson(s3, { bucket, key }, [{ prefix: `s3://${bucket}/${TILES_PREFIX}` }, ...names]);
  const settings = job.transform;
  if (!settings) throw new Error(`the job of ${job.model} has no settings for Transform jobs`);
  return {
    done: false,
    attempt,
    packs: missing.length,
    fruitless,
    manifestUri: `s3://${bucket}/${key}`,
    outputUri: `s3://${bucket}/${prefix}`,
    ...sized(settings, missing),
    ...limits(settings, job),
  };
}

/** Machines and requests for these packs. */
function sized(settings: TransformSettings, packs: [string, number][]) {
  const { instanceType, maxInstances, packsPerInstance, maxConcurrentTransforms } = settings;
  // There may be more packs than a call takes arguments.
  const largest = packs.reduce((most, [, bytes]) => Math.max(most, bytes), 0);
  const maxPayloadInMB = Math.max(settings.maxPayloadInMB, Math.ceil(largest / MB));
  if (maxPayloadInMB > MOST_IN_FLIGHT_MB) {
    throw new PackTooLarge(
      `A pack of ${largest} bytes is more than a request may have (${MOST_IN_FLIGHT_MB} MB); lower inference.tiles.packMegabytes.`,
    );
  }
  const room = Math.floor(MOST_IN_FLIGHT_MB / maxPayloadInMB);
  return {
    instanceType,
    instanceCount: Math.min(maxInstances, Math.ceil(packs.length / packsPerInstance)),
    maxConcurrentTransforms: Math.min(
      maxConcurrentTransforms ?? concurrencyOf(instanceType, maxPayloadInMB),
      room,
    ),
    maxPayloadInMB,
  };
}

/** A request may take at least as long as a batch. */
function limits({ invocationTimeoutSeconds: least }: TransformSettings, { modelSeconds = 1 }: InferenceJob) {
  const invocationTimeoutSeconds = Math.max(least, modelSeconds + ANSWER_SECONDS);
  return { invocationTimeoutSeconds, requestSeconds: invocationTimeoutSeconds - ANSWER_SECONDS };
}

/** SageMaker takes whatever version of the package lies in the bucket: it must be the one that the run pinned. */
async function checkPackage(s3: S3Client, { modelUri, modelVersionId, model }: InferenceJob): Promise<void> {
  if (modelVersionId === undefined) return;
  const [, bucket = '', key = ''] = /^s3:\/\/([^/]+)\/(.+)$/.exec(modelUri) ?? [];
  let found: string | undefined;
  try {
    found = (await s3.send(new HeadObjectCommand({ Bucket: bucket, Key: key }))).VersionId;
  } catch (error) {
    if (!isNotFound(error)) throw error;
  }
  if (found === modelVersionId) return;
  throw new ModelDigestMismatch(
    `The package of model \`${model}\` at ${modelUri} is no longer the version that the run pinned (${modelVersionId}). Register changed models under a new version, and drop the manifest again.`,
  );
}

/** The slides that have tiles, and their packs with the bytes of each; a pack that slides share is there once. */
async function tiledPacks(
  s3: S3Client,
  bucket: string,
  runId: string,
  model: string,
): Promise<{ tiled: number; packs: Map<string, number> }> {
  const packs = new Map<string, number>();
  let tiled = 0;
  await forEachConcurrently(slidesOf(s3, bucket, runId, model), 16, async (slideId) => {
    const document = await readJson(s3, { bucket, key: tiledKey(runId, model, slideId) });
    // The tiler did not come to it.
    if (document === undefined) return;
    const { state, packs: own = [] } = tiledSchema.parse(document);
    if (state !== 'TILED') return;
    tiled += 1;
    for (const { key, bytes } of own) packs.set(key, bytes);
  });
  return { tiled, packs };
}

/** The slides of all shards. */
async function* slidesOf(s3: S3Client, bucket: string, runId: string, model: string): AsyncGenerator<string> {
  for (let shard = 0; ; shard++) {
    const document = await readJson(s3, { bucket, key: shardKey(runId, model, shard) });
    if (document === undefined) return;
    const { slides, shards } = document as Shard;
    for (const { slideId } of slides) yield slideId;
    if (shard + 1 >= shards) return;
  }
}

/** Base names of the packs that have predictions. Where SageMaker puts them below the prefix is its own affair. */
async function answeredPacks(s3: S3Client, bucket: string, prefix: string): Promise<Set<string>> {
  const names = new Set<string>();
  for await (const page of paginateListObjectsV2({ client: s3 }, { Bucket: bucket, Prefix: prefix }))
    for (const { Key: key = '' } of page.Contents ?? [])
      if (key.endsWith(OUTPUT)) names.add(baseName(key).slice(0, -OUTPUT.length));
  return names;
}

const baseName = (key: string) => key.slice(key.lastIndexOf('/') + 1);
