import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type {
  BronzeSlide,
  InferenceSlide,
  Model,
  Plan,
  PlannedSlide,
  Shard,
  ShardSlide,
} from '../../core/contracts.ts';
import { balance, jobNameOf, planInference } from '../../core/inference.ts';
import { causeMessage, failSlide, jobNameFor, recordJob } from '../../core/jobs.ts';
import { inferenceKey, planKey, shardKey, slidesKey } from '../../core/keys.ts';
import { readJson, readLines, writeJson, writeLines } from '../../core/store.ts';
import { inferenceConfig } from '../support/inference.ts';
import { MODEL, RUN } from '../support/results.ts';
import { type Services, startServices } from '../support/services.ts';

const bronze = (size: number): BronzeSlide => ({
  bucket: 'bronze',
  key: 'k',
  files: [],
  size,
  checksum: `c${size}`,
});
const config = inferenceConfig('slideway-dev');

let services: Services;
beforeAll(async () => {
  services = await startServices();
});
afterAll(() => services.close());

describe('slides are dealt to instances', () => {
  const slides = fc
    .array(fc.nat(1e6), { minLength: 1, maxLength: 60 })
    .map((sizes) =>
      sizes.map((size, i): ShardSlide => ({ slideId: `s${i}`, slide: 'x', bronze: bronze(size) })),
    );

  it('each to one, no shard heavier than the lightest by more than one slide', () => {
    fc.assert(
      fc.property(slides, fc.integer({ min: 1, max: 8 }), (all, count) => {
        const shards = balance(all, count);
        expect(
          shards
            .flat()
            .map((s) => s.slideId)
            .sort(),
        ).toEqual(all.map((s) => s.slideId).sort());
        const loads = shards.map((shard) => shard.reduce((sum, s) => sum + s.bronze.size, 0));
        const largest = Math.max(...all.map((s) => s.bronze.size));
        expect(Math.max(...loads) - Math.min(...loads)).toBeLessThanOrEqual(largest);
      }),
    );
  });
});

it('job names fit SageMaker with room for kind and attempt', () => {
  const suffixes = { processing: ['-99999'], transform: ['-tile-999', '-transform-999', '-join-999'] };
  fc.assert(
    fc.property(
      fc.string(),
      fc.stringMatching(/^[a-z0-9][a-z0-9-]{0,62}$/),
      fc.constantFrom('processing' as const, 'transform' as const),
      (runId, model, mode) => {
        const name = jobNameOf('slideway-prod', runId, model, mode);
        for (const suffix of ['', ...suffixes[mode]])
          expect(`${name}${suffix}`).toMatch(/^[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}$/);
      },
    ),
  );
  const name = (runId: string) => jobNameOf('slideway-dev', runId, 'a', 'processing');
  expect(name('r')).not.toBe(name('s'));
});

describe('the inference of a run', () => {
  it('takes the slides that were ingested, and planning it again changes nothing', async () => {
    const { s3, state } = services;
    const ref = {
      bucket: 'models',
      key: 'models/m/1/model.tar.gz',
      name: 'm',
      version: '1',
      digest: 'sha256:0',
    };
    const plan: Plan = { run: RUN, codeVersion: '1', models: [{ ...ref, model: MODEL }], counts: {} };
    const line = (n: number, more: Partial<PlannedSlide> = {}): PlannedSlide => ({
      line: n,
      slideId: `s${n}`,
      slide: `${n}.svs`,
      state: 'EXPECTED',
      models: ['m'],
      metadata: {},
      ...more,
    });
    await writeJson(s3, { bucket: 'silver', key: planKey(RUN.runId) }, plan);
    await writeLines(s3, { bucket: 'silver', key: slidesKey(RUN.runId) }, [
      line(2, { mpp: 0.25, mppSource: 'manifest' }),
      line(3),
      line(4, { state: 'MISSING' }),
      line(5),
      line(6),
    ]);
    for (const n of [2, 3, 6])
      await state.transition(RUN.runId, `s${n}`, 'INGESTED', { slide: 'x', bronze: bronze(n) });
    await state.transition(RUN.runId, 's5', 'FAILED', { slide: 'x' });

    const dependencies = { ...services, silverBucket: 'silver', config };
    const first = await planInference(RUN, dependencies);
    expect(first.jobs).toEqual([
      expect.objectContaining({
        model: 'm',
        slides: 3,
        instanceCount: 2,
        modelSeconds: 120,
        shardsUri: `s3://silver/runs/${RUN.runId}/jobs/m/`,
        modelUri: 's3://models/models/m/1/model.tar.gz',
      }),
    ]);
    const inference = await Array.fromAsync(
      readLines<InferenceSlide>(s3, { bucket: 'silver', key: inferenceKey(RUN.runId) }),
    );
    expect(inference.map(({ slideId, checksum }) => [slideId, checksum])).toEqual([
      ['s2', 'c2'],
      ['s3', 'c3'],
      ['s6', 'c6'],
    ]);
    const shard = (await readJson(s3, { bucket: 'silver', key: shardKey(RUN.runId, 'm', 1) })) as Shard;
    expect(shard).toMatchObject({ shard: 1, shards: 2, model: ref, parameters: RUN.parameters });
    expect(shard.slides.map(({ slideId, mpp }) => [slideId, mpp])).toEqual([
      ['s3', undefined],
      ['s2', 0.25],
    ]);
    expect((await state.slide(RUN.runId, 's2'))?.state).toBe('INFERRING');
    expect((await planInference(RUN, dependencies)).jobs).toEqual(first.jobs);
  });
});

