/**
 * Stands for SageMaker and the container, which have tests of their own: jobs that leave what the container leaves,
 * slide by slide, and that end as chance says.
 */
import type { S3Client } from '@aws-sdk/client-s3';
import { paginateListObjectsV2 } from '@aws-sdk/client-s3';
import type { Completion, Model, Shard } from '../../core/contracts.ts';
import { readBytes, readJson, sha256, writeJson, writeObject } from '../../core/store.ts';
import { type JsonService, ServiceError } from '../../local/types.ts';
import { tileGrid, tilesParquet } from '../support/results.ts';

/** How a job goes. */
export type JobFate =
  | { refused: string }
  /** Created, but SageMaker answers with a fault of its own. */
  | { answerLost: true }
  /** Ends after so many slides of its shards. */
  | { fails: string; after: number }
  | 'completes';

export type SlideFate = Pick<Completion, 'state'> & { error?: string; message?: string };

export interface Fates {
  /** Of the n-th job that a model is tried with, from 1. */
  job(runId: string, model: string, attempt: number): JobFate;
  slide(runId: string, slideId: string, model: string): SlideFate;
}

interface Job {
  name: string;
  status: 'InProgress' | 'Completed' | 'Failed';
  failureReason?: string;
  request: Record<string, unknown>;
  began: number;
  ended?: number;
}

interface Creation extends Record<string, unknown> {
  ProcessingJobName: string;
  ProcessingInputs: { InputName: string; S3Input: { S3Uri: string } }[];
  Tags: { Key: string; Value: string }[];
}

export class Container implements JsonService {
  readonly #s3: () => S3Client;
  readonly #models: ReadonlyMap<string, Model>;
  readonly #fates: (runId: string) => Fates;
  readonly #jobs = new Map<string, Job>();
  readonly #working = new Set<Promise<void>>();

  constructor(options: {
    s3(): S3Client;
    models: ReadonlyMap<string, Model>;
    fates(runId: string): Fates;
  }) {
    this.#s3 = options.s3;
    this.#models = options.models;
    this.#fates = options.fates;
  }

