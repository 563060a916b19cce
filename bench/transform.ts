/**
 * What Batch Transform asks of S3 for a million tiles: tiles in packs beside tiles as single objects. A drawn slide is
 * tiled, scored and joined by the real jobs on the local AWS, which counts their requests; what grows with the tiles,
 * the packs and the slides is then grown to a million tiles, and priced by core/prices.ts.
 */
import { execFileSync } from 'node:child_process';
import { createReadStream } from 'node:fs';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { GetObjectCommand, PutObjectCommand, paginateListObjectsV2, S3Client } from '@aws-sdk/client-s3';
import {
  CreateModelCommand,
  CreateProcessingJobCommand,
  CreateTransformJobCommand,
  DescribeProcessingJobCommand,
  DescribeTransformJobCommand,
  SageMakerClient,
} from '@aws-sdk/client-sagemaker';
import { ensureReady, type Ready } from '../cli/commands/setup.ts';
import { BUNDLES, CONTAINER, PROJECT } from '../cli/paths.ts';
import { type Screen, UserError } from '../cli/terminal.ts';
import { forEachConcurrently } from '../core/concurrency.ts';
import type { Shard } from '../core/contracts.ts';
import { jobPrefix, modelKey, shardKey, slidesPrefix, tiledPrefix, transformedPrefix } from '../core/keys.ts';
import { type ModelPackage, readModelPackage } from '../core/models.ts';
import { PRICES } from '../core/prices.ts';
import { writeJson } from '../core/store.ts';
import { type LocalAws, startLocalAws } from '../local/engine.ts';
import { LOCAL_ACCOUNT, LOCAL_REGION } from '../local/types.ts';
import type { Bench, Context, Measured } from './bench.ts';

/** Tiles that one slide has, where the requests that are once a slide are grown. */
const TILES_A_SLIDE = 10_000;
const MILLION = 1_000_000;
/** A stage's packs; those that are measured are small, so that there are many of them for one slide. */
const PACK_BYTES = 12 * MILLION;
const MEASURED_PACK_BYTES = MILLION / 4;
const GB = 1e9;

export const transform: Bench = {
  name: 'transform',
  about: 'S3 requests, bytes and dollars of Batch Transform for a million tiles: packs beside single objects',
  measure,
};

/** S3 requests in the two classes of the price list. */
interface Requests {
  s3Get: number;
  s3Put: number;
}

/** What one way to hand over a slide's tiles asked for, from its tiling to its predictions read. */
interface Way {
  tiles: number;
  /** Objects that were handed to the Transform job. */
  handed: number;
  /** Of the tiles, and of the predictions for them. */
  bytes: { tiles: number; predictions: number };
  requests: Requests;
}

async function measure({ quick, screen }: Context): Promise<Measured> {
  const ready = await ensureReady(screen, { stage: 'dev' });
  const folder = await mkdtemp(join(tmpdir(), 'slideway-bench-'));
  const lab = await Lab.open(ready, folder);
  try {
    const slide = join(folder, 'slide.tiff');
    const size = quick ? '2048x2048' : '12288x8192';
    await screen.task(`Drawing a slide of ${size}`, async () => draw(ready.python, slide, size));
    await lab.take(slide);
    const packs = await lab.packs(screen);
    const objects = await lab.objects(screen);
    return figuresOf(packs, objects);
  } finally {
    await lab.close();
    await rm(folder, { recursive: true, force: true });
  }
}

function draw(python: string, path: string, size: string): void {
  const script = join(CONTAINER, 'demo', 'make_slides.py');
  execFileSync(python, ['-B', script, '--out', path, '--size', size, '--seed', '1'], { stdio: 'pipe' });
}

/** What is asked once for each thing handed over, and what once for the slide whatever is in it. */
function grow(way: Way, handedForAMillion: number): Requests {
  // Each is written by the tiler, read and answered by the Transform job, and its answer read.
  const { handed, requests } = way;
  const of = (count: number) => {
    const each = Math.round(count / handed);
    const once = Math.max(0, count - each * handed);
    return each * handedForAMillion + once * (MILLION / TILES_A_SLIDE);
  };
  return { s3Get: of(requests.s3Get), s3Put: of(requests.s3Put) };
}

const usd = ({ s3Get, s3Put }: Requests) =>
  s3Get * (PRICES.requests.s3Get ?? 0) + s3Put * (PRICES.requests.s3Put ?? 0);