describe('a model in transform mode', () => {
  const ref = { bucket: 'models', key: 'k', name: 'm', version: '1', digest: 'sha256:0', versionId: 'v7' };

  async function planOf(runId: string, change: Partial<Model>) {
    const { s3, state } = services;
    const run = { ...RUN, runId };
    const model: Model = { ...MODEL, mode: 'transform', ...change };
    const plan: Plan = { run, codeVersion: '1', models: [{ ...ref, model }], counts: {} };
    await writeJson(s3, { bucket: 'silver', key: planKey(runId) }, plan);
    const lines = ['a', 'b', 'c'].map(
      (slideId, n): PlannedSlide => ({
        ...{ line: n + 2, slideId, slide: slideId, state: 'EXPECTED', models: ['m'], metadata: {} },
      }),
    );
    await writeLines(s3, { bucket: 'silver', key: slidesKey(runId) }, lines);
    for (const { slideId } of lines)
      await state.transition(runId, slideId, 'INGESTED', { slide: 'x', bronze: bronze(5) });
    const { jobs } = await planInference(run, { ...services, silverBucket: 'silver', config });
    const shard = (await readJson(s3, { bucket: 'silver', key: shardKey(runId, 'm', 0) })) as Shard;
    return { job: jobs[0], shard };
  }

  it('is tiled first, one shard an instance, and joined by as many instances as there are shards at most', async () => {
    const { job, shard } = await planOf('tiled', {});
    expect(job).toMatchObject({
      ...{ mode: 'transform', begin: 'tile', instanceCount: 3, instanceType: 'ml.c5.4xlarge' },
      modelVersionId: 'v7',
      join: { instanceCount: 2, instanceType: 'ml.c5.xlarge', volumeSizeInGB: 50 },
      transform: config.transform,
    });
    const { px, mpp, overlap } = MODEL.tile;
    expect(shard).toMatchObject({
      shards: 3,
      tile: { px, mpp, overlap },
      tiling: {
        ...{ bucket: 'silver', prefix: 'tiles/', format: 'jpeg', quality: 90 },
        ...{ packBytes: 12_000_000, objects: false, keepDays: 7 },
      },
      tiled: { bucket: 'silver', prefix: 'transform/tiled/m/tiled/' },
      transformed: { bucket: 'silver', prefix: 'transform/tiled/m/out/' },
    });
  });

  it('has its own encoding and machines where its package asks for them', async () => {
    const { job, shard } = await planOf('own', {
      tile: { ...MODEL.tile, encoding: { format: 'png' } },
      transform: {
        ...{ instanceType: 'ml.g6.xlarge', maxConcurrentTransforms: 2, packsPerInstance: 20 },
        maxInstances: undefined,
      },
      modelSeconds: 900,
    });
    expect(job?.modelSeconds).toBe(900);
    expect(shard.tiling).toMatchObject({ format: 'png', quality: 90 });
    expect(job?.transform).toEqual({
      ...config.transform,
      ...{ instanceType: 'ml.g6.xlarge', maxConcurrentTransforms: 2, packsPerInstance: 20 },
    });
  });
});

