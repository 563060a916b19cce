import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { InferenceJob, Shard, TransformSettings } from '../../core/contracts.ts';
import { concurrencyOf, MOST_IN_FLIGHT_MB, processorsOf } from '../../core/instances.ts';
import { packsKey, shardKey, tiledKey, transformedPrefix } from '../../core/keys.ts';
import { readJson, writeJson, writeObject } from '../../core/store.ts';
import { type PreviousPlan, planTransform, type TransformPlan } from '../../core/transform.ts';
import { inferenceConfig } from '../support/inference.ts';
import { RUN } from '../support/results.ts';
import { type Services, startServices } from '../support/services.ts';

const { transform: SETTINGS } = inferenceConfig('test');
const MB = 1_000_000;
let services: Services;
beforeAll(async () => {
  services = await startServices();
  await services.createBucket('models');
});
afterAll(() => services.close());

type Tiled = { state: string; packs?: { key: string; bytes: number; tiles: number }[] } | undefined;
const packOf = (id: string, n: number, bytes = 11 * MB) => ({
  key: `tiles/${id}/${id}-${String(n).padStart(5, '0')}.tar`,
  bytes,
  tiles: 3,
});

let runs = 0;
/** A model's inference of which tiling is done; slides by shard. */
async function tiledRun(
  shards: Record<string, Tiled>[],
  settings: Partial<TransformSettings> = {},
  modelSeconds = 120,
) {
  const { s3 } = services;
  runs += 1;
  const run = { ...RUN, runId: `run-${runs}` };
  for (const [shard, slides] of shards.entries()) {
    const key = shardKey(run.runId, 'm', shard);
    const list = Object.keys(slides).map((slideId) => ({ slideId }));
    await writeJson(s3, { bucket: 'silver', key }, {
      shards: shards.length,
      slides: list,
    } as unknown as Shard);
    for (const [slideId, tiled] of Object.entries(slides))
      if (tiled)
        await writeJson(
          s3,
          { bucket: 'silver', key: tiledKey(run.runId, 'm', slideId) },
          { slideId, ...tiled },
        );
  }
  const model = { bucket: 'models', key: `models/m/${runs}/model.tar.gz` };
  const { versionId } = await writeObject(s3, model, 'weights', 'application/gzip');
  const job: InferenceJob = {
    ...{ model: 'm', version: '1', mode: 'transform', begin: 'tile', jobName: 'j', slides: 1 },
    ...{ instanceCount: 1, instanceType: 'ml.c5.4xlarge', volumeSizeInGB: 1, maxRuntimeInSeconds: 1 },
    modelSeconds,
    shardsUri: 's3://silver/jobs/',
    modelUri: `s3://${model.bucket}/${model.key}`,
    ...(versionId && { modelVersionId: versionId }),
    transform: { ...SETTINGS, ...settings },
  };
  const answer = (base: string, below = '') =>
    writeObject(
      s3,
      { bucket: 'silver', key: `${transformedPrefix(run.runId, 'm')}${below}${base}.tar.out` },
      '{}',
      'application/jsonlines',
    );
  return {
    run,
    model,
    answer,
    plan: (attempt: number, previous?: PreviousPlan) =>
      planTransform(run, job, { attempt, previous }, { s3, silverBucket: 'silver' }),
    packs: async (attempt: number) =>
      (await readJson(s3, { bucket: 'silver', key: packsKey(run.runId, 'm', attempt) })) as unknown[],
  };
}

const tiled = (...packs: ReturnType<typeof packOf>[]): Tiled => ({ state: 'TILED', packs });

