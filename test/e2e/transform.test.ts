/** Models in transform mode on the packaged deployment: the same numbers as in processing mode, tiles made once. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { buffer } from 'node:stream/consumers';
import { setTimeout as wait } from 'node:timers/promises';
import { gunzipSync, gzipSync } from 'node:zlib';
import { ListObjectsV2Command, PutObjectCommand, S3Client } from '@aws-sdk/client-s3';
import { ListModelsCommand, SageMakerClient } from '@aws-sdk/client-sagemaker';
import { ListExecutionsCommand, SFNClient } from '@aws-sdk/client-sfn';
import { extract, pack } from 'tar-stream';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { BUNDLES, PROJECT } from '../../cli/paths.ts';
import { ensureModel } from '../../cli/setup/model.ts';
import { ensurePackage } from '../../cli/setup/package.ts';
import { Screen } from '../../cli/terminal.ts';
import {
  type Completion,
  type Model,
  modelSchema,
  outputNames,
  type RunSummary,
} from '../../core/contracts.ts';
import { modelKey, resultPrefix, runJsonKey, TILES_PREFIX } from '../../core/keys.ts';
import { readBytes, readJson } from '../../core/store.ts';
import { readTiles } from '../../core/tiles.ts';
import { type LocalAws, startLocalAws } from '../../local/engine.ts';
import { drawSlide, python, runPython, Workplace } from './support.ts';

const work = new Workplace();
const screen = new Screen(process.stderr, { quiet: true });
let aws: LocalAws;
let s3: S3Client;
let sageMaker: SageMakerClient;
let stepFunctions: SFNClient;
let silver: string;
const models = new Map<string, Model>();

beforeAll(async () => {
  aws = await startLocalAws({
    state: work.path('state'),
    package: await ensurePackage(screen, 'dev'),
    python,
    containers: join(PROJECT, 'containers'),
    bundles: BUNDLES,
    timeScale: 0.001,
  });
  const config = { endpoint: aws.endpoint, region: aws.region, credentials: aws.credentials };
  s3 = new S3Client({ ...config, forcePathStyle: true });
  sageMaker = new SageMakerClient(config);
  stepFunctions = new SFNClient(config);
  silver = aws.outputs.SilverBucket ?? '';
  const area = await unpacked(readFileSync(await ensureModel(screen, python)));
  await register(area, {});
  await register(area, { name: 'area-png', mode: 'transform', encoding: { format: 'png' } });
  await register(area, { name: 'area-jpeg', mode: 'transform', encoding: { format: 'jpeg', quality: 90 } });
  drawSlide(work.path('a.tiff'), '2048x1536', 1);
  drawSlide(work.path('b.tiff'), '1024x1024', 2);
}, 240_000);
afterAll(async () => {
  for (const client of [s3, sageMaker, stepFunctions]) client?.destroy();
  await aws?.stop();
  work.remove();
});

type Files = Map<string, Uint8Array>;

async function unpacked(archive: Buffer): Promise<Files> {
  const files: Files = new Map();
  const tar = extract();
  tar.end(gunzipSync(archive));
  for await (const entry of tar) files.set(entry.header.name.replace(/^\.\//, ''), await buffer(entry));
  return files;
}

/** Puts a package into the register with its descriptor changed. */
async function register(
  files: Files,
  { encoding, ...change }: Partial<Model> & { encoding?: Model['tile']['encoding'] },
): Promise<void> {
  const document = JSON.parse(Buffer.from(files.get('model.json') ?? []).toString());
  const descriptor = { ...document, ...change, tile: { ...document.tile, ...(encoding && { encoding }) } };
  const tar = pack();
  tar.entry({ name: 'model.json' }, JSON.stringify(descriptor));
  for (const [name, bytes] of files) if (name !== 'model.json') tar.entry({ name }, Buffer.from(bytes));
  tar.finalize();
  const model = modelSchema.parse(descriptor);
  models.set(model.name, model);
  await put(aws.outputs.ModelsBucket, modelKey(model.name, model.version), gzipSync(await buffer(tar)));
}

const put = (bucket: string | undefined, key: string, body: Buffer | string) =>
  s3.send(new PutObjectCommand({ Bucket: bucket, Key: key, Body: body }));