function figuresOf(packs: Way, objects: Way): Measured {
  const bytesATile = packs.bytes.tiles / packs.tiles;
  const grown = {
    packs: grow(packs, Math.ceil((bytesATile * MILLION) / PACK_BYTES)),
    'single objects': grow(objects, MILLION),
  };
  const figures: Record<string, number> = { 'tiles measured': packs.tiles, 'packs measured': packs.handed };
  for (const [name, way] of [
    ['packs', packs],
    ['single objects', objects],
  ] as const) {
    const requests = grown[name];
    figures[`${name}: requests counted`] = way.requests.s3Get + way.requests.s3Put;
    figures[`${name}: PUT and LIST a million tiles`] = requests.s3Put;
    figures[`${name}: GET and HEAD a million tiles`] = requests.s3Get;
    figures[`${name}: GB of tiles a million tiles`] = ((way.bytes.tiles / way.tiles) * MILLION) / GB;
    figures[`${name}: GB of predictions a million tiles`] =
      ((way.bytes.predictions / way.tiles) * MILLION) / GB;
    figures[`${name}: USD of requests a million tiles`] = usd(requests);
  }
  return {
    figures,
    ratios: {
      'USD of single objects, to packs': usd(grown['single objects']) / usd(grown.packs),
      'bytes of single objects, to packs': objects.bytes.tiles / packs.bytes.tiles,
    },
  };
}

/** The local AWS with a slide and a model, and the jobs of one run after the other. */
class Lab {
  readonly #aws: LocalAws;
  readonly #s3: S3Client;
  readonly #sageMaker: SageMakerClient;
  readonly #silver: string;
  readonly #package: ModelPackage;
  #slide: Shard['slides'][number] | undefined;

  private constructor(aws: LocalAws, model: ModelPackage) {
    const client = { endpoint: aws.endpoint, region: aws.region, credentials: aws.credentials };
    this.#aws = aws;
    this.#s3 = new S3Client({ ...client, forcePathStyle: true });
    this.#sageMaker = new SageMakerClient(client);
    this.#silver = aws.outputs.SilverBucket ?? '';
    this.#package = model;
  }

  static async open(ready: Ready, folder: string): Promise<Lab> {
    const aws = await startLocalAws({
      state: join(folder, 'state'),
      package: ready.package,
      python: ready.python,
      containers: join(PROJECT, 'containers'),
      bundles: BUNDLES,
      executor: 'process',
    });
    const lab = new Lab(aws, await readModelPackage(createReadStream(ready.model)));
    const body = await readFile(ready.model);
    await lab.#s3.send(
      new PutObjectCommand({ Bucket: aws.outputs.ModelsBucket, Key: lab.#modelKey, Body: body }),
    );
    return lab;
  }

  async close(): Promise<void> {
    this.#s3.destroy();
    this.#sageMaker.destroy();
    await this.#aws.stop();
  }

  get #modelKey(): string {
    const { name, version } = this.#package.model;
    return modelKey(name, version);
  }