describe('what a Transform job is to do', () => {
  it('is the packs of all slides that have tiles, each once, in SageMaker’s form', async () => {
    const { run, plan, packs } = await tiledRun([
      { a: tiled(packOf('t1', 0), packOf('t1', 1)), gone: { state: 'QUARANTINED' }, forgotten: undefined },
      { b: tiled(packOf('t2', 0, 4 * MB)), again: tiled(packOf('t2', 0, 4 * MB)), empty: tiled() },
    ]);
    expect(await plan(1)).toEqual({
      ...{ done: false, attempt: 1, packs: 3, fruitless: 0 },
      manifestUri: `s3://silver/transform/${run.runId}/m/attempt-1/manifest.json`,
      outputUri: `s3://silver/transform/${run.runId}/m/out/`,
      ...{ instanceType: 'ml.g5.xlarge', instanceCount: 2 },
      ...{ invocationTimeoutSeconds: 600, requestSeconds: 590 },
      ...{ maxPayloadInMB: 13, maxConcurrentTransforms: 4 },
    });
    expect(await packs(1)).toEqual([
      { prefix: 's3://silver/tiles/' },
      ...['t1/t1-00000.tar', 't1/t1-00001.tar', 't2/t2-00000.tar'],
    ]);
  });

  it('is, after a job, what has no answer yet, wherever below the prefix the answers lie', async () => {
    const { plan, packs, answer } = await tiledRun([
      { a: tiled(packOf('t', 0), packOf('t', 1), packOf('t', 2)) },
    ]);
    await answer('t-00000', 't/');
    await answer('t-00002', 'some/where/else/');
    const second = await plan(2, { packs: 3, fruitless: 0 });
    expect(second).toMatchObject({ done: false, attempt: 2, packs: 1, fruitless: 0, instanceCount: 1 });
    expect(await packs(2)).toEqual([{ prefix: 's3://silver/tiles/' }, 't/t-00001.tar']);
    await answer('t-00001');
    expect(await plan(3, { packs: 1 })).toEqual({ done: true, attempt: 3, tiled: 1, missing: 0 });
  });

  /** The plans of a model whose jobs answer so many packs each. */
  async function plansOf(packs: number, jobs: (job: number) => number) {
    const all = Array.from({ length: packs }, (_, n) => packOf('t', n));
    const { plan, answer } = await tiledRun([{ a: tiled(...all) }]);
    const plans: TransformPlan[] = [];
    let answered = 0;
    for (;;) {
      const previous = plans.at(-1) as Extract<TransformPlan, { done: false }> | undefined;
      const next = await plan(plans.length + 1, previous);
      plans.push(next);
      if (next.done) return plans;
      const until = Math.min(packs, answered + jobs(plans.length));
      for (; answered < until; answered++) await answer(`t-${String(answered).padStart(5, '0')}`);
    }
  }
  const told = (plans: TransformPlan[]) =>
    plans.map((plan) =>
      plan.done ? `${plan.missing} missing` : `${plan.packs}, ${plan.fruitless} fruitless`,
    );

  it('is done in as many jobs as it takes, where each is stopped with some of it done', async () => {
    expect(told(await plansOf(18, () => 4))).toEqual([
      ...['18, 0 fruitless', '14, 0 fruitless', '10, 0 fruitless', '6, 0 fruitless', '2, 0 fruitless'],
      '0 missing',
    ]);
  });

  it('is given up after two jobs in a row that did nothing for it', async () => {
    expect(told(await plansOf(2, () => 0))).toEqual(['2, 0 fruitless', '2, 1 fruitless', '2 missing']);
    expect(told(await plansOf(9, (job) => [4, 0, 3, 0, 0, 2][job - 1] ?? 0))).toEqual([
      ...['9, 0 fruitless', '5, 0 fruitless', '5, 1 fruitless', '2, 0 fruitless', '2, 1 fruitless'],
      '2 missing',
    ]);
  });

  it('is given up after ten jobs, however little each does', async () => {
    const plans = await plansOf(12, () => 1);
    expect(plans.at(-1)).toEqual({ done: true, attempt: 11, tiled: 1, missing: 2 });
  });

  it.each([
    [3600, 120, 3600],
    [600, 900, 910],
    [1, 1, 11],
    [600, 3590, 3600],
  ])(
    'may take %i s a request and %i s a batch: SageMaker waits %i s, the server gives up before',
    async (...given) => {
      const [invocationTimeoutSeconds, modelSeconds, waited] = given;
      const { plan } = await tiledRun(
        [{ a: tiled(packOf('t', 0)) }],
        { invocationTimeoutSeconds },
        modelSeconds,
      );
      expect(await plan(1)).toMatchObject({ invocationTimeoutSeconds: waited, requestSeconds: waited - 10 });
    },
  );

  it('is nothing where nothing was tiled', async () => {
    const { plan } = await tiledRun([{ a: { state: 'FAILED' }, b: undefined }]);
    expect(await plan(1)).toEqual({ done: true, attempt: 1, tiled: 0, missing: 0 });
  });

  it('is refused once the package is another than the one that was pinned, or is gone', async () => {
    const { plan, model } = await tiledRun([{ a: tiled(packOf('t', 0)) }]);
    await writeObject(services.s3, model, 'other weights', 'application/gzip');
    await expect(plan(1)).rejects.toMatchObject({ name: 'ModelDigestMismatch' });
  });
});

