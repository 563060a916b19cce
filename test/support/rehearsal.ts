/**
 * A whole run by the project's own code on the local services, with the container's part played by the test: what
 * the record of a run looks like, without minutes of inference.
 */
import { randomBytes } from 'node:crypto';
import { buffer } from 'node:stream/consumers';
import { gzipSync } from 'node:zlib';
import { PutObjectCommand } from '@aws-sdk/client-s3';
import { pack } from 'tar-stream';
import { claimManifest } from '../../core/claim.ts';
import type {
  Completion,
  DuplicatePolicy,
  InferenceSlide,
  PlannedSlide,
  RunContext,
} from '../../core/contracts.ts';
import { planInference } from '../../core/inference.ts';
import { ingestSlide } from '../../core/ingest.ts';
import { recordJob } from '../../core/jobs.ts';
import { resultPrefix } from '../../core/keys.ts';
import { planRun } from '../../core/plan.ts';
import { PRICES } from '../../core/prices.ts';
import { publish } from '../../core/publish.ts';
import { LineageReader } from '../../core/record.ts';
import { aggregateSlide } from '../../core/slide-result.ts';
import { readLines, sha256, writeJson, writeObject } from '../../core/store.ts';
import { inferenceConfig } from './inference.ts';
import { MODEL, RUN, tileGrid, tilesParquet } from './results.ts';
import { type Services, startServices } from './services.ts';

export const STUDY = 'colon/2026';
export const BUCKETS = {
  landing: 'landing',
  bronze: 'bronze',
  silver: 'silver',
  models: 'models',
  anchors: 'anchors',
};
export const IMAGE = `000000000000.dkr.ecr.us-east-1.amazonaws.com/slideway-dev-slide-inference:1@sha256:${'cd'.repeat(32)}`;
const CODE_VERSION = '0.1.0';

export interface Rehearsal extends Services {
  record: LineageReader;
  put(bucket: string, key: string, body: string | Uint8Array): Promise<void>;
  /** Drops files and a manifest into Landing and takes the run to its end. */
  run(
    files: Record<string, string | Uint8Array>,
    manifest: string,
    duplicates?: DuplicatePolicy,
  ): Promise<RunContext>;
}

export async function startRehearsal(): Promise<Rehearsal> {
  const services = await startServices();
  for (const name of [BUCKETS.landing, BUCKETS.bronze, BUCKETS.models]) await services.createBucket(name);
  await services.createBucket(BUCKETS.anchors, 'COMPLIANCE');
  const put = async (bucket: string, key: string, body: string | Uint8Array) => {
    await services.s3.send(
      new PutObjectCommand({ Bucket: bucket, Key: key, Body: body, ChecksumAlgorithm: 'CRC64NVME' }),
    );
  };
  await put(BUCKETS.models, `models/${MODEL.name}/${MODEL.version}/model.tar.gz`, await modelPackage());
  return {
    ...services,
    record: new LineageReader(services.documents, 'lineage'),
    put,
    run: async (files, manifest, duplicates = 'skip') => {
      for (const [path, body] of Object.entries(files)) await put(BUCKETS.landing, `${STUDY}/${path}`, body);
      return wholeRun(services, manifest, duplicates);
    },
  };
}

async function modelPackage(): Promise<Buffer> {
  const tar = pack();
  tar.entry({ name: 'model.json' }, JSON.stringify(MODEL));
  tar.entry({ name: 'model.pt' }, 'weights');
  tar.finalize();
  return gzipSync(await buffer(tar));
}

