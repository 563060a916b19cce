/**
 * A small engine for the tests of SageMaker: the gateway, S3, CloudWatch Logs, and callers who may do everything
 * but what a test denies them. Run as a program it is an engine that can be killed:
 *
 *   node test/local/sagemaker-engine.ts <JSON of EngineOptions>     prints its endpoint
 */
import { join } from 'node:path';
import { CloudWatchLogsClient } from '@aws-sdk/client-cloudwatch-logs';
import { S3Client } from '@aws-sdk/client-s3';
import { SageMakerClient } from '@aws-sdk/client-sagemaker';
import { Gateway } from '../../local/gateway.ts';
import { Logs } from '../../local/logs.ts';
import { S3Service } from '../../local/s3/service.ts';
import { SageMaker, type SageMakerOptions } from '../../local/sagemaker/service.ts';
import { type Caller, ServiceError } from '../../local/types.ts';
import { projectPython } from '../support/python.ts';

export const JOB_ROLE = 'arn:aws:iam::000000000000:role/inference-job';
export const IMAGE = '000000000000.dkr.ecr.us-east-1.amazonaws.com/slide-inference:1';

type Passed =
  | 'python'
  | 'executor'
  | 'mountNamespace'
  | 'stopGraceSeconds'
  | 'maxConcurrentInstances'
  | 'pingSeconds'
  | 'faults';

export interface EngineOptions extends Partial<Pick<SageMakerOptions, Passed>> {
  state: string;
  container: string;
  /** Actions that the caller's policies do not allow. */
  denied?: string[];
}

export interface Engine {
  endpoint: string;
  sagemaker: SageMaker;
  client: SageMakerClient;
  logs: CloudWatchLogsClient;
  s3: S3Client;
  /** Requests since the start, by the ARN of who asked. */
  requests(): Record<string, Record<string, number>>;
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
  const s3 = new S3Service({ folder: join(options.state, 's3'), onObjectCreated: async () => undefined });
  await s3.createBucket('silver', { versioning: true, eventBridge: false });
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
    python: projectPython(),
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
  let closing: Promise<void> | undefined;
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
    requests: () => gateway.counts().byPrincipal,
    close() {
      closing ??= sagemaker
        .close()
        .then(() => gateway.close())
        .then(() => s3.close());
      return closing;
    },
  };
}

const [, program, argument] = process.argv;
if (program === import.meta.filename && argument !== undefined) {
  const { endpoint } = await startEngine(JSON.parse(argument));
  process.stdout.write(`${endpoint}\n`);
}