describe('its machines', () => {
  it('never get more at once than a job may, and always as much as the largest pack needs', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.integer({ min: 1, max: 99 * MB }),
        fc.integer({ min: 1, max: 5 }),
        fc.option(fc.integer({ min: 1, max: 100 }), { nil: undefined }),
        fc.integer({ min: 1, max: 100 }),
        fc.constantFrom('ml.g5.xlarge', 'ml.g5.48xlarge', 'ml.c5.large'),
        async (bytes, count, maxConcurrentTransforms, maxPayloadInMB, instanceType) => {
          const packs = Array.from({ length: count }, (_, n) => packOf('t', n, n === 0 ? bytes : 1));
          const { plan } = await tiledRun([{ a: tiled(...packs) }], {
            ...{ maxPayloadInMB, instanceType },
            ...(maxConcurrentTransforms && { maxConcurrentTransforms }),
          });
          const planned = (await plan(1)) as Extract<TransformPlan, { done: false }>;
          const { maxConcurrentTransforms: concurrent, maxPayloadInMB: payload, instanceCount } = planned;
          expect(concurrent * payload).toBeLessThanOrEqual(MOST_IN_FLIGHT_MB);
          expect(concurrent).toBeGreaterThanOrEqual(1);
          expect(payload * MB).toBeGreaterThanOrEqual(bytes);
          expect(instanceCount).toBe(Math.min(SETTINGS.maxInstances, Math.ceil(count / 2)));
        },
      ),
      { numRuns: 25 },
    );
  });

  it('are told for more packs than a call takes arguments', async () => {
    const packs = Array.from({ length: 150_000 }, (_, n) => packOf('t', n, n === 7 ? 20 * MB : 1));
    const { plan } = await tiledRun([{ a: { state: 'TILED', packs } }]);
    expect(await plan(1)).toMatchObject({ packs: 150_000, maxPayloadInMB: 20 });
  }, 60_000);

  it('cannot take a pack of more than 100 MB', async () => {
    const { plan } = await tiledRun([{ a: tiled(packOf('t', 0, 101 * MB)) }]);
    await expect(plan(1)).rejects.toMatchObject({ name: 'PackTooLarge' });
  });

  it('take one request a processor, by the size that their type names', () => {
    const types = ['ml.c5.large', 'ml.g5.xlarge', 'ml.g5.2xlarge', 'ml.c5.18xlarge', 'ml.m5.metal'];
    expect(types.map(processorsOf)).toEqual([2, 4, 8, 72, 1]);
    expect(concurrencyOf('ml.g5.2xlarge', 13)).toBe(7);
    expect(concurrencyOf('ml.g5.xlarge', 100)).toBe(1);
  });
});
