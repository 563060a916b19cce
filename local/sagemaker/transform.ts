/**
 * Transform jobs: a model served on every instance, each object of the input sent to it as one request, each answer
 * put to S3 as `<key>.out`. An object that fails does not keep the others back; it fails the job at its end.
 */
import { appendFileSync, createReadStream, existsSync, readFileSync } from 'node:fs';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Readable } from 'node:stream';
import { setTimeout as wait } from 'node:timers/promises';
import { GetObjectCommand, type S3Client } from '@aws-sdk/client-s3';
import { Upload } from '@aws-sdk/lib-storage';
import type { Caller } from '../types.ts';
import {
  type Address,
  awaitPing,
  BadStatus,
  type ExecutionParameters,
  executionParameters,
  invoke,
} from './invocations.ts';
import { type Accepted, Jobs, type Machine } from './jobs.ts';
import type { ModelRequest, Models } from './models.ts';
import { type InstanceRecord, type JobRecord, nameOf } from './records.ts';
import type { ServiceModel } from './service-model.ts';
import { checkTransformJob, type TransformJobRequest } from './transform-requests.ts';
import type { Run } from './turns.ts';
import { ClientError, type Download, inManifest, layOutModel, splitUri, underPrefix } from './volume.ts';

export const TRANSFORM_LOG_GROUP = '/aws/sagemaker/TransformJobs';

const DEFAULT_PING_SECONDS = 480;
const DEFAULT_TIMEOUT_SECONDS = 600;
const DEFAULT_RETRIES = 3;
const DEFAULT_PAYLOAD_MB = 6;
const MB = 1024 * 1024;
const RETRY_MS = 250;

type TransformJob = JobRecord<TransformJobRequest> & {
  /** As it was when the job was asked for: the job goes on when the model is deleted. */
  model: ModelRequest;
};

/** What became of one object: a line of the job's `outcomes.jsonl`. */
interface Outcome {
  key: string;
  /** Whose fault it is that there is no output. */
  failed?: 'ClientError' | 'AlgorithmError';
}

/** An instance that serves, and how it is to be used. */
interface Server {
  address: Address;
  concurrent: number;
  /** Bytes; infinite where the job sets no limit. */
  payload: number;
  /** A line to the job's data log. */
  log(line: string): void;
}

export class TransformJobs extends Jobs<TransformJob> {
  readonly #models: Models;

  constructor(machine: Machine, folder: string, models: Models) {
    super(machine, folder, 'Transform');
    this.#models = models;
  }

  protected accept(input: unknown, model: ServiceModel, caller: Caller): Accepted<TransformJob> {
    checkTransformJob(input, model);
    const { TransformJobName: name, Tags: tags = [] } = input;
    const arn = this.arn(name);
    caller.authorize('sagemaker:CreateTransformJob', arn);
    if (tags.length > 0) caller.authorize('sagemaker:AddTags', arn);
    return {
      request: input,
      name,
      tags,
      instances: input.TransformResources.InstanceCount,
      more: { model: this.#models.get(input.ModelName).request },
    };
  }

  protected roleOf({ model }: TransformJob): string {
    return model.ExecutionRoleArn;
  }

  protected limitOf(): undefined {
    return undefined;
  }

  protected defaultsOf(): object {
    return {};
  }

  protected async messageOf(): Promise<undefined> {
    return undefined;
  }

  protected async clean(job: TransformJob): Promise<void> {
    for (const { host } of job.instances)
      await rm(this.records.instanceFolder(job, host), { recursive: true, force: true });
  }

  protected async work(job: TransformJob, run: Run, s3: S3Client): Promise<void> {
    const { S3DataType, S3Uri } = job.request.TransformInput.DataSource.S3DataSource;
    const list = S3DataType === 'ManifestFile' ? inManifest : underPrefix;
    const objects = await list(s3, S3Uri, run.abort.signal);
    objects.sort((a, b) => (a.key < b.key ? -1 : 1));
    const decided = new Set(this.#outcomes(job).map(({ key }) => key));
    await this.onEach(job, run, async (record) => {
      const place = job.instances.indexOf(record);
      const share = objects.filter(
        ({ key }, index) => index % job.instances.length === place && !decided.has(key),
      );
      if (share.length > 0) await this.#runInstance(job, record, run, s3, share);
    });
    if (run.ending) return;
    const failed = this.#outcomes(job).flatMap((outcome) => outcome.failed ?? []);
    const [whose] = failed;
    if (whose !== undefined)
      await run.end({
        by: 'failure',
        reason: `${whose}: See job logs for more information. ${failed.length} of ${objects.length} objects failed.`,
      });
  }

  #outcomes(job: TransformJob): Outcome[] {
    const path = join(this.records.folder(job), 'outcomes.jsonl');
    if (!existsSync(path)) return [];
    // A line that the end of an engine cut short is an object that is done again.
    const lines = readFileSync(path, 'utf8').split('\n').slice(0, -1);
    return lines.map((line) => JSON.parse(line) as Outcome);
  }

  #decide(job: TransformJob, outcome: Outcome): void {
    appendFileSync(join(this.records.folder(job), 'outcomes.jsonl'), `${JSON.stringify(outcome)}\n`);
  }

