import { QueryCommand } from '@aws-sdk/lib-dynamodb';
import { decode } from 'fast-png';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { type Completion, type JobItem, modelSchema, type SlideResult } from '../../core/contracts.ts';
import { resultPrefix } from '../../core/keys.ts';
import { type AggregateDependencies, aggregateSlide } from '../../core/slide-result.ts';
import { readBytes, readJson, sha256, writeJson, writeObject } from '../../core/store.ts';
import {
  CLASSIFIER,
  EMBEDDER,
  type ExampleTile,
  inferenceSlide,
  MODEL,
  planned,
  RUN,
  tileGrid,
  writeAnswer,
  writePlan,
} from '../support/results.ts';
import { CREDENTIALS, type Services, startServices } from '../support/services.ts';

let services: Services;
let deps: AggregateDependencies;

beforeAll(async () => {
  services = await startServices();
  deps = { ...services, codeVersion: '0.1.0', countedRequests: () => ({ s3Get: 3, s3Put: 2 }) };
  await writePlan(services, [], [MODEL, CLASSIFIER, EMBEDDER, PERCENTILES, SERVED]);
});
afterAll(() => services.close());

const TILES: ExampleTile[] = tileGrid(4, 2, 256, (x, y) => [x / 2 + y / 4]);

const SERVED = modelSchema.parse({ ...MODEL, name: 'served', mode: 'transform' });
const PERCENTILES = modelSchema.parse({ ...MODEL, name: 'percentiles', aggregate: ['p99', 'p5'] });

/** Features of a few tiles, with the weight that the head gives to each. */
const FEATURES: ExampleTile[] = tileGrid(4, 2, 256, (x, y) => [x, y, 1]).map((tile, i) => ({
  ...tile,
  attention: i / 28,
}));
const HEAD = {
  task: 'classification',
  outputs: { benign: 0.25, malignant: 0.75 },
  tiles: FEATURES.length,
} as const;

const aggregate = (slideId: string, models?: string[]) =>
  aggregateSlide({ run: RUN, slide: inferenceSlide(slideId, models) }, deps);
const item = (slideId: string) => services.state.slide(RUN.runId, slideId);
const file = (slideId: string, name: string, model = MODEL.name) => ({
  bucket: services.silver,
  key: `${resultPrefix(RUN.runId, slideId, model)}${name}`,
});
const result = async (slideId: string, model?: string) =>
  (await readJson(services.s3, file(slideId, 'result.json', model))) as SlideResult;

async function actions(slideId: string): Promise<string[]> {
  const { Items = [] } = await services.documents.send(
    new QueryCommand({
      TableName: 'lineage',
      KeyConditionExpression: 'pk = :pk',
      ExpressionAttributeValues: { ':pk': `SLIDE#${slideId}` },
    }),
  );
  return Items.map(({ action }) => action as string);
}

async function spoilMarker(slideId: string, change: Partial<Completion>): Promise<void> {
  await writeAnswer(services, slideId, MODEL, TILES, change);
}

