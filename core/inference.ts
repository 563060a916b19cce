/** PlanInference: the ingested slides, grouped by model into balanced shards, one per instance. */
import { createHash } from 'node:crypto';
import type { S3Client } from '@aws-sdk/client-s3';
import { forEachConcurrently } from './concurrency.ts';
import type {
  InferenceJob,
  InferenceSlide,
  Plan,
  PlannedSlide,
  RunContext,
  Shard,
  ShardSlide,
  SlideItem,
} from './contracts.ts';
import { inferenceKey, jobPrefix, planKey, shardKey, slidesKey, slidesPrefix } from './keys.ts';
import { contentId, type Lineage } from './lineage.ts';
import type { StateTable } from './state.ts';
import { readJson, readLines, type Written, writeJson, writeLines } from './store.ts';

export interface InferenceConfig {
  /** Jobs of this deployment are named `<jobPrefix>-…`. */
  jobPrefix: string;
  instanceType: string;
  maxInstances: number;
  slidesPerInstance: number;
  volumeSizeInGB: number;
  maxRuntimeInSeconds: number;
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
    const instances = Math.min(config.maxInstances, Math.ceil(group.length / config.slidesPerInstance));
    const shards = balance(group, instances);
    await forEachConcurrently([...shards.entries()], 8, async ([shard, part]) => {
      const document: Shard = {
        runId,
        shard,
        shards: shards.length,
        model: ref,
        parameters: run.parameters,
        codeVersion: plan.codeVersion,
        output: { bucket: silverBucket, prefix: slidesPrefix(runId) },
        slides: part,
      };
      const key = shardKey(runId, ref.name, shard);
      shardObjects.push(await writeJson(s3, { bucket: silverBucket, key }, document));
    });
    jobs.push({
      model: ref.name,
      version: ref.version,
      jobName: jobNameOf(config.jobPrefix, runId, ref.name),
      shardsUri: `s3://${silverBucket}/${jobPrefix(runId, ref.name)}`,
      modelUri: `s3://${ref.bucket}/${ref.key}`,
      modelDigest: ref.digest,
      slides: group.length,
      instanceCount: shards.length,
      instanceType: config.instanceType,
      volumeSizeInGB: config.volumeSizeInGB,
      maxRuntimeInSeconds: config.maxRuntimeInSeconds,
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
        jobs: jobs.map(({ jobName, model, version, modelDigest, instanceCount }) => ({
          jobName,
          model,
          version,
          modelDigest,
          instanceCount,
        })),
      },
    },
  );
  return { jobs, slides: written };
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

/** SageMaker's names have 63 characters, never used twice; 6 are left for `-<attempt>`. */
export function jobNameOf(prefix: string, runId: string, model: string): string {
  const hash = createHash('sha256').update(`${runId}/${model}`).digest('hex').slice(0, 12);
  const room = 57 - prefix.length - hash.length - 2;
  return `${prefix}-${hash}-${model.slice(0, room).replace(/-+$/, '')}`;
}