  /** Serves the model on one instance until its share of the objects is done. */
  async #runInstance(
    job: TransformJob,
    record: InstanceRecord,
    run: Run,
    s3: S3Client,
    share: Download[],
  ): Promise<void> {
    const { PrimaryContainer: container, EnableNetworkIsolation: isolated = false } = job.model;
    const { request } = job;
    const { signal } = run.abort;
    const name = nameOf(job);
    const folder = this.records.instanceFolder(job, record.host);
    await layOutModel(container.ModelDataUrl, folder, s3, signal);
    const { endpoint, credentials, containers, pingSeconds, logs } = this.machine.options;
    const scratch = await mkdtemp(join(tmpdir(), 'slideway-serve-'));
    const stream = `${name}/${record.host}-${Date.now()}`;
    const port = await freePort();
    try {
      const launched = await this.launch(
        job,
        record,
        run,
        {
          job: name,
          host: record.host,
          folder,
          imageUri: container.Image,
          container: containers(container.Image).folder,
          arguments: ['serve'],
          environment: { ...container.Environment, ...request.Environment, ...batchEnvironment(request) },
          isolated,
          credentials: credentials(job.model.ExecutionRoleArn),
          endpoint: endpoint(),
          serve: { port, socket: join(scratch, 'door') },
        },
        { group: TRANSFORM_LOG_GROUP, stream },
      );
      if (launched === null) return;
      let served = false;
      // A server that ends by itself ends the job; what it was asked for then is broken off.
      const gone = launched.ended.then(async (code) => {
        if (run.ending || served) return;
        const reason = `AlgorithmError: See job logs for more information. The server ended with exit code ${code}`;
        await run.end({ by: 'failure', reason });
      });
      try {
        const log = (line: string) =>
          logs.append(TRANSFORM_LOG_GROUP, `${stream}/data-log`, [`[sagemaker logs]: ${line}`]);
        const { socket } = launched;
        const address = socket === undefined ? { port } : { socketPath: socket };
        await awaitPing(address, pingSeconds ?? DEFAULT_PING_SECONDS, signal);
        const server = { address, log, ...(await this.#howToUse(request, address, signal, log)) };
        await this.#transformAll(job, server, s3, share, folder, signal);
        served = true;
      } catch (error) {
        // The reason why the job is ending says more than what was broken off by it.
        if (!run.ending)
          await run.end({ by: 'failure', reason: `AlgorithmError: ${(error as Error).message}` });
      } finally {
        if (!run.ending) await run.dismiss(launched.container);
        await gone;
        await launched.ended;
      }
    } finally {
      await rm(scratch, { recursive: true, force: true });
    }
  }

  /** The request says how the container is to be used; what it leaves open, the container does; else the defaults. */
  async #howToUse(
    request: TransformJobRequest,
    address: Address,
    signal: AbortSignal,
    log: (line: string) => void,
  ): Promise<Pick<Server, 'concurrent' | 'payload'>> {
    const { MaxConcurrentTransforms, MaxPayloadInMB, BatchStrategy } = request;
    const isOpen = !MaxConcurrentTransforms || MaxPayloadInMB === undefined || BatchStrategy === undefined;
    const asked: ExecutionParameters = isOpen ? await executionParameters(address, signal) : {};
    const concurrent = MaxConcurrentTransforms || asked.MaxConcurrentTransforms || 1;
    const payloadMb = MaxPayloadInMB ?? asked.MaxPayloadInMB ?? DEFAULT_PAYLOAD_MB;
    const strategy = BatchStrategy ? STRATEGY[BatchStrategy] : (asked.BatchStrategy ?? STRATEGY.MultiRecord);
    log(`MaxConcurrentTransforms=${concurrent}, MaxPayloadInMB=${payloadMb}, BatchStrategy=${strategy}`);
    return { concurrent, payload: payloadMb === 0 ? Number.POSITIVE_INFINITY : payloadMb * MB };
  }

  /** As many objects at once as the server takes. */
  async #transformAll(
    job: TransformJob,
    server: Server,
    s3: S3Client,
    share: Download[],
    folder: string,
    signal: AbortSignal,
  ): Promise<void> {
    const answers = join(folder, '.answers');
    await mkdir(answers, { recursive: true });
    const queue = share.entries();
    await Promise.all(
      Array.from({ length: Math.min(server.concurrent, share.length) }, async () => {
        for (const [index, object] of queue) {
          const answer = join(answers, String(index));
          const failed = await this.#transform(job, server, s3, object, answer, signal);
          signal.throwIfAborted();
          this.#decide(job, { key: object.key, ...(failed && { failed }) });
          await rm(answer, { force: true });
        }
      }),
    );
  }

  /** One object, with retries; who is to blame if there is no output. */
  async #transform(
    { request }: TransformJob,
    { address, payload, log }: Server,
    s3: S3Client,
    { bucket, key, name }: Download,
    answer: string,
    signal: AbortSignal,
  ): Promise<Outcome['failed']> {
    const { InvocationsTimeoutInSeconds, InvocationsMaxRetries } = request.ModelClientConfig ?? {};
    const seconds = InvocationsTimeoutInSeconds ?? DEFAULT_TIMEOUT_SECONDS;
    const { ContentType } = request.TransformInput;
    const { Accept } = request.TransformOutput;
    const what = `${bucket}/${key}`;
    for (let left = InvocationsMaxRetries ?? DEFAULT_RETRIES; ; left--) {
      const timeout = AbortSignal.timeout(seconds * 1000);
      const within = AbortSignal.any([signal, timeout]);
      try {
        const { Body, ContentLength = 0 } = await s3.send(
          new GetObjectCommand({ Bucket: bucket, Key: key }),
          { abortSignal: within },
        );
        if (ContentLength > payload) {
          (Body as Readable).destroy();
          log(`${what}: Too much data for max payload size`);
          return 'ClientError';
        }
        const headers = {
          'Content-Length': String(ContentLength),
          ...(ContentType !== undefined && { 'Content-Type': ContentType }),
          ...(Accept !== undefined && { Accept }),
        };
        await invoke(address, headers, Body as Readable, answer, within);
        await upload(s3, request, name, answer, signal);
        return undefined;
      } catch (error) {
        signal.throwIfAborted();
        const { name: errorName, message, $metadata } = error as Error & { $metadata?: object };
        if (errorName === 'NoSuchKey' || errorName === 'AccessDenied') {
          log(`${what}: ${errorName}: ${message}`);
          return 'ClientError';
        }
        const status = error instanceof BadStatus ? error.status : undefined;
        if (status !== undefined) {
          log(`${what}: Bad HTTP status received from algorithm: ${status}`);
          log(`${what}: Message: ${message}`);
        } else if (timeout.aborted) log(`${what}: Unable to get response from algorithm within ${seconds} s`);
        else log(`${what}: ${$metadata ? errorName : 'Unable to get response from algorithm'}: ${message}`);
        // What the server refuses as wrong it will refuse again.
        const isFinal = status !== undefined && status >= 400 && status < 500 && status !== 429;
        if (isFinal || left <= 0) return isFinal ? 'ClientError' : 'AlgorithmError';
        await wait(RETRY_MS, undefined, { signal });
      }
    }
  }
}