  /** Resolves when no job works any more. */
  async idle(): Promise<void> {
    await Promise.all(this.#working);
  }

  readonly operations: JsonService['operations'] = {
    CreateProcessingJob: async (request: Creation) => {
      const { ProcessingJobName: name, Tags } = request;
      const tag = (key: string) => Tags.find(({ Key }) => Key === `slideway:${key}`)?.Value ?? '';
      if (this.#jobs.has(name)) throw new ServiceError('ResourceInUse', `Job ${name} exists.`);
      const attempt = Number(/-(\d+)$/.exec(name)?.[1]);
      const fate = this.#fates(tag('run')).job(tag('run'), tag('model'), attempt);
      if (fate !== 'completes' && 'refused' in fate) throw new ServiceError(fate.refused, 'injected');
      const job: Job = { name, status: 'InProgress', request, began: Date.now() };
      this.#jobs.set(name, job);
      const work = this.#work(job, request, fate).finally(() => this.#working.delete(work));
      this.#working.add(work);
      if (fate !== 'completes' && 'answerLost' in fate) {
        throw new ServiceError('InternalFailure', 'Rate exceeded, said after the job was created', 500);
      }
      return { ProcessingJobArn: `arn:aws:sagemaker:us-east-1:000000000000:processing-job/${name}` };
    },
    DescribeProcessingJob: async ({ ProcessingJobName }: { ProcessingJobName: string }) => {
      const job = this.#jobs.get(ProcessingJobName);
      if (!job) throw new ServiceError('ValidationException', 'Could not find requested job');
      const { AppSpecification, RoleArn } = job.request;
      return {
        ProcessingJobName,
        ProcessingJobStatus: job.status,
        AppSpecification,
        RoleArn,
        CreationTime: job.began / 1000,
        ProcessingStartTime: job.began / 1000,
        ...(job.ended && { ProcessingEndTime: job.ended / 1000 }),
        ...(job.failureReason && { FailureReason: job.failureReason }),
      };
    },
    StopProcessingJob: async () => ({}),
  };

  async #work(job: Job, { ProcessingInputs }: Creation, fate: JobFate): Promise<void> {
    const s3 = this.#s3();
    const uri = ProcessingInputs.find(({ InputName }) => InputName === 'shards')?.S3Input.S3Uri ?? '';
    const [, bucket = '', prefix = ''] = /^s3:\/\/([^/]+)\/(.*)$/.exec(uri) ?? [];
    let left = fate !== 'completes' && 'fails' in fate ? fate.after : Number.POSITIVE_INFINITY;
    for await (const page of paginateListObjectsV2({ client: s3 }, { Bucket: bucket, Prefix: prefix })) {
      for (const { Key = '' } of page.Contents ?? []) {
        const shard = (await readJson(s3, { bucket, key: Key })) as Shard;
        for (const slide of shard.slides) {
          if (left <= 0) break;
          left -= 1;
          await this.#infer(s3, shard, slide, job.name);
        }
      }
    }
    job.ended = Date.now();
    if (fate !== 'completes' && 'fails' in fate) {
      job.failureReason = fate.fails;
      job.status = 'Failed';
    } else {
      job.status = 'Completed';
    }
  }

  /** What the container leaves for a slide; nothing where another job has left it before. */
  async #infer(
    s3: S3Client,
    { runId, model: ref, output, parameters, codeVersion }: Shard,
    { slideId, bronze }: Shard['slides'][number],
    jobName: string,
  ): Promise<void> {
    const prefix = `${output.prefix}${slideId}/${ref.name}/`;
    const at = (file: string) => ({ bucket: output.bucket, key: prefix + file });
    if (await readBytes(s3, at('complete.json'))) return;
    const model = this.#models.get(ref.name);
    if (!model) throw new Error(`no model ${ref.name}`);
    const { state, error, message } = this.#fates(runId).slide(runId, slideId, ref.name);
    const head = {
      runId,
      slideId,
      checksum: bronze.checksum,
      model: { name: ref.name, version: ref.version, digest: ref.digest },
      parameters,
      codeVersion,
      jobName,
      completedAt: new Date().toISOString(),
      timings: { open: 0.1, infer: 0.5 },
      requests: { get: 3, put: 2 },
      device: 'cpu',
    };
    if (state !== 'INFERRED') {
      const marker: Completion = { ...head, state, outputs: {}, ...(error && { error, message }) };
      await writeJson(s3, at('complete.json'), marker);
      return;
    }
    // The content decides the values, as it does with a model.
    const level = Number.parseInt(sha256(bronze.checksum).slice(7, 9), 16) / 256;
    const tiles = tileGrid(3, 2, 256, (x, y) => model.outputs.map((_, o) => (level + x + y + o) % 1));
    const parquet = tilesParquet(model, tiles, {
      slideId,
      slideChecksum: bronze.checksum,
      modelDigest: ref.digest,
    });
    await writeObject(s3, at('tiles.parquet'), parquet, 'application/octet-stream');
    const marker: Completion = {
      ...head,
      state,
      slide: {
        ...{ width: 768, height: 512, mppX: 0.5, mppY: 0.5, mppSource: 'file', levels: 1 },
        ...{ vendor: 'generic', reader: 'openslide' },
      },
      tile: { px: 256, mpp: 0.5, overlap: 0, footprintX: 256, footprintY: 256, level: 0 },
      tiles: { grid: tiles.length, kept: tiles.length, ok: tiles.length, unreadable: 0 },
      tissue: { areaMm2: 0.1, mpp: 8 },
      outputs: { 'tiles.parquet': { sha256: sha256(parquet), bytes: parquet.byteLength } },
    };
    await writeJson(s3, at('complete.json'), marker);
  }
}
