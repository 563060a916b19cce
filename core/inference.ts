/** PlanInference: the ingested slides, grouped by model into balanced shards, one per instance. */
import { createHash } from 'node:crypto';
import type { S3Client } from '@aws-sdk/client-s3';
import { forEachConcurrently } from './concurrency.ts';
import type {
  InferenceJob,
  InferenceSlide,
  Mode,
  Model,
  Plan,
  PlannedSlide,
  RunContext,
  Shard,
  ShardSlide,
  SlideItem,
  Tiling,
  TransformSettings,
} from './contracts.ts';
import {
  inferenceKey,
  jobPrefix,
  planKey,
  shardKey,
  slidesKey,
  slidesPrefix,
  TILES_PREFIX,
  tiledPrefix,
  transformedPrefix,
} from './keys.ts';
import { contentId, type Lineage } from './lineage.ts';
import type { StateTable } from './state.ts';
import { readJson, readLines, type Written, writeJson, writeLines } from './store.ts';

/** The machines of a kind of job: one for every so many slides, up to a most. */
export interface InstancesConfig {
  instanceType: string;
  maxInstances: number;
  slidesPerInstance: number;
  volumeSizeInGB: number;
}

export interface InferenceConfig extends InstancesConfig {
  /** Jobs of this deployment are named `<jobPrefix>-…`. */
  jobPrefix: string;
  maxRuntimeInSeconds: number;
  /** What a batch of a model may take; what a package says itself comes over it. */
  modelSeconds: number;
  /** Of models in transform mode; what a package asks for itself comes over it. */
  tiles: InstancesConfig & Pick<Tiling, 'format' | 'quality' | 'packBytes' | 'objects' | 'keepDays'>;
  join: InstancesConfig;
  transform: TransformSettings;
}

export interface InferenceDependencies {
  s3: S3Client;
  state: StateTable;
  lineage: Lineage;
  silverBucket: string;
  config: InferenceConfig;
}

/** States in which a slide takes part: ingested now, or by an earlier attempt of this step. */
const TAKES_PART = new Set(['INGESTED', 'INFERRING']);

export async function planInference(
  run: RunContext,
  { s3, state, lineage, silverBucket, config }: InferenceDependencies,
): Promise<{ jobs: InferenceJob[]; slides: Written }> {
  const { runId } = run;
  await state.updateRun(runId, { ingestedAt: new Date().toISOString() });
  const plan = (await readJson(s3, { bucket: silverBucket, key: planKey(runId) })) as Plan;
  const items = new Map<string, SlideItem>();
  for await (const item of state.slides(runId)) if (TAKES_PART.has(item.state)) items.set(item.slideId, item);

  const slides: InferenceSlide[] = [];
  const ofModel = new Map<string, ShardSlide[]>();
  for await (const planned of readLines<PlannedSlide>(s3, { bucket: silverBucket, key: slidesKey(runId) })) {
    const bronze = items.get(planned.slideId)?.bronze;
    if (planned.state !== 'EXPECTED' || !bronze) continue;
    const { slideId, slide, line, models, mpp, mppSource } = planned;
    slides.push({ slideId, slide, line, checksum: bronze.checksum, models });
    for (const model of models) {
      const group = ofModel.get(model) ?? [];
      group.push({
        slideId,
        slide,
        bronze,
        ...(mpp !== undefined && { mpp }),
        ...(mppSource && { mppSource }),
      });
      ofModel.set(model, group);
    }
  }

  const jobs: InferenceJob[] = [];
  const shardObjects: Written[] = [];
  for (const { model, ...ref } of plan.models) {
    const group = ofModel.get(ref.name);
    if (!group) continue;
    const { mode } = model;
    const first = mode === 'transform' ? config.tiles : config;
    const shards = balance(group, instancesFor(group.length, first));
    const { px, mpp, overlap } = model.tile;
    await forEachConcurrently([...shards.entries()], 8, async ([shard, part]) => {
      const document: Shard = {
        runId,
        shard,
        shards: shards.length,
        model: ref,
        parameters: run.parameters,
        codeVersion: plan.codeVersion,
        tile: { px, mpp, overlap },
        output: { bucket: silverBucket, prefix: slidesPrefix(runId) },
        ...(mode === 'transform' && {
          tiling: tilingOf(model, silverBucket, config),
          tiled: { bucket: silverBucket, prefix: tiledPrefix(runId, ref.name) },
          transformed: { bucket: silverBucket, prefix: transformedPrefix(runId, ref.name) },
        }),
        slides: part,
      };
      const key = shardKey(runId, ref.name, shard);
      shardObjects.push(await writeJson(s3, { bucket: silverBucket, key }, document));
    });
    jobs.push({
      model: ref.name,
      version: ref.version,
      mode,
      begin: mode === 'transform' ? 'tile' : 'process',
      jobName: jobNameOf(config.jobPrefix, runId, ref.name, mode),
      shardsUri: `s3://${silverBucket}/${jobPrefix(runId, ref.name)}`,
      modelUri: `s3://${ref.bucket}/${ref.key}`,
      ...(ref.versionId && { modelVersionId: ref.versionId }),
      modelDigest: ref.digest,
      slides: group.length,
      instanceCount: shards.length,
      instanceType: first.instanceType,
      volumeSizeInGB: first.volumeSizeInGB,
      maxRuntimeInSeconds: config.maxRuntimeInSeconds,
      modelSeconds: model.modelSeconds ?? config.modelSeconds,
      ...(mode === 'transform' && {
        join: {
          // Each takes whole shards.
          instanceCount: Math.min(shards.length, instancesFor(group.length, config.join)),
          instanceType: config.join.instanceType,
          volumeSizeInGB: config.join.volumeSizeInGB,
        },
        transform: settingsOf(model, config),
      }),
    });
  }
  const written = await writeLines(s3, { bucket: silverBucket, key: inferenceKey(runId) }, slides);
  await forEachConcurrently(slides, 32, async ({ slideId }) => {
    await state.transition(runId, slideId, 'INFERRING', {});
  });
  // Shards are written side by side, in no order.
  const outputs = [written, ...shardObjects.sort((a, b) => (a.key < b.key ? -1 : 1))];
  await lineage.append(
    { runId },
    {
      id: `${runId}/inference-planned/${contentId(outputs)}`,
      runId,
      action: 'INFERENCE_PLANNED',
      outputs,
      parameters: {
        ...run.parameters,
        jobs: jobs.map(({ jobName, model, version, mode, modelDigest, instanceCount }) => ({
          jobName,
          model,
          version,
          mode,
          modelDigest,
          instanceCount,
        })),
      },
    },
  );
  return { jobs, slides: written };
}