  /** Puts the slide into Bronze. */
  async take(path: string): Promise<void> {
    const bucket = this.#aws.outputs.BronzeBucket ?? '';
    const key = 'slides/bench/slide/slide.tiff';
    const body = await readFile(path);
    const { ChecksumCRC64NVME: crc, VersionId: versionId } = await this.#s3.send(
      new PutObjectCommand({
        ...{ Bucket: bucket, Key: key, Body: body, IfNoneMatch: '*', ChecksumAlgorithm: 'CRC64NVME' },
      }),
    );
    const checksum = `crc64nvme:${crc}`;
    const file = { key, size: body.length, checksum, ...(versionId && { versionId }) };
    this.#slide = {
      slideId: 'slide',
      slide: 'slide.tiff',
      bronze: { bucket, key, files: [file], size: body.length, checksum },
    };
  }

  /** Packs: tiled, scored and joined, as runs do it. */
  async packs(screen: Screen): Promise<Way> {
    const run = 'bench-packs';
    const before = this.#counted();
    await screen.task('Tiling into packs', () => this.#tile(run, false));
    const tiled = this.#counted();
    const packs = await this.#list(`tiles/${run}/`, '.tar');
    const manifest = `transform/${run}/${this.#package.model.name}/attempt-1/manifest.json`;
    const names = packs.map(({ key }) => key.slice('tiles/'.length));
    await writeJson(this.#s3, { bucket: this.#silver, key: manifest }, [
      { prefix: `s3://${this.#silver}/tiles/` },
      ...names,
    ]);
    await screen.task(`Scoring ${packs.length} packs`, () =>
      this.#score(
        run,
        { S3DataType: 'ManifestFile', S3Uri: `s3://${this.#silver}/${manifest}` },
        'application/x-tar',
      ),
    );
    await screen.task('Joining', () => this.#process(run, 'join'));
    return this.#way(run, packs, before, tiled);
  }

  /** Single objects: tiled into these too, scored one by one, each answer read. */
  async objects(screen: Screen): Promise<Way> {
    const run = 'bench-objects';
    const before = this.#counted();
    await screen.task('Tiling into single objects', () => this.#tile(run, true));
    const tiled = this.#counted();
    const packs = await this.#list(`tiles/${run}/`, '.tar');
    const objects = await this.#list(`tiles/${run}/`, '.jpg', '/objects/');
    const [first] = objects;
    if (!first) throw new UserError('The tiler wrote no single objects.');
    const folder = first.key.slice(0, first.key.lastIndexOf('/') + 1);
    await screen.task(`Scoring ${objects.length} objects`, () =>
      this.#score(run, { S3DataType: 'S3Prefix', S3Uri: `s3://${this.#silver}/${folder}` }, 'image/jpeg'),
    );
    const answers = await this.#list(transformedPrefix(run, this.#package.model.name), '.out');
    await screen.task(`Reading ${answers.length} answers`, () =>
      forEachConcurrently(answers, 8, async ({ key }) => {
        const { Body } = await this.#s3.send(new GetObjectCommand({ Bucket: this.#silver, Key: key }));
        await Body?.transformToByteArray();
      }),
    );
    const way = await this.#way(run, objects, before, tiled);
    // What reads the answers is this bench itself; the packs, which the tiler writes too, are not this way's.
    way.requests.s3Get += answers.length;
    way.requests.s3Put += Math.ceil(answers.length / 1000) - packs.length;
    return way;
  }

  /** What was written since `before`, and read since `tiled`: the tiler reads the slide alike in both ways. */
  async #way(
    run: string,
    handed: { key: string; bytes: number }[],
    before: Requests,
    tiled: Requests,
  ): Promise<Way> {
    const after = this.#counted();
    const answers = await this.#list(transformedPrefix(run, this.#package.model.name), '.out');
    const sum = (objects: { bytes: number }[]) => objects.reduce((total, { bytes }) => total + bytes, 0);
    return {
      tiles: await this.#tilesOf(run),
      handed: handed.length,
      bytes: { tiles: sum(handed), predictions: sum(answers) },
      requests: { s3Get: after.s3Get - tiled.s3Get, s3Put: after.s3Put - before.s3Put },
    };
  }

  async #tilesOf(run: string): Promise<number> {
    const key = `${tiledPrefix(run, this.#package.model.name)}slide.json`;
    const { Body } = await this.#s3.send(new GetObjectCommand({ Bucket: this.#silver, Key: key }));
    const { tiles } = JSON.parse((await Body?.transformToString()) ?? '') as { tiles?: { ok: number } };
    if (!tiles?.ok) throw new UserError('The tiler found no tissue on the drawn slide.');
    return tiles.ok;
  }

  /** What the jobs' roles have asked of S3 so far. */
  #counted(): Requests {
    const requests: Requests = { s3Get: 0, s3Put: 0 };
    for (const [arn, counts] of Object.entries(this.#aws.counts().byPrincipal)) {
      if (!/role\/slideway-dev-(job|transform)-/.test(arn)) continue;
      for (const [name, count] of Object.entries(counts)) {
        if (name === 's3.get') requests.s3Get += count;
        else if (name.startsWith('s3.')) requests.s3Put += count;
      }
    }
    return requests;
  }

  async #list(prefix: string, suffix: string, within = ''): Promise<{ key: string; bytes: number }[]> {
    const found: { key: string; bytes: number }[] = [];
    const pages = paginateListObjectsV2({ client: this.#s3 }, { Bucket: this.#silver, Prefix: prefix });
    for await (const { Contents = [] } of pages)
      for (const { Key: key = '', Size: bytes = 0 } of Contents)
        if (key.endsWith(suffix) && key.includes(within)) found.push({ key, bytes });
    return found;
  }

  async #tile(run: string, objects: boolean): Promise<void> {
    if (!this.#slide) throw new Error('there is no slide yet');
    const { model, digest } = this.#package;
    const { name, version, tile } = model;
    const bucket = this.#silver;
    const place = (prefix: string) => ({ bucket, prefix });
    const shard: Shard = {
      ...{ runId: run, shard: 0, shards: 1, codeVersion: 'bench', slides: [this.#slide] },
      model: { name, version, digest, bucket: this.#aws.outputs.ModelsBucket ?? '', key: this.#modelKey },
      parameters: { tissueMinFraction: 0.5, mppTolerance: 0.02 },
      tile: { px: tile.px, mpp: tile.mpp, overlap: tile.overlap },
      output: place(slidesPrefix(run)),
      tiling: {
        ...place(`tiles/${run}/`),
        ...{ format: 'jpeg', quality: 90, packBytes: MEASURED_PACK_BYTES, objects, keepDays: 7 },
      },
      tiled: place(tiledPrefix(run, name)),
      transformed: place(transformedPrefix(run, name)),
    };
    await writeJson(this.#s3, { bucket, key: shardKey(run, name, 0) }, shard);
    await this.#process(run, 'tile');
  }

  /** A Processing job of that kind to its end. */
  async #process(run: string, kind: 'tile' | 'join'): Promise<void> {
    const ProcessingJobName = `slideway-dev-${run}-${kind}`;
    const { name } = this.#package.model;
    const input = (input: string, uri: string) => ({
      InputName: input,
      S3Input: {
        S3Uri: uri,
        LocalPath: `/opt/ml/processing/input/${input}`,
        ...({ S3DataType: 'S3Prefix', S3InputMode: 'File' } as const),
      },
    });
    await this.#sageMaker.send(
      new CreateProcessingJobCommand({
        ProcessingJobName,
        RoleArn: roleArn('job'),
        AppSpecification: { ImageUri: IMAGE, ContainerArguments: [kind] },
        ProcessingInputs: [
          input('shards', `s3://${this.#silver}/${jobPrefix(run, name)}`),
          ...(kind === 'join' ? [input('model', this.#modelUri)] : []),
        ],
        ProcessingResources: {
          ClusterConfig: { InstanceCount: 1, InstanceType: 'ml.c5.4xlarge', VolumeSizeInGB: 30 },
        },
      }),
    );
    await this.#ended(ProcessingJobName, async () => {
      const job = await this.#sageMaker.send(new DescribeProcessingJobCommand({ ProcessingJobName }));
      return [job.ProcessingJobStatus, job.ExitMessage ?? job.FailureReason];
    });
  }

  /** The model served to a Transform job, to its end. */
  async #score(
    run: string,
    S3DataSource: { S3DataType: 'ManifestFile' | 'S3Prefix'; S3Uri: string },
    ContentType: string,
  ): Promise<void> {
    const TransformJobName = `slideway-dev-${run}`;
    await this.#sageMaker.send(
      new CreateModelCommand({
        ModelName: TransformJobName,
        ExecutionRoleArn: roleArn('transform'),
        PrimaryContainer: { Image: IMAGE, ModelDataUrl: this.#modelUri },
        EnableNetworkIsolation: true,
      }),
    );
    const out = transformedPrefix(run, this.#package.model.name);
    await this.#sageMaker.send(
      new CreateTransformJobCommand({
        TransformJobName,
        ModelName: TransformJobName,
        ...{ MaxConcurrentTransforms: 7, MaxPayloadInMB: 13 },
        TransformInput: { DataSource: { S3DataSource }, ContentType },
        TransformOutput: { S3OutputPath: `s3://${this.#silver}/${out}` },
        TransformResources: { InstanceType: 'ml.g5.xlarge', InstanceCount: 1 },
      }),
    );
    await this.#ended(TransformJobName, async () => {
      const job = await this.#sageMaker.send(new DescribeTransformJobCommand({ TransformJobName }));
      return [job.TransformJobStatus, job.FailureReason];
    });
  }

  async #ended(job: string, look: () => Promise<[string | undefined, string | undefined]>): Promise<void> {
    for (;;) {
      const [status, reason] = await look();
      if (status === 'Completed') return;
      if (status !== 'InProgress') throw new UserError(`The job ${job} ended ${status}: ${reason}`);
      await sleep(250);
    }
  }

  get #modelUri(): string {
    return `s3://${this.#aws.outputs.ModelsBucket}/${this.#modelKey}`;
  }
}

const IMAGE = `${LOCAL_ACCOUNT}.dkr.ecr.${LOCAL_REGION}.amazonaws.com/slideway-dev-slide-inference:bench`;
const roleArn = (name: string) => `arn:aws:iam::${LOCAL_ACCOUNT}:role/slideway-dev-${name}-${LOCAL_REGION}`;