let known = 0;
/** Drops a study and waits for its run's end. */
async function run(
  study: string,
  files: string[],
  rows: string,
): Promise<{ summary: RunSummary; transitions: number }> {
  for (const name of files)
    await put(aws.outputs.LandingBucket, `${study}/${name}`, readFileSync(work.path(name)));
  await put(aws.outputs.LandingBucket, `${study}/repo.csv`, rows);
  known += 1;
  const deadline = Date.now() + 240_000;
  for (;;) {
    const { executions = [] } = await stepFunctions.send(
      new ListExecutionsCommand({ stateMachineArn: aws.outputs.StateMachineArn }),
    );
    const [newest] = executions;
    if (executions.length === known && newest && newest.status !== 'RUNNING') {
      const { CommonPrefixes = [] } = await s3.send(
        new ListObjectsV2Command({ Bucket: silver, Prefix: `runs/${study}-`, Delimiter: '/' }),
      );
      const runId = CommonPrefixes[0]?.Prefix?.split('/')[1] ?? '';
      const summary = (await readJson(s3, { bucket: silver, key: runJsonKey(runId) })) as RunSummary;
      const { standard } = aws.services.stepFunctions.transitions(newest.executionArn ?? '');
      return { summary, transitions: standard };
    }
    if (Date.now() > deadline) throw new Error(`still running: ${JSON.stringify(executions)}`);
    await wait(200);
  }
}

/** What one model says of one slide, tile by tile. */
async function tilesOf(runId: string, slideId: string, name: string) {
  const model = models.get(name);
  if (!model) throw new Error(`no model ${name}`);
  const prefix = resultPrefix(runId, slideId, name);
  const bytes = await readBytes(s3, { bucket: silver, key: `${prefix}tiles.parquet` });
  if (!bytes) throw new Error(`${prefix} has no tiles.parquet`);
  const tiles = await readTiles(bytes, model);
  const marker = (await readJson(s3, { bucket: silver, key: `${prefix}complete.json` })) as Completion;
  const values = await Promise.all(outputNames(model).map((output) => tiles.values(output)));
  const { minx, miny, width, height, readable } = tiles;
  return { marker, values, places: { minx, miny, width, height, readable } };
}

const slidesOf = ({ slides }: RunSummary) => slides.map(({ slideId }) => slideId);

async function tileObjects(): Promise<Map<string, Date | undefined>> {
  const { Contents = [] } = await s3.send(new ListObjectsV2Command({ Bucket: silver, Prefix: TILES_PREFIX }));
  return new Map(Contents.map(({ Key = '', LastModified }) => [Key, LastModified]));
}

describe('one run with models of both modes', () => {
  let summary: RunSummary;
  let transitions: number;

  beforeAll(async () => {
    const three = 'haematoxylin-area|area-png|area-jpeg';
    ({ summary, transitions } = await run(
      'both',
      ['a.tiff', 'b.tiff'],
      // The second slide's level has not the model's pixel size, so that its tiles are resampled and encoded anew.
      `slide,model,mpp\na.tiff,${three},\nb.tiff,${three},0.4\n`,
    ));
  }, 240_000);

  it('has every slide done by every model', () => {
    expect(summary.slides.map(({ state, reason, results }) => [state, reason, results.length])).toEqual([
      ['AGGREGATED', null, 3],
      ['AGGREGATED', null, 3],
    ]);
    expect(summary.state).toBe('SUCCEEDED');
  });

  it('gives, from lossless tiles, the same values to the last bit', async () => {
    for (const slideId of slidesOf(summary)) {
      const whole = await tilesOf(summary.runId, slideId, 'haematoxylin-area');
      const tiled = await tilesOf(summary.runId, slideId, 'area-png');
      expect(whole.marker.tiles?.kept).toBeGreaterThan(4);
      expect(tiled.places).toEqual(whole.places);
      expect(tiled.values).toEqual(whole.values);
      expect(tiled.marker).toMatchObject({
        mode: 'transform',
        tiles: whole.marker.tiles,
        tissue: whole.marker.tissue,
        tileset: { reused: false, format: 'png' },
      });
    }
  });

  it('gives, from JPEG tiles, the same values where they are the slide’s own, and close ones elsewhere', async () => {
    const apart = await Promise.all(
      slidesOf(summary).map(async (slideId) => {
        const whole = await tilesOf(summary.runId, slideId, 'haematoxylin-area');
        const tiled = await tilesOf(summary.runId, slideId, 'area-jpeg');
        expect(tiled.places).toEqual(whole.places);
        const [a = new Float32Array(), b = new Float32Array()] = [whole.values[0], tiled.values[0]];
        return Math.max(...a.map((value, index) => Math.abs(value - (b[index] ?? 0))));
      }),
    );
    expect(apart[0]).toBe(0);
    expect(apart[1]).toBeGreaterThan(0);
    expect(apart[1]).toBeLessThan(0.05);
  });

  it('has each SageMaker job on record, with its machines and what they took, and no model left', async () => {
    const jobs = summary.jobs.map(({ kind, model, state, instanceType }) => [
      model,
      kind,
      state,
      instanceType,
    ]);
    const transform = (model: string) => [
      [model, 'join', 'SUCCEEDED', 'ml.c5.xlarge'],
      [model, 'tile', 'SUCCEEDED', 'ml.c5.4xlarge'],
      [model, 'transform', 'SUCCEEDED', 'ml.g5.xlarge'],
    ];
    expect(jobs.sort()).toEqual([
      ...transform('area-jpeg'),
      ...transform('area-png'),
      ['haematoxylin-area', 'process', 'SUCCEEDED', 'ml.g5.xlarge'],
    ]);
    for (const { instanceSeconds } of summary.jobs) expect(instanceSeconds).toBeGreaterThan(0);
    expect(summary.cost.unpriced).toEqual([]);
    expect((await sageMaker.send(new ListModelsCommand({}))).Models).toEqual([]);
  });

  it('has its state transitions counted as Step Functions counts them', () => {
    expect(summary.cost.transitions).toBe(transitions);
  });
});

