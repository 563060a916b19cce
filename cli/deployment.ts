/**
 * The deployment that a command works with: the local AWS on a state folder, started here or attached to where it
 * runs already, or the stack of a stage on AWS. Everything is reached through the AWS SDK.
 */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import { CloudFormationClient, DescribeStacksCommand } from '@aws-sdk/client-cloudformation';
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
import { BUNDLES, PROJECT, stateFolder, venvFolder, venvPython } from './paths.ts';
import { ensureModel } from './setup/model.ts';
import { ensurePackage } from './setup/package.ts';
import { readyPython } from './setup/python.ts';
import { type Screen, UserError } from './terminal.ts';

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
  /** Where its work goes on: in this process, in another one of this machine, or on AWS. */
  at: 'here' | 'aws' | { pid: number };
  /** Ends the connections, and the local AWS where this process runs it. */
  close(): Promise<void>;
}

export interface DeploymentOptions {
  /** The state folder of the local AWS. */
  folder: string;
  stage: string;
  /** The stack of the stage on AWS, with the person's own credentials and region, in place of the local AWS. */
  aws?: boolean | undefined;
}

/** The options by which a command is told its deployment. */
export interface Place {
  state?: string;
  stage: string;
  aws?: boolean;
}

export const placeOf = ({ state, stage, aws }: Place): DeploymentOptions => ({
  folder: stateFolder(state),
  stage,
  aws,
});

const STARTING_MS = 60_000;

/** Attaches to the local AWS of a state folder, else sets up what is missing and starts it; it goes on where it was. */
export async function openDeployment(screen: Screen, options: DeploymentOptions): Promise<Deployment> {
  if (options.aws) return openStack(`slideway-${options.stage}`);
  const attach = async () => {
    const running = attachLocalAws(options.folder);
    if (!running) return undefined;
    const python = readyPython();
    const model = python && (await ensureModel(screen, python));
    return { ...connected(running, { pid: running.pid }), model };
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
      bundles: BUNDLES,
    });
  const deadline = Date.now() + STARTING_MS;
  for (;;) {
    try {
      const engine = await start();
      return { ...connected(engine, 'here', () => engine.stop()), model: ready.model };
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
  if (options.aws) return openStack(`slideway-${options.stage}`);
  const running = attachLocalAws(options.folder);
  if (running) return connected(running, { pid: running.pid });
  if (!existsSync(join(options.folder, 'dynamodb'))) return undefined;
  const engine = await startLocalAws({
    state: options.folder,
    package: await ensurePackage(screen, options.stage),
    python: venvPython(venvFolder()),
    containers: join(PROJECT, 'containers'),
    bundles: BUNDLES,
    resume: false,
  });
  return connected(engine, 'here', () => engine.stop());
}

/** A stack on AWS, found by its name in the account and region of the person's AWS settings. */
async function openStack(name: string): Promise<Deployment> {
  const cloudFormation = new CloudFormationClient();
  try {
    const { Stacks } = await cloudFormation.send(new DescribeStacksCommand({ StackName: name }));
    const outputs = (Stacks?.[0]?.Outputs ?? []).map(({ OutputKey = '', OutputValue = '' }) => [
      OutputKey,
      OutputValue,
    ]);
    return connected({ outputs: Object.fromEntries(outputs) }, 'aws');
  } catch (error) {
    throw unreachable(name, error as Error);
  } finally {
    cloudFormation.destroy();
  }
}

/** What to do where a stack cannot be had. */
function unreachable(name: string, error: Error): Error {
  const { message } = error;
  if (error.name === 'CredentialsProviderError')
    return new UserError(
      'There are no AWS credentials. Log in (aws sso login), or set AWS_PROFILE, or leave out --aws for the local AWS.',
    );
  if (/region is missing/i.test(message))
    return new UserError('No AWS region is set: set AWS_REGION to the one that the stack is deployed in.');
  if (error.name === 'ValidationError')
    return new UserError(
      `There is no stack ${name} in this account and region. Set AWS_PROFILE and AWS_REGION, name its stage with --stage, or deploy it: docs/deploying.md.`,
    );
  if (error instanceof z.ZodError)
    return new UserError(`The stack ${name} was deployed by another version: ${z.prettifyError(error)}`);
  return new UserError(`The stack ${name} cannot be asked for: ${error.name}: ${message}`);
}

function connected(
  { outputs, ...found }: Pick<Connection, 'outputs'> & Partial<Connection>,
  at: Deployment['at'],
  stop?: () => Promise<void>,
): Deployment {
  const { endpoint, region, credentials } = found;
  // On AWS all three are the person's own.
  const config = {
    ...(endpoint && { endpoint }),
    ...(region && { region }),
    ...(credentials && { credentials }),
  };
  const s3 = new S3Client({ ...config, ...(endpoint && { forcePathStyle: true }) });
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
    at,
    close: async () => {
      for (const client of [s3, dynamodb, stepFunctions, logs, sqs, lambda]) client.destroy();
      await stop?.();
    },
  };
}