describe('a slide whose model answered', () => {
  it('gets its numbers, its picture and its state', async () => {
    await services.state.transition(RUN.runId, 'good', 'INFERRING', {
      slide: 'scans/good.svs',
      bronze: { bucket: 'bronze', key: 'slides/c/good/good.svs', files: [], size: 1, checksum: 'c' },
      requests: { s3Put: 1 },
    });
    await writeAnswer(services, 'good', MODEL, TILES);
    expect(await aggregate('good')).toEqual({ slideId: 'good', state: 'AGGREGATED' });

    const answer = await result('good');
    expect(answer.tiles).toEqual({ grid: 8, kept: 8, ok: 8, unreadable: 0 });
    expect(answer.outputs.haematoxylin_area?.mean).toBeCloseTo(0.25, 6);
    expect(answer.outputs.haematoxylin_area?.max).toBe(0.5);
    expect(answer.note).toBeNull();
    expect(answer.lineage.input.object).toEqual({ bucket: 'bronze', key: 'slides/c/good/good.svs' });

    const png = (await readBytes(services.s3, file('good', 'heatmap.png'))) ?? new Uint8Array();
    expect(`sha256:${answer.lineage.outputs['heatmap.png']?.sha256}`).toBe(sha256(png));
    expect(decode(png).width).toBe(answer.heatmap?.picture.width);

    const slide = await item('good');
    expect(slide?.state).toBe('AGGREGATED');
    expect(slide?.requests).toEqual({ s3Get: 13, s3Put: 7 });
    expect(slide?.results?.[0]?.outputs).toEqual({
      mean_haematoxylin_area: answer.outputs.haematoxylin_area?.mean,
      p90_haematoxylin_area: answer.outputs.haematoxylin_area?.p90,
      top_k_mean_haematoxylin_area: answer.outputs.haematoxylin_area?.top_k_mean,
    });
    expect(await actions('good')).toEqual(['SLIDE_INFERRED', 'SLIDE_AGGREGATED']);
  });

  it('is the same, byte for byte, when it is done again', async () => {
    const names = ['result.json', 'heatmap.png'];
    const read = () => Promise.all(names.map((name) => readBytes(services.s3, file('good', name))));
    const [before, state] = [await read(), await item('good')];
    expect(await aggregate('good')).toEqual({ slideId: 'good', state: 'AGGREGATED' });
    expect(await read()).toEqual(before);
    expect(await item('good')).toEqual(state);
    expect(await actions('good')).toHaveLength(2);
  });

  it('says what it could not look at', async () => {
    await writeAnswer(services, 'torn', MODEL, [...TILES, { minx: 0, miny: 512, side: 256 }]);
    await aggregate('torn');
    const answer = await result('torn');
    expect(answer.tiles).toEqual({ grid: 9, kept: 9, ok: 8, unreadable: 1 });
    expect(answer.outputs.haematoxylin_area?.mean).toBeCloseTo(0.25, 6);
    expect(answer.note).toMatch(/1 of 9 tiles/);
  });

  it('says when most of what is dense was taken for pen marks', async () => {
    const tissue = { areaMm2: 0, mpp: 8, inkFraction: 0.9 };
    await writeAnswer(services, 'inked', MODEL, [], { tissue });
    await aggregate('inked');
    const { note } = await result('inked');
    expect(note).toMatch(/No tissue.* pen marks/);
    expect((await item('inked'))?.results?.[0]?.note).toBe(note);
  });

  it('has nulls and no heatmap where there was no tissue', async () => {
    await writeAnswer(services, 'empty', MODEL, []);
    expect((await aggregate('empty')).state).toBe('AGGREGATED');
    const answer = await result('empty');
    expect(answer.outputs.haematoxylin_area?.mean).toBeNull();
    expect(answer.heatmap).toBeNull();
    expect(answer.note).toMatch(/No tissue/);
    expect(await readBytes(services.s3, file('empty', 'heatmap.png'))).toBeUndefined();
  });

  it('has its classes counted by mean and by vote', async () => {
    const tiles = tileGrid(3, 1, 256, (x) => [x < 0.5 ? 0.6 : 0, x < 0.5 ? 0.4 : 1, 0]);
    await writeAnswer(services, 'classes', CLASSIFIER, tiles);
    await aggregate('classes', [CLASSIFIER.name]);
    const { classes } = await result('classes', CLASSIFIER.name);
    expect(classes?.predictedByMean).toBe('epithelium');
    expect(classes?.predictedByVote).toBe('stroma');
    expect(classes?.votes).toEqual({ stroma: 2, epithelium: 1, fat: 0 });
    expect((await item('classes'))?.results?.[0]?.outputs.predicted_vote).toBe('stroma');
  });

  it('says which aggregates it has, and which of them were asked for', async () => {
    await writeAnswer(services, 'asked', PERCENTILES, TILES);
    await aggregate('asked', [PERCENTILES.name]);
    const { aggregates, outputs, mode } = await result('asked', PERCENTILES.name);
    expect(aggregates).toEqual({
      given: ['mean', 'median', 'p5', 'p10', 'p90', 'p99', 'max', 'top_k_mean'],
      asked: ['p5', 'p99'],
    });
    expect(Object.keys(outputs.haematoxylin_area ?? {})).toEqual(aggregates.given);
    expect(mode).toBe('processing');
    expect(Object.keys((await item('asked'))?.results?.[0]?.outputs ?? {})).toEqual([
      'p5_haematoxylin_area',
      'p99_haematoxylin_area',
    ]);
  });

  it('of an embedding has what its head says, and the features for programs only', async () => {
    await writeAnswer(services, 'embedded', EMBEDDER, FEATURES, {
      head: HEAD,
      mode: 'transform',
      tileset: { id: 'abc', reused: true, format: 'jpeg', quality: 90 },
    });
    await aggregate('embedded', [EMBEDDER.name]);
    const answer = await result('embedded', EMBEDDER.name);
    expect(answer.outputs).toEqual({ f0000: { mean: 0.375 }, f0001: { mean: 0.25 }, f0002: { mean: 1 } });
    expect(answer.aggregates).toEqual({ given: ['mean'], asked: ['mean'] });
    expect(answer.head).toEqual({ ...HEAD, predicted: 'malignant' });
    expect({ mode: answer.mode, tileset: answer.tileset?.id }).toEqual({ mode: 'transform', tileset: 'abc' });
    expect(answer.heatmap).toMatchObject({ output: 'attention', range: { of: 'p1-p99' } });
    expect((await item('embedded'))?.results?.[0]?.outputs).toEqual({
      head_benign: 0.25,
      head_malignant: 0.75,
      predicted_head: 'malignant',
    });
  });

  it('without a tile has no head’s answer either', async () => {
    await writeAnswer(services, 'headless', EMBEDDER, []);
    expect((await aggregate('headless', [EMBEDDER.name])).state).toBe('AGGREGATED');
    expect((await result('headless', EMBEDDER.name)).head).toBeNull();
    expect((await item('headless'))?.results?.[0]?.outputs).toEqual({
      head_benign: null,
      head_malignant: null,
      predicted_head: null,
    });
  });

  it.each([
    ['no answer of the head', undefined, /outputs of the package's head is undefined/],
    [
      'other outputs of the head',
      { ...HEAD, outputs: { benign: 1 } },
      /is benign, expected benign,malignant/,
    ],
    ['a head that saw other tiles', { ...HEAD, tiles: 7 }, /number of tiles of the head is 7, expected 8/],
  ])('is ResultCorrupt with %s', async (name, head, message) => {
    const slideId = name.replaceAll(/\W/g, '-');
    await writeAnswer(services, slideId, EMBEDDER, FEATURES, head && { head });
    await aggregate(slideId, [EMBEDDER.name]);
    expect((await item(slideId))?.reason).toMatchObject({
      error: 'ResultCorrupt',
      message: expect.stringMatching(message),
    });
  });
});

describe('a slide whose model did not answer', () => {
  it('takes state and reason from the marker', async () => {
    await spoilMarker('blurred', { state: 'QUARANTINED', error: 'MppUnknown', message: 'no µm per pixel' });
    expect((await aggregate('blurred')).state).toBe('QUARANTINED');
    expect((await item('blurred'))?.reason).toEqual({ error: 'MppUnknown', message: 'no µm per pixel' });
    expect(await actions('blurred')).toEqual(['SLIDE_QUARANTINED']);
  });

  it('is ResultMissing where no job failed, and JobFailed with its reason where one did', async () => {
    await aggregate('nothing');
    expect((await item('nothing'))?.reason?.error).toBe('ResultMissing');
    await services.state.putJob(RUN.runId, {
      jobName: 'job-1',
      model: MODEL.name,
      version: MODEL.version,
      state: 'FAILED',
      reason: { error: 'JobFailed', message: 'AlgorithmError: out of memory' },
      instanceType: 'ml.g5.xlarge',
      instanceCount: 1,
      instanceSeconds: 60,
    });
    await aggregate('nothing-2');
    expect((await item('nothing-2'))?.reason).toEqual({
      error: 'JobFailed',
      message: 'the job job-1 failed: AlgorithmError: out of memory',
    });
  });

  it('says in transform mode what the model’s inference ended with', async () => {
    const job = (
      jobName: string,
      kind: JobItem['kind'],
      state: JobItem['state'],
      error = 'TransformFailed',
    ) =>
      services.state.putJob(RUN.runId, {
        ...{ jobName, model: 'served', version: '1', state, ...(kind && { kind }) },
        ...(state === 'FAILED' && { reason: { error, message: 'why' } }),
        ...{ instanceType: 'ml.g5.xlarge', instanceCount: 1, instanceSeconds: 60 },
      });
    const why = async (slideId: string) => {
      await aggregate(slideId, ['served']);
      return (await item(slideId))?.reason;
    };
    await job('s-tile-1', 'tile', 'FAILED', 'TilingFailed');
    expect(await why('w1')).toEqual({ error: 'TilingFailed', message: 'the job s-tile-1 failed: why' });
    await job('s-tile-1', 'tile', 'SUCCEEDED');
    await job('s-transform-1', 'transform', 'SUCCEEDED');
    await job('s-transform-2', 'transform', 'FAILED', 'ModelDigestMismatch');
    expect((await why('w2'))?.error).toBe('ModelDigestMismatch');
    await job('s-join-1', 'join', 'FAILED', 'JoinFailed');
    expect((await why('w3'))?.error).toBe('JoinFailed');
    await job('s-join-2', 'join', 'SUCCEEDED');
    expect((await why('w4'))?.error).toBe('ResultMissing');
  });

  it('keeps the good result where only one of its models failed', async () => {
    await writeAnswer(services, 'half', MODEL, TILES);
    await writeAnswer(services, 'half', CLASSIFIER, [], {
      state: 'FAILED',
      error: 'ModelError',
      message: 'bad shape',
    });
    expect((await aggregate('half', [MODEL.name, CLASSIFIER.name])).state).toBe('FAILED');
    const slide = await item('half');
    expect(slide?.reason).toEqual({ error: 'ModelError', message: 'three-tissues: bad shape' });
    expect(slide?.results?.map(({ model }) => model)).toEqual([MODEL.name]);
  });

  it('does not move from a state in which it has ended', async () => {
    await services.state.transition(RUN.runId, 'ended', 'FAILED', { slide: 's' });
    await writeAnswer(services, 'ended', MODEL, TILES);
    expect((await aggregate('ended')).state).toBe('FAILED');
  });
});

describe('an answer that contradicts itself is ResultCorrupt:', () => {
  const corrupt = async (slideId: string) => {
    expect((await aggregate(slideId)).state).toBe('FAILED');
    const slide = await item(slideId);
    expect(slide?.reason?.error).toBe('ResultCorrupt');
    expect(slide?.results).toEqual([]);
    return slide?.reason?.message;
  };

  it('tiles that are not those of the marker', async () => {
    await writeAnswer(services, 'swapped', MODEL, TILES);
    await writeObject(services.s3, file('swapped', 'tiles.parquet'), 'other bytes', 'text/plain');
    expect(await corrupt('swapped')).toMatch(/SHA-256/);
  });

  it.each<[string, Partial<Completion>, RegExp]>([
    ['another-slide', { checksum: 'crc64nvme:else' }, /checksum of the slide/],
    ['another-model', { model: { ...MODEL, digest: 'sha256:00' } }, /digest of the model/],
    ['miscounted', { tiles: { grid: 8, kept: 7, ok: 7, unreadable: 0 } }, /number of tiles/],
    ['another-run', { runId: 'other' }, /run is other/],
  ])('%s', async (slideId, change, message) => {
    await spoilMarker(slideId, change);
    expect(await corrupt(slideId)).toMatch(message);
  });

  it('a marker that is not one', async () => {
    await writeJson(services.s3, file('scribble', 'complete.json'), { state: 'INFERRED' });
    expect(await corrupt('scribble')).toMatch(/complete.json, runId/);
  });

  it('a marker without its tiles', async () => {
    const { digest } = planned(MODEL);
    await writeAnswer(services, 'lent', MODEL, TILES);
    const marker = (await readJson(services.s3, file('lent', 'complete.json'))) as Completion;
    expect(marker.model.digest).toBe(digest);
    await writeJson(services.s3, file('borrowed', 'complete.json'), {
      ...marker,
      slideId: 'borrowed',
      checksum: 'crc64nvme:borrowed',
    });
    expect(await corrupt('borrowed')).toMatch(/tiles.parquet is not/);
  });
});

describe('the handler', () => {
  it('does the same from its environment, and refuses what is not its input', async () => {
    Object.assign(process.env, {
      AWS_ENDPOINT_URL: services.endpoint,
      AWS_REGION: 'us-east-1',
      AWS_ACCESS_KEY_ID: CREDENTIALS.accessKeyId,
      AWS_SECRET_ACCESS_KEY: CREDENTIALS.secretAccessKey,
      SILVER_BUCKET: services.silver,
      STATE_TABLE: 'state',
      LINEAGE_TABLE: 'lineage',
      STAGE: 'test',
      CODE_VERSION: '0.1.0',
      POWERTOOLS_SERVICE_NAME: 'aggregate-slide',
      POWERTOOLS_METRICS_NAMESPACE: 'Slideway',
      POWERTOOLS_LOG_LEVEL: 'SILENT',
    });
    const { handler } = await import('../../functions/aggregate-slide/handler.ts');
    const context = { functionName: 'aggregate-slide', awsRequestId: '1' } as never;
    await writeAnswer(services, 'handled', MODEL, TILES);
    const answer = await handler({ run: RUN, slide: inferenceSlide('handled') }, context);
    expect(answer).toEqual({ slideId: 'handled', state: 'AGGREGATED' });
    expect((await item('handled'))?.requests?.s3Put).toBeGreaterThanOrEqual(2 + 4);
    await expect(handler({ run: RUN }, context)).rejects.toThrow(/slide/);
  });
});