it('a slide that was tiled with the same parameters is not tiled again, whatever the model', async () => {
  const before = await tileObjects();
  expect([...before.keys()].filter((key) => key.endsWith('.tar')).length).toBeGreaterThan(1);
  const files = await unpacked(readFileSync(await ensureModel(screen, python)));
  await register(files, { name: 'area-again', mode: 'transform', encoding: { format: 'png' } });
  const { summary } = await run('again', ['a.tiff'], 'slide,model\na.tiff,area-again\n');
  expect(summary.slides[0]).toMatchObject({ state: 'AGGREGATED' });
  const [slideId = ''] = slidesOf(summary);
  expect((await tilesOf(summary.runId, slideId, 'area-again')).marker.tileset).toMatchObject({
    reused: true,
  });
  expect(await tileObjects()).toEqual(before);
}, 240_000);

it('a model that raises on one tile fails that slide, and no other', async () => {
  runPython(
    work,
    `
import sys
import numpy as np, tifffile

for path, marked in zip(sys.argv[1:], (False, True)):
    pixels = np.full((1024, 1024, 3), (170, 100, 180), np.uint8)
    if marked:
        pixels[256:512, 512:768] = (90, 30, 100)
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", compression="deflate",
                     resolution=(20000, 20000), resolutionunit="CENTIMETER")
`,
    work.path('plain.tiff'),
    work.path('marked.tiff'),
  );
  const code = `
import torch


class Mean(torch.nn.Module):
    def forward(self, tiles):
        means = tiles.mean(dim=(1, 2, 3))
        if float(tiles[:, 0].mean(dim=(1, 2)).min()) < 0.5:
            raise ValueError("this tile is too dark")
        return means[:, None]


def model_fn(model_dir):
    return Mean()
`;
  const descriptor = {
    ...models.get('area-png'),
    ...{ name: 'picky', outputs: ['mean'], heatmap: undefined },
    input: { mean: [0, 0, 0], std: [1, 1, 1], range: [0, 1] },
  };
  const files: Files = new Map([
    ['model.json', Buffer.from(JSON.stringify(descriptor))],
    ['code/inference.py', Buffer.from(code)],
  ]);
  await register(files, {});
  const { summary } = await run(
    'picky',
    ['plain.tiff', 'marked.tiff'],
    'slide,model,mpp\nplain.tiff,picky,0.5\nmarked.tiff,picky,0.5\n',
  );
  expect(summary).toMatchObject({ state: 'PARTIAL', reason: null });
  expect(summary.slides.map(({ slide, state, reason }) => [slide, state, reason?.error])).toEqual([
    ['plain.tiff', 'AGGREGATED', undefined],
    ['marked.tiff', 'FAILED', 'ModelError'],
  ]);
  expect(summary.slides[1]?.reason?.message).toContain('too dark');
  expect(summary.jobs.filter(({ kind }) => kind === 'transform')).toHaveLength(1);
}, 240_000);
