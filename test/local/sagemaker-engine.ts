/**
 * A small engine for the tests of SageMaker and CloudWatch Logs: the gateway, both services, and an S3 that is just
 * large enough for a job's inputs and outputs. Run as a program it is an engine that can be killed:
 *
 *   node test/local/sagemaker-engine.ts <JSON of EngineOptions>     prints its endpoint
 */
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { buffer } from 'node:stream/consumers';
import { CloudWatchLogsClient } from '@aws-sdk/client-cloudwatch-logs';
import { S3Client } from '@aws-sdk/client-s3';
import { SageMakerClient } from '@aws-sdk/client-sagemaker';
import { Gateway } from '../../local/gateway.ts';
import { Logs } from '../../local/logs.ts';
import { SageMaker, type SageMakerOptions } from '../../local/sagemaker/service.ts';
import { type Caller, type HttpService, ServiceError } from '../../local/types.ts';

export const JOB_ROLE = 'arn:aws:iam::000000000000:role/inference-job';
export const IMAGE = '000000000000.dkr.ecr.us-east-1.amazonaws.com/slide-inference:1';

type Passed = 'executor' | 'mountNamespace' | 'stopGraceSeconds' | 'maxConcurrentInstances' | 'faults';

export interface EngineOptions extends Partial<Pick<SageMakerOptions, Passed>> {
  state: string;
  container: string;
  /** Actions that the caller's policies do not allow. */
  denied?: string[];
}

/** Objects as files, named by their encoded keys; only what a job's inputs and outputs need. */
class SmallS3 implements HttpService {
  readonly #folder: string;
  /** Access key ids that asked, in order. */
  readonly callers: string[] = [];
  constructor(folder: string) {
    this.#folder = folder;
    mkdirSync(folder, { recursive: true });
  }

  handle: HttpService['handle'] = async (request, response, caller) => {
    this.callers.push(caller.arn);
    const url = new URL(request.url ?? '/', 'http://s3');
    const [, bucket = '', ...rest] = decodeURIComponent(url.pathname).split('/');
    const key = rest.join('/');
    const path = (name: string) => join(this.#folder, encodeURIComponent(`${bucket}/${name}`));
    if (request.method === 'PUT') {
      writeFileSync(path(key), await buffer(request));
      response.writeHead(200, { etag: '"0"' }).end();
    } else if (key === '') {
      const prefix = `${bucket}/${url.searchParams.get('prefix') ?? ''}`;
      const keys = readdirSync(this.#folder)
        .map(decodeURIComponent)
        .filter((name) => name.startsWith(prefix))
        .map((name) => `<Contents><Key>${name.slice(bucket.length + 1)}</Key></Contents>`);
      response
        .writeHead(200, { 'content-type': 'application/xml' })
        .end(`<ListBucketResult><IsTruncated>false</IsTruncated>${keys.join('')}</ListBucketResult>`);
    } else {
      response.writeHead(200).end(readFileSync(path(key)));
    }
  };
}

export interface Engine {
  endpoint: string;
  sagemaker: SageMaker;
  client: SageMakerClient;
  logs: CloudWatchLogsClient;
  s3: S3Client;
  /** ARNs of those who asked S3 for something. */
  s3Callers: string[];
  close(): Promise<void>;
}

export async function startEngine(options: EngineOptions): Promise<Engine> {
  const caller = (arn: string): Caller => ({
    arn,
    authorize(action, resource) {
      if (options.denied?.includes(action))
        throw new ServiceError('AccessDeniedException', `${arn} may not ${action} on ${resource}`);
    },
  });
  const logs = new Logs({ folder: join(options.state, 'logs') });
  const s3 = new SmallS3(join(options.state, 's3'));
  let endpoint = '';
  const { state, container, denied: _denied, ...rest } = options;
  const sagemaker = new SageMaker({
    folder: join(state, 'jobs'),
    endpoint: () => endpoint,
    credentials: (roleArn) => ({
      accessKeyId: `ROLE${roleArn}`.replaceAll(/[^A-Z]/gi, ''),
      secretAccessKey: 'job',
    }),
    logs,
    containers: (imageUri) => {
      if (imageUri !== IMAGE) throw new ServiceError('ValidationException', `There is no image ${imageUri}`);
      return { folder: container };
    },
    python: 'python3',
    executor: 'process',
    ...rest,
  });
  const gateway = new Gateway({
    services: {
      s3: { protocol: 's3', service: s3 },
      sagemaker: { protocol: 'json', service: sagemaker },
      logs: { protocol: 'json', service: logs },
    },
    principals: (accessKeyId) =>
      accessKeyId === 'ROOT'
        ? { caller: caller('arn:aws:iam::000000000000:root'), secretAccessKey: 'root' }
        : { caller: caller(JOB_ROLE), secretAccessKey: 'job' },
  });
  await gateway.listen(0);
  endpoint = gateway.endpoint;
  await sagemaker.recover();
  const config = {
    region: 'us-east-1',
    endpoint,
    credentials: { accessKeyId: 'ROOT', secretAccessKey: 'root' },
  };
  return {
    endpoint,
    sagemaker,
    client: new SageMakerClient(config),
    logs: new CloudWatchLogsClient(config),
    s3: new S3Client({ ...config, forcePathStyle: true }),
    s3Callers: s3.callers,
    async close() {
      await sagemaker.close();
      await gateway.close();
    },
  };
}

const [, program, argument] = process.argv;
if (program === import.meta.filename && argument !== undefined) {
  const { endpoint } = await startEngine(JSON.parse(argument));
  process.stdout.write(`${endpoint}\n`);
}
