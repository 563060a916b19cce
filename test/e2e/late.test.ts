/**
 * Slides that come after their manifest: taken in and inferred without anyone asking, on the packaged deployment with
 * a quiet time of seconds. And Bronze, as the deployment's own policies keep it.
 */
import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import {
  DeleteObjectCommand,
  ListObjectsV2Command,
  ListObjectVersionsCommand,
  PutObjectCommand,
  S3Client,
} from '@aws-sdk/client-s3';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { BUNDLES, PROJECT } from '../../cli/paths.ts';
import { ensureModel } from '../../cli/setup/model.ts';
import { ensurePackage } from '../../cli/setup/package.ts';
import { Screen } from '../../cli/terminal.ts';
import type { RunSummary } from '../../core/contracts.ts';
import { runJsonKey } from '../../core/keys.ts';
import { readJson } from '../../core/store.ts';
import { type LocalAws, startLocalAws } from '../../local/engine.ts';
import { drawSlide, python, states, Workplace } from './support.ts';

const work = new Workplace();
const screen = new Screen(process.stderr, { quiet: true });
let aws: LocalAws;
let s3: S3Client;
const slides: Buffer[] = [];

/** The package of stage dev, with the quiet time of a test. */
async function impatientPackage(): Promise<string> {
  const folder = work.path('package');
  cpSync(await ensurePackage(screen, 'dev'), folder, { recursive: true });
  const path = join(folder, 'cloudformation-template-update-stack.json');
  const text = readFileSync(path, 'utf8');
  const changed = text
    .replace(/"QUIET_SECONDS": ?"?\d+"?/, '"QUIET_SECONDS": "2"')
    .replace(/"PATIENCE_SECONDS": ?"?\d+"?/, '"PATIENCE_SECONDS": "60"');
  expect(changed).not.toBe(text);
  writeFileSync(path, changed);
  return folder;
}

beforeAll(async () => {
  aws = await startLocalAws({
    state: work.path('state'),
    package: await impatientPackage(),
    python,
    containers: join(PROJECT, 'containers'),
    bundles: BUNDLES,
    timeScale: 0.01,
  });
  s3 = new S3Client({
    endpoint: aws.endpoint,
    region: aws.region,
    credentials: aws.credentials,
    forcePathStyle: true,
  });
  const model = readFileSync(await ensureModel(screen, python));
  await put('ModelsBucket', 'models/haematoxylin-area/1.0.0/model.tar.gz', model);
  for (const seed of [1, 2, 3]) {
    drawSlide(work.path(`${seed}.tiff`), '1024x1024', seed);
    slides.push(readFileSync(work.path(`${seed}.tiff`)));
  }
}, 240_000);
afterAll(async () => {
  s3?.destroy();
  await aws?.stop();
  work.remove();
});

const put = (bucket: string, key: string, body: Buffer | string) =>
  s3.send(new PutObjectCommand({ Bucket: aws.outputs[bucket], Key: key, Body: body }));

/** The ended runs of a study, once there are `count`; the first started first. */
async function runsOf(study: string, count: number): Promise<RunSummary[]> {
  const bucket = aws.outputs.SilverBucket ?? '';
  const deadline = Date.now() + 150_000;
  for (;;) {
    const { CommonPrefixes = [] } = await s3.send(
      new ListObjectsV2Command({ Bucket: bucket, Prefix: `runs/${study}-`, Delimiter: '/' }),
    );
    const found = await Promise.all(
      CommonPrefixes.map(({ Prefix = '' }) =>
        readJson(s3, { bucket, key: runJsonKey(Prefix.split('/')[1] ?? '') }),
      ),
    );
    const ended = found.filter((summary) => summary !== undefined) as RunSummary[];
    if (ended.length >= count && ended.length === CommonPrefixes.length)
      return ended.sort((a, b) => (a.startedAt < b.startedAt ? -1 : 1));
    if (Date.now() > deadline) throw new Error(`${ended.length} of ${count} runs of ${study} have ended`);
    await wait(250);
  }
}

it('late slides come together in one run that follows the one which missed them', async () => {
  await put('LandingBucket', 'late/one.tiff', slides[0] ?? '');
  await put(
    'LandingBucket',
    'late/repo.csv',
    'slide,slide_id,mpp\none.tiff,1,\ntwo.tiff,2,0.5\nthree.tiff,3,0.25\n',
  );
  const [first] = await runsOf('late', 1);
  expect(first?.reason).toBeNull();
  expect(first && states(first)).toEqual({
    '2 one.tiff': 'AGGREGATED',
    '3 two.tiff': 'MISSING SlideMissing',
    '4 three.tiff': 'MISSING SlideMissing',
  });

  await put('LandingBucket', 'late/two.tiff', slides[1] ?? '');
  await put('LandingBucket', 'late/three.tiff', slides[2] ?? '');
  const [, second] = await runsOf('late', 2);
  expect(second).toMatchObject({
    state: 'SUCCEEDED',
    followUp: { kind: 'late', of: first?.runId },
    parameters: first?.parameters,
    models: [{ name: 'haematoxylin-area', version: '1.0.0' }],
  });
  expect(second && states(second)).toEqual({ '2 two.tiff': 'AGGREGATED', '3 three.tiff': 'AGGREGATED' });
  expect(second?.slides.map(({ slideId }) => slideId)).toEqual(['2', '3']);

  // The same slides again, and another sweep: nothing more is started.
  await put('LandingBucket', 'late/two.tiff', slides[1] ?? '');
  await wait(3_000);
  await aws.services.lambda.invoke('slideway-dev-start-follow-up', {});
  expect(await runsOf('late', 2)).toHaveLength(2);
}, 240_000);

describe('Bronze', () => {
  const bronze = () => aws.outputs.BronzeBucket;
  const refused = { name: 'AccessDenied' };

  it('takes no write over what is there, and gives up no version, whoever asks', async () => {
    const { Versions = [] } = await s3.send(new ListObjectVersionsCommand({ Bucket: bronze() }));
    expect(Versions.map(({ Key }) => Key).sort()).toEqual([
      'slides/late/1/1.tiff',
      'slides/late/2/2.tiff',
      'slides/late/3/3.tiff',
    ]);
    const [{ Key, VersionId } = {}] = Versions;
    const where = { Bucket: bronze(), Key };
    await expect(s3.send(new PutObjectCommand({ ...where, Body: 'other' }))).rejects.toMatchObject(refused);
    await expect(
      s3.send(new PutObjectCommand({ ...where, Body: 'other', IfNoneMatch: '*' })),
    ).rejects.toMatchObject({ name: 'PreconditionFailed' });
    await expect(s3.send(new DeleteObjectCommand(where))).rejects.toMatchObject(refused);
    await expect(s3.send(new DeleteObjectCommand({ ...where, VersionId }))).rejects.toMatchObject(refused);
  });
});