describe('how things ended', () => {
  /** What recordJob has, where SageMaker has no job of any name. */
  const recorder = () => ({ ...services, describe: async (): Promise<object | undefined> => undefined });
  const job = {
    ...config,
    model: 'm',
    version: '1',
    mode: 'transform' as const,
    begin: 'tile' as const,
    jobName: 'j',
    shardsUri: 's',
    modelUri: 'm',
    slides: 1,
    instanceCount: 2,
    join: { instanceType: 'ml.c5.xlarge', instanceCount: 3, volumeSizeInGB: 50 },
  };

  it.each([
    ['process', 'j-3', 'ml.g5.xlarge', 2],
    ['tile', 'j-tile-3', 'ml.g5.xlarge', 2],
    ['transform', 'j-transform-3', 'ml.g6.xlarge', 5],
    ['join', 'j-join-3', 'ml.c5.xlarge', 3],
  ] as const)('a job %s that succeeded counts its instance seconds', async (kind, jobName, type, count) => {
    const run = { ...RUN, runId: `ended-${kind}` };
    await recordJob(
      {
        ...{ run, job, kind, attempt: 3 },
        transform: { instanceType: 'ml.g6.xlarge', instanceCount: 5 },
        done: { jobName, startTime: 1_000, endTime: 61_500 },
      },
      recorder(),
    );
    expect(await Array.fromAsync(services.state.jobs(run.runId))).toEqual([
      expect.objectContaining({
        ...{ jobName, kind, state: 'SUCCEEDED', instanceType: type, instanceSeconds: 60.5 * count },
      }),
    ]);
  });

  it.each([
    ['process', 'SageMaker.ResourceLimitExceededException', 'limit is 0', 'JobQuota'],
    ['process', 'States.TaskFailed', JSON.stringify({ FailureReason: 'CapacityError: none' }), 'JobCapacity'],
    [
      'process',
      'States.TaskFailed',
      JSON.stringify({ FailureReason: 'AlgorithmError', ExitMessage: 'ModelPackageInvalid: x' }),
      'JobFailed',
    ],
    ['process', 'States.Timeout', '', 'JobTimedOut'],
    ['tile', 'States.TaskFailed', JSON.stringify({ FailureReason: 'AlgorithmError' }), 'TilingFailed'],
    ['transform', 'States.TaskFailed', JSON.stringify({ FailureReason: 'ClientError' }), 'TransformFailed'],
    ['transform', 'ModelCreationFailed', 'Requested image x not found.', 'ModelCreationFailed'],
    ['transform', 'ModelDigestMismatch', '{"errorMessage":"is no longer"}', 'ModelDigestMismatch'],
    ['join', 'States.TaskFailed', '', 'JoinFailed'],
  ] as const)('a job %s that failed with %s: %s', async (kind, error, cause, name) => {
    const run = { ...RUN, runId: `${kind}-${name}` };
    await recordJob(
      { ...{ run, job, kind, attempt: 1, transform: {} }, failure: { error, cause } },
      recorder(),
    );
    const [item] = await Array.fromAsync(services.state.jobs(run.runId));
    expect(item).toMatchObject({ kind, state: 'FAILED', instanceSeconds: 0, reason: { error: name } });
  });

  it('a Transform job that failed counts its instance seconds too', async () => {
    const run = { ...RUN, runId: 'failed-transform' };
    const cause = JSON.stringify({ TransformStartTime: 1_000, TransformEndTime: 3_000, FailureReason: 'x' });
    await recordJob(
      {
        ...{ run, job, kind: 'transform', attempt: 1 },
        transform: { instanceType: 'ml.g5.xlarge', instanceCount: 4, packs: 20, fruitless: 1 },
        failure: { error: 'States.TaskFailed', cause },
      },
      recorder(),
    );
    const [item] = await Array.fromAsync(services.state.jobs(run.runId));
    expect(item).toMatchObject({ instanceSeconds: 8, instanceCount: 4, packs: 20, fruitless: 1 });
  });

  it.each([
    ['transform', 'stopped', { TransformStartTime: 1, TransformEndTime: 9 }, 8],
    ['process', 'stopped', { ProcessingStartTime: 1, ProcessingEndTime: 9 }, 8],
    ['transform', 'being stopped', { TransformStartTime: -60 }, 60],
    ['transform', 'not begun', {}, 0],
  ] as const)('a job %s that was given up counts what it took: %s', async (kind, how, times, seconds) => {
    const run = { ...RUN, runId: `given-up-${kind}-${how.replace(' ', '-')}` };
    const asked: unknown[] = [];
    const describe = async (...given: unknown[]) => {
      asked.push(given);
      const entries = Object.entries(times).map(([name, time]) => [name, new Date(Date.now() + time * 1000)]);
      return Object.fromEntries(entries);
    };
    await recordJob(
      {
        ...{ run, job, kind, attempt: 2, transform: { instanceCount: 2 } },
        failure: { error: 'States.Timeout', cause: '' },
      },
      { ...services, describe },
    );
    expect(asked).toEqual([[kind, jobNameFor(job, kind, 2)]]);
    const [item] = await Array.fromAsync(services.state.jobs(run.runId));
    expect(item).toMatchObject({ state: 'FAILED', reason: { error: 'JobTimedOut' }, instanceCount: 2 });
    expect(Math.floor((item?.instanceSeconds ?? 0) / 2)).toBe(seconds);
    expect(item?.endedAt === undefined).toBe(seconds === 0);
  });

  it('a slide that no function could end is FAILED, unless it had ended', async () => {
    const failure = {
      run: RUN,
      slide: 'x',
      stage: 'IngestSlides',
      error: 'Sandbox.Timedout',
      cause: '{"errorMessage":"after 900 s"}',
    };
    await failSlide({ ...failure, slideId: 'f1' }, services);
    expect(await services.state.slide(RUN.runId, 'f1')).toMatchObject({
      state: 'FAILED',
      reason: { error: 'Sandbox.Timedout', message: 'IngestSlides: after 900 s' },
    });
    await services.state.transition(RUN.runId, 'f2', 'AGGREGATED', { slide: 'x' });
    await failSlide({ ...failure, slideId: 'f2' }, services);
    expect((await services.state.slide(RUN.runId, 'f2'))?.state).toBe('AGGREGATED');
  });

  it('a cause of any form becomes one short line', () => {
    fc.assert(
      fc.property(fc.oneof(fc.string(), fc.json()), (cause) => {
        const message = causeMessage(cause);
        expect(message.length).toBeGreaterThan(0);
        expect(message.length).toBeLessThanOrEqual(500);
        expect(message).not.toContain('\n');
      }),
    );
  });
});