const instancesFor = (slides: number, { maxInstances, slidesPerInstance }: InstancesConfig): number =>
  Math.min(maxInstances, Math.ceil(slides / slidesPerInstance));

/** How the model's tiles are stored: as its package asks for, else as the stage does. */
function tilingOf({ tile }: Model, bucket: string, { tiles }: InferenceConfig): Tiling {
  const { packBytes, objects, keepDays } = tiles;
  const format = tile.encoding?.format ?? tiles.format;
  const quality = tile.encoding?.quality ?? tiles.quality;
  return { bucket, prefix: TILES_PREFIX, format, quality, packBytes, objects, keepDays };
}

/** How the model's Transform jobs are run: as its package asks for, else as the stage does. */
function settingsOf({ transform }: Model, config: InferenceConfig): TransformSettings {
  const asked = Object.entries(transform ?? {}).filter(([, value]) => value !== undefined);
  return { ...config.transform, ...Object.fromEntries(asked) };
}

/** Deals slides to `count` shards, the largest first, each to the shard with the fewest bytes so far. */
export function balance(slides: ShardSlide[], count: number): ShardSlide[][] {
  const shards = Array.from({ length: count }, () => ({ bytes: 0, slides: [] as ShardSlide[] }));
  const bySize = [...slides].sort(
    (a, b) => b.bronze.size - a.bronze.size || (a.slideId < b.slideId ? -1 : 1),
  );
  for (const slide of bySize) {
    const least = shards.reduce((a, b) => (b.bytes < a.bytes ? b : a));
    least.slides.push(slide);
    least.bytes += slide.bronze.size;
  }
  return shards.map((shard) => shard.slides);
}

/** What is appended to the base of a job's name, at its longest. */
const LONGEST_SUFFIX = { processing: '-99999', transform: '-transform-999' };

/** SageMaker's names have 63 characters, never used twice; room is left for what tells the jobs of a model apart. */
export function jobNameOf(prefix: string, runId: string, model: string, mode: Mode): string {
  const hash = createHash('sha256').update(`${runId}/${model}`).digest('hex').slice(0, 12);
  const room = 63 - LONGEST_SUFFIX[mode].length - prefix.length - hash.length - 2;
  return `${prefix}-${hash}-${model.slice(0, Math.max(1, room)).replace(/-+$/, '')}`;
}