const STRATEGY: Record<string, string> = { SingleRecord: 'SINGLE_RECORD', MultiRecord: 'MULTI_RECORD' };

/** What SageMaker tells a container of the job that it serves. */
function batchEnvironment({
  MaxConcurrentTransforms,
  MaxPayloadInMB,
  BatchStrategy,
}: TransformJobRequest): Record<string, string> {
  return {
    SAGEMAKER_BATCH: 'true',
    ...(MaxConcurrentTransforms && { SAGEMAKER_MAX_CONCURRENT_TRANSFORMS: String(MaxConcurrentTransforms) }),
    ...(MaxPayloadInMB !== undefined && { SAGEMAKER_MAX_PAYLOAD_IN_MB: String(MaxPayloadInMB) }),
    ...(BatchStrategy && { SAGEMAKER_BATCH_STRATEGY: STRATEGY[BatchStrategy] ?? BatchStrategy }),
  };
}

/** A port that nobody listens on. */
async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen(0, '127.0.0.1', resolve);
  });
  const address = server.address();
  await new Promise((resolve) => server.close(resolve));
  if (address === null || typeof address === 'string') throw new ClientError('no port is free');
  return address.port;
}

/** The answer becomes `<S3OutputPath>/<name below the input's prefix>.out`. */
async function upload(
  s3: S3Client,
  { TransformOutput: { S3OutputPath, KmsKeyId, Accept } }: TransformJobRequest,
  name: string,
  answer: string,
  signal: AbortSignal,
): Promise<void> {
  const { bucket, key } = splitUri(S3OutputPath);
  const prefix = key === '' || key.endsWith('/') ? key : `${key}/`;
  const sending = new Upload({
    client: s3,
    params: {
      Bucket: bucket,
      Key: `${prefix}${name}.out`,
      Body: createReadStream(answer),
      ...(Accept !== undefined && { ContentType: Accept }),
      ...(KmsKeyId && { ServerSideEncryption: 'aws:kms', SSEKMSKeyId: KmsKeyId }),
    },
  });
  const abort = () => void sending.abort();
  signal.addEventListener('abort', abort, { once: true });
  await sending.done().finally(() => signal.removeEventListener('abort', abort));
}
