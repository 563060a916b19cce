/**
 * The deployment that a command works with: the local AWS on a state folder, started here or attached to where it
 * runs already. Everything is reached through the AWS SDK, as on AWS.
 */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import { CloudWatchLogsClient } from '@aws-sdk/client-cloudwatch-logs';
import { DynamoDBClient } from '@aws-sdk/client-dynamodb';
import { LambdaClient } from '@aws-sdk/client-lambda';
import { S3Client } from '@aws-sdk/client-s3';
import { SFNClient } from '@aws-sdk/client-sfn';
import { SQSClient } from '@aws-sdk/client-sqs';
import { DynamoDBDocumentClient } from '@aws-sdk/lib-dynamodb';
import { z } from 'zod';
import { StateTable } from '../core/state.ts';
import { attachLocalAws, type Connection, StateFolderInUse, startLocalAws } from '../local/engine.ts';
import { ensureReady } from './commands/setup.ts';
import { PROJECT, venvFolder, venvPython } from './paths.ts';
import { ensureModel } from './setup/model.ts';
import { ensurePackage } from './setup/package.ts';
import { readyPython } from './setup/python.ts';
import type { Screen } from './terminal.ts';

const outputsSchema = z.object({
  LandingBucket: z.string(),
  BronzeBucket: z.string(),
  SilverBucket: z.string(),
  ModelsBucket: z.string(),
  AnchorsBucket: z.string(),
  StateTable: z.string(),
  LineageTable: z.string(),
  TopicArn: z.string(),
  StateMachineArn: z.string(),
  DeadEventsQueue: z.string(),
  DeadInvocationsQueue: z.string(),
});
/** Outputs of the stack. */
export type Outputs = z.infer<typeof outputsSchema>;

export interface Deployment {
  s3: S3Client;
  documents: DynamoDBDocumentClient;
  stepFunctions: SFNClient;
  logs: CloudWatchLogsClient;
  sqs: SQSClient;
  lambda: LambdaClient;
  state: StateTable;
  outputs: Outputs;
  /** model.tar.gz of the reference model, where it can be built. */
  model: string | undefined;
  /** The process that runs the local AWS, where it is another one. */
  elsewhere: number | undefined;
  /** Ends the connections, and the local AWS where this process runs it. */
  close(): Promise<void>;
}

export interface DeploymentOptions {
  /** The state folder. */
  folder: string;
  stage: string;
}

const STARTING_MS = 60_000;

/** Attaches to the local AWS of a state folder, else sets up what is missing and starts it; it goes on where it was. */
export async function openDeployment(screen: Screen, options: DeploymentOptions): Promise<Deployment> {
  const attach = async () => {
    const running = attachLocalAws(options.folder);
    if (!running) return undefined;
    const python = readyPython();
    const model = python && (await ensureModel(screen, python));
    return { ...connected(running, running.pid), model };
  };
  const attached = await attach();
  if (attached) return attached;
  const ready = await ensureReady(screen, options);
  const start = () =>
    startLocalAws({
      state: options.folder,
      package: ready.package,
      python: ready.python,
      containers: join(PROJECT, 'containers'),
    });
  const deadline = Date.now() + STARTING_MS;
  for (;;) {
    try {
      const engine = await start();
      return { ...connected(engine, undefined, () => engine.stop()), model: ready.model };
    } catch (error) {
      if (!(error instanceof StateFolderInUse)) throw error;
      // Another process is starting or stopping it just now.
      const other = await attach();
      if (other) return other;
      if (Date.now() > deadline) throw error;
      await wait(500);
    }
  }
}

/** The same for commands that only look: nothing is installed, and unfinished work is left as it is. */
export async function openForReading(
  screen: Screen,
  options: DeploymentOptions,
): Promise<Deployment | undefined> {
  const running = attachLocalAws(options.folder);
  if (running) return connected(running, running.pid);
  if (!existsSync(join(options.folder, 'dynamodb'))) return undefined;
  const engine = await startLocalAws({
    state: options.folder,
    package: await ensurePackage(screen, options.stage),
    python: venvPython(venvFolder()),
    containers: join(PROJECT, 'containers'),
    resume: false,
  });
  return connected(engine, undefined, () => engine.stop());
}

function connected(
  { endpoint, region, credentials, outputs }: Connection,
  elsewhere: number | undefined,
  stop?: () => Promise<void>,
): Deployment {
  const config = { endpoint, region, credentials };
  const s3 = new S3Client({ ...config, forcePathStyle: true });
  const dynamodb = new DynamoDBClient(config);
  const documents = DynamoDBDocumentClient.from(dynamodb);
  const stepFunctions = new SFNClient(config);
  const logs = new CloudWatchLogsClient(config);
  const sqs = new SQSClient(config);
  // A function may take as long as Lambda lets it; calling it twice is for the caller to decide.
  const lambda = new LambdaClient({ ...config, maxAttempts: 1 });
  const known = outputsSchema.parse(outputs);
  return {
    s3,
    documents,
    stepFunctions,
    logs,
    sqs,
    lambda,
    state: new StateTable(documents, known.StateTable),
    outputs: known,
    model: undefined,
    elsewhere,
    close: async () => {
      for (const client of [s3, dynamodb, stepFunctions, logs, sqs, lambda]) client.destroy();
      await stop?.();
    },
  };
}