async function wholeRun(
  services: Services,
  manifest: string,
  duplicates: DuplicatePolicy,
): Promise<RunContext> {
  const { s3, state } = services;
  const key = `${STUDY}/repo.csv`;
  const { ETag = '', VersionId } = await s3.send(
    new PutObjectCommand({ Bucket: BUCKETS.landing, Key: key, Body: manifest }),
  );
  const object = { key, etag: ETag.replaceAll('"', ''), ...(VersionId && { 'version-id': VersionId }) };
  const { run } = await claimManifest(
    {
      event: { detail: { bucket: { name: BUCKETS.landing }, object } },
      executionArn: 'arn:aws:states:us-east-1:000000000000:execution:slide-run:rehearsal',
      startedAt: new Date().toISOString(),
    },
    {
      ...services,
      config: { defaultModel: MODEL.name, parameters: RUN.parameters, codeVersion: CODE_VERSION },
    },
  );
  const { slides } = await planRun(run, {
    ...services,
    silverBucket: BUCKETS.silver,
    modelsBucket: BUCKETS.models,
    allowModelCode: false,
    codeVersion: CODE_VERSION,
  });
  for await (const slide of readLines<PlannedSlide>(s3, slides)) {
    if (slide.state !== 'EXPECTED') continue;
    await ingestSlide(run, slide, {
      ...services,
      duplicates,
      bronzeBucket: BUCKETS.bronze,
      requests: () => ({}),
    });
  }
  const inference = await planInference(run, {
    ...services,
    silverBucket: BUCKETS.silver,
    config: inferenceConfig('slideway-test'),
  });
  const inferred: InferenceSlide[] = await Array.fromAsync(readLines<InferenceSlide>(s3, inference.slides));
  for (const job of inference.jobs) {
    const jobName = `${job.jobName}-1`;
    for (const slide of inferred) await answer(services, run, slide, jobName, job.modelDigest ?? '');
    const ended = Date.now();
    await recordJob(
      {
        run,
        job,
        kind: 'process',
        attempt: 1,
        done: {
          jobName,
          startTime: ended - 60_000,
          endTime: ended,
          imageUri: IMAGE,
          roleArn: 'arn:aws:iam::000000000000:role/slideway-test-job',
        },
      },
      { ...services, describe: async () => undefined },
    );
  }
  for (const slide of inferred) {
    const dependencies = { ...services, codeVersion: CODE_VERSION, countedRequests: () => ({}) };
    await aggregateSlide({ run, slide }, dependencies);
  }
  await publish(
    { run },
    { ...services, state, codeVersion: CODE_VERSION, prices: PRICES, now: () => new Date() },
  );
  return run;
}

/** What the container leaves for a slide. */
async function answer(
  { s3 }: Services,
  { runId }: RunContext,
  { slideId, checksum }: InferenceSlide,
  jobName: string,
  digest: string,
): Promise<void> {
  const prefix = resultPrefix(runId, slideId, MODEL.name);
  const tiles = tileGrid(4, 2, 256, (x, y) => [x / 2 + y / 4]);
  const files: Record<string, Uint8Array> = {
    'tiles.parquet': tilesParquet(MODEL, tiles, { slideId, slideChecksum: checksum, modelDigest: digest }),
    'thumbnail.jpg': randomBytes(200),
    'tissue.geojson': Buffer.from('{"type":"FeatureCollection","features":[]}'),
  };
  for (const [name, bytes] of Object.entries(files)) {
    await writeObject(
      s3,
      { bucket: BUCKETS.silver, key: `${prefix}${name}` },
      bytes,
      'application/octet-stream',
    );
  }
  const marker: Completion = {
    runId,
    slideId,
    state: 'INFERRED',
    checksum,
    model: { name: MODEL.name, version: MODEL.version, digest },
    parameters: RUN.parameters,
    codeVersion: CODE_VERSION,
    jobName,
    completedAt: new Date().toISOString(),
    slide: {
      ...{ width: 2220, height: 2967, mppX: 0.499, mppY: 0.499, mppSource: 'file', levels: 1 },
      ...{ vendor: 'aperio', reader: 'openslide' },
    },
    tile: { px: 256, mpp: 0.5, overlap: 0, footprintX: 256.5, footprintY: 256.5, level: 0 },
    tiles: { grid: 8, kept: 8, ok: 8, unreadable: 0 },
    tissue: { areaMm2: 1.25, mpp: 8 },
    outputs: Object.fromEntries(
      Object.entries(files).map(([name, bytes]) => [
        name,
        { sha256: sha256(bytes).replace('sha256:', ''), bytes: bytes.byteLength },
      ]),
    ),
    timings: { infer: 2.5 },
    requests: { get: 10, put: 4 },
    device: 'cpu',
  };
  await writeJson(s3, { bucket: BUCKETS.silver, key: `${prefix}complete.json` }, marker);
}
