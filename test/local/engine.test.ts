import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { DynamoDBClient, GetItemCommand } from '@aws-sdk/client-dynamodb';
import { DeleteObjectCommand, GetObjectCommand, PutObjectCommand, S3Client } from '@aws-sdk/client-s3';
import { CreateProcessingJobCommand, SageMakerClient } from '@aws-sdk/client-sagemaker';
import { DescribeExecutionCommand, ListExecutionsCommand, SFNClient } from '@aws-sdk/client-sfn';
import { afterEach, describe, expect, it } from 'vitest';
import { attachLocalAws, type Connection, type LocalAws, startLocalAws } from '../../local/engine.ts';
import type { Message } from '../../local/sns.ts';
import { projectPython } from '../support/python.ts';
import { packaged, role, temporaryFolder, until } from './kit.ts';

/** Reads the manifest, counts in the table, writes to Silver, tells the topic: a run in small. */
const HANDLER = `
import { DynamoDBClient, UpdateItemCommand } from '@aws-sdk/client-dynamodb';
import { GetObjectCommand, PutObjectCommand, S3Client } from '@aws-sdk/client-s3';
import { PublishCommand, SNSClient } from '@aws-sdk/client-sns';
const { LANDING_BUCKET, SILVER_BUCKET, STATE_TABLE, TOPIC_ARN } = process.env;
const s3 = new S3Client({}), table = new DynamoDBClient({}), topic = new SNSClient({});
export const handler = async ({ key }) => {
  const manifest = await s3.send(new GetObjectCommand({ Bucket: LANDING_BUCKET, Key: key }));
  const text = await manifest.Body.transformToString();
  console.log('read ' + text.length);
  await table.send(new UpdateItemCommand({
    TableName: STATE_TABLE, Key: { pk: { S: key } },
    UpdateExpression: 'ADD runs :one', ExpressionAttributeValues: { ':one': { N: '1' } },
  }));
  await s3.send(new PutObjectCommand({ Bucket: SILVER_BUCKET, Key: 'copy/' + key, Body: text }));
  await topic.send(new PublishCommand({ TopicArn: TOPIC_ARN, Message: 'done ' + key }));
  return { key };
};`;

const arn = (logicalId: string) => ({ 'Fn::GetAtt': [logicalId, 'Arn'] });
const allow = (Action: string, Resource: unknown) => ({ Effect: 'Allow', Action, Resource });

/** A stack with everything that Slideway's has, in small, for one stage. */
function template(stage: string, waitSeconds = 0) {
  const name = (of: string) => `lab-${stage}-${of}`;
  const definition = {
    StartAt: 'Wait',
    States: {
      Wait: { Type: 'Wait', Seconds: waitSeconds, Next: 'Run' },
      Run: { Type: 'Task', Resource: `\${run}`, Parameters: { 'key.$': '$.detail.object.key' }, End: true },
    },
  };
  return {
    Resources: {
      Landing: {
        Type: 'AWS::S3::Bucket',
        Properties: {
          BucketName: name('landing'),
          VersioningConfiguration: { Status: 'Enabled' },
          NotificationConfiguration: { EventBridgeConfiguration: { EventBridgeEnabled: true } },
        },
      },
      Silver: { Type: 'AWS::S3::Bucket', Properties: { BucketName: name('silver') } },
      SilverPolicy: {
        Type: 'AWS::S3::BucketPolicy',
        Properties: {
          Bucket: { Ref: 'Silver' },
          PolicyDocument: {
            Statement: [
              {
                Effect: 'Deny',
                Principal: '*',
                Action: 's3:DeleteObject',
                Resource: { 'Fn::Sub': `\${Silver.Arn}/*` },
              },
            ],
          },
        },
      },
      State: {
        Type: 'AWS::DynamoDB::Table',
        Properties: {
          TableName: name('state'),
          BillingMode: 'PAY_PER_REQUEST',
          AttributeDefinitions: [{ AttributeName: 'pk', AttributeType: 'S' }],
          KeySchema: [{ AttributeName: 'pk', KeyType: 'HASH' }],
        },
      },
      Runs: { Type: 'AWS::SNS::Topic', Properties: { TopicName: name('runs') } },
      Images: { Type: 'AWS::ECR::Repository', Properties: { RepositoryName: name('slide-inference') } },
      RunRole: {
        Type: 'AWS::IAM::Role',
        Properties: role('lambda.amazonaws.com', [
          allow('s3:GetObject', { 'Fn::Sub': `\${Landing.Arn}/*` }),
          allow('s3:PutObject', { 'Fn::Sub': `\${Silver.Arn}/copy/*` }),
          allow('dynamodb:UpdateItem', arn('State')),
        ]),
      },
      Tell: {
        Type: 'AWS::IAM::Policy',
        Properties: {
          PolicyName: 'tell',
          Roles: [{ Ref: 'RunRole' }],
          PolicyDocument: { Statement: [allow('sns:Publish', { Ref: 'Runs' })] },
        },
      },
      Run: {
        Type: 'AWS::Lambda::Function',
        Properties: {
          FunctionName: name('run'),
          Code: { S3Bucket: 'deployment', S3Key: 'serverless/lab/dev/1/run.zip' },
          Handler: 'handler.handler',
          Runtime: 'nodejs24.x',
          Role: arn('RunRole'),
          Timeout: 30,
          MemorySize: 256,
          Environment: {
            Variables: {
              LANDING_BUCKET: { Ref: 'Landing' },
              SILVER_BUCKET: { Ref: 'Silver' },
              STATE_TABLE: { Ref: 'State' },
              TOPIC_ARN: { Ref: 'Runs' },
            },
          },
        },
      },
      MachineRole: {
        Type: 'AWS::IAM::Role',
        Properties: role('states.amazonaws.com', [allow('lambda:InvokeFunction', arn('Run'))]),
      },
      Machine: {
        Type: 'AWS::StepFunctions::StateMachine',
        Properties: {
          StateMachineName: name('machine'),
          RoleArn: arn('MachineRole'),
          DefinitionString: { 'Fn::Sub': [JSON.stringify(definition), { run: arn('Run') }] },
        },
      },
      RuleRole: {
        Type: 'AWS::IAM::Role',
        Properties: role('events.amazonaws.com', [allow('states:StartExecution', { Ref: 'Machine' })]),
      },
      Rule: {
        Type: 'AWS::Events::Rule',
        Properties: {
          Name: name('manifests'),
          EventPattern: {
            source: ['aws.s3'],
            'detail-type': ['Object Created'],
            detail: { bucket: { name: [{ Ref: 'Landing' }] }, object: { key: [{ suffix: 'repo.csv' }] } },
          },
          Targets: [{ Id: 'machine', Arn: { Ref: 'Machine' }, RoleArn: arn('RuleRole') }],
        },
      },
      JobRole: { Type: 'AWS::IAM::Role', Properties: role('states.amazonaws.com', []) },
    },
    Outputs: {
      Landing: { Value: { Ref: 'Landing' } },
      Silver: { Value: { Ref: 'Silver' } },
      State: { Value: { Ref: 'State' } },
      Machine: { Value: { Ref: 'Machine' } },
      JobRole: { Value: arn('JobRole') },
      RunRole: { Value: { Ref: 'RunRole' } },
    },
  };
}

const BUNDLES = { run: { 'handler.mjs': HANDLER } };
const running: LocalAws[] = [];
const children: ChildProcess[] = [];
afterEach(async () => {
  for (const child of children.splice(0)) child.kill('SIGKILL');
  await Promise.all(running.splice(0).map((aws) => aws.stop()));
});

async function start(
  state: string,
  folder: string,
  onMessage?: (message: Message) => void,
): Promise<LocalAws> {
  const containers = join(state, 'containers');
  mkdirSync(join(containers, 'slide-inference'), { recursive: true });
  const aws = await startLocalAws({
    state,
    package: folder,
    python: projectPython(),
    containers,
    executor: 'process',
    ...(onMessage === undefined ? {} : { onMessage }),
  });
  running.push(aws);
  return aws;
}

/** An engine in another process; resolves when it is up. */
async function startChild(state: string, folder: string): Promise<ChildProcess> {
  const script = new URL('./engine-child.ts', import.meta.url).pathname;
  const child = spawn(process.execPath, [script, state, folder, state], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  children.push(child);
  await once(child.stdout, 'data');
  return child;
}

function clients({ endpoint, region, credentials }: Connection) {
  const options = { endpoint, region, credentials, maxAttempts: 1 };
  return {
    s3: new S3Client(options),
    table: new DynamoDBClient(options),
    states: new SFNClient(options),
    sageMaker: new SageMakerClient(options),
  };
}

async function putManifest(aws: Connection, key = 'study/repo.csv'): Promise<void> {
  await clients(aws).s3.send(
    new PutObjectCommand({ Bucket: aws.outputs.Landing, Key: key, Body: 'slide\na.svs\n' }),
  );
}

/** Puts a manifest and waits until its execution has ended, which is after all that it did. */
async function runToEnd(aws: LocalAws): Promise<string> {
  await putManifest(aws);
  const list = new ListExecutionsCommand({ stateMachineArn: aws.outputs.Machine });
  const find = async () => (await clients(aws).states.send(list)).executions?.[0]?.executionArn;
  let executionArn = await find();
  for (; executionArn === undefined; executionArn = await find()) await until(() => true);
  await aws.services.stepFunctions.ended(executionArn);
  return executionArn;
}

async function runsOf(aws: Connection, key = 'study/repo.csv'): Promise<number> {
  const get = new GetItemCommand({ TableName: aws.outputs.State, Key: { pk: { S: key } } });
  return Number((await clients(aws).table.send(get)).Item?.runs?.N ?? 0);
}

describe('a stack that runs', () => {
  it('takes a manifest through rule, state machine, function, table, bucket and topic', async () => {
    const messages: Message[] = [];
    const state = temporaryFolder();
    const aws = await start(state, packaged(template('dev'), BUNDLES), (message) => messages.push(message));
    await putManifest(aws);
    await until(() => messages.length === 1);
    expect(messages[0]).toMatchObject({
      message: 'done study/repo.csv',
      publisher: `arn:aws:iam::000000000000:role/${aws.outputs.RunRole}`,
    });
    const { s3, states } = clients(aws);
    const copy = await s3.send(
      new GetObjectCommand({ Bucket: aws.outputs.Silver, Key: 'copy/study/repo.csv' }),
    );
    expect(await copy.Body?.transformToString()).toBe('slide\na.svs\n');
    expect(await runsOf(aws)).toBe(1);
    const list = await states.send(new ListExecutionsCommand({ stateMachineArn: aws.outputs.Machine }));
    expect(list.executions).toHaveLength(1);
    const [execution] = list.executions ?? [];
    await until(() => aws.services.stepFunctions.transitions(execution?.executionArn ?? '').standard >= 2);
    const by = aws.counts().byPrincipal[`arn:aws:iam::000000000000:role/${aws.outputs.RunRole}`];
    expect(by).toEqual({ 's3.get': 1, 's3.put': 1, 'dynamodb.UpdateItem': 1, 'sns.Publish': 1 });
    expect(readdirSync(join(state, 'messages', 'lab-dev-runs'))).toEqual(['000001.json']);
    const logs = readdirSync(join(state, 'logs'), { recursive: true, withFileTypes: true })
      .filter((entry) => entry.isFile())
      .map((entry) => readFileSync(join(entry.parentPath, entry.name), 'utf8'))
      .join('');
    expect(logs).toContain('read 12');
  });

  it('holds everyone to bucket policies and roles', async () => {
    const aws = await start(temporaryFolder(), packaged(template('dev'), BUNDLES));
    const { s3, sageMaker } = clients(aws);
    await s3.send(new PutObjectCommand({ Bucket: aws.outputs.Silver, Key: 'a', Body: 'b' }));
    await expect(
      s3.send(new DeleteObjectCommand({ Bucket: aws.outputs.Silver, Key: 'a' })),
    ).rejects.toMatchObject({ name: 'AccessDenied', message: expect.stringContaining('explicit deny') });
    const job = (ImageUri: string, RoleArn = aws.outputs.JobRole) =>
      sageMaker.send(
        new CreateProcessingJobCommand({
          ProcessingJobName: 'job',
          RoleArn,
          AppSpecification: { ImageUri },
          ProcessingResources: {
            ClusterConfig: { InstanceCount: 1, InstanceType: 'ml.g5.xlarge', VolumeSizeInGB: 10 },
          },
        }),
      );
    const image = '000000000000.dkr.ecr.us-east-1.amazonaws.com/lab-dev-slide-inference:1';
    await expect(job(image)).rejects.toThrow('sagemaker.amazonaws.com cannot assume');
  });

  it('names images that no repository holds', async () => {
    const stack = template('dev');
    stack.Resources.JobRole.Properties = role('sagemaker.amazonaws.com', []);
    const aws = await start(temporaryFolder(), packaged(stack, BUNDLES));
    const create = new CreateProcessingJobCommand({
      ProcessingJobName: 'job',
      RoleArn: aws.outputs.JobRole,
      AppSpecification: { ImageUri: '000000000000.dkr.ecr.us-east-1.amazonaws.com/other:1' },
      ProcessingResources: {
        ClusterConfig: { InstanceCount: 1, InstanceType: 'ml.g5.xlarge', VolumeSizeInGB: 10 },
      },
    });
    await expect(clients(aws).sageMaker.send(create)).rejects.toThrow(
      /no image .*other:1.*lab-dev-slide-inference/,
    );
  });
});

describe('a state folder', () => {
  it('keeps everything over a restart, also with a changed package', async () => {
    const state = temporaryFolder();
    const first = await start(state, packaged(template('dev'), BUNDLES));
    const executionArn = await runToEnd(first);
    await first.stop();

    const changed = HANDLER.replace("'done '", "'done again '");
    const second = await start(state, packaged(template('dev'), { run: { 'handler.mjs': changed } }));
    expect(first.credentials).toMatchObject(second.credentials);
    expect(await runsOf(second)).toBe(1);
    const described = await clients(second).states.send(new DescribeExecutionCommand({ executionArn }));
    expect(described.status).toBe('SUCCEEDED');
    await putManifest(second, 'other/repo.csv');
    const message = join(state, 'messages', 'lab-dev-runs', '000002.json');
    await until(() => existsSync(message));
    expect(readFileSync(message, 'utf8')).toContain('done again other/repo.csv');
  });

  it('holds several stages side by side, one after the other', async () => {
    const state = temporaryFolder();
    const dev = await start(state, packaged(template('dev'), BUNDLES));
    await runToEnd(dev);
    await dev.stop();
    const prod = await start(state, packaged(template('prod'), BUNDLES));
    expect(await runsOf(prod)).toBe(0);
    await prod.stop();
    expect(await runsOf(await start(state, packaged(template('dev'), BUNDLES)))).toBe(1);
  });

  it('is one engine’s, and two folders are two engines’', async () => {
    const state = temporaryFolder();
    const folder = packaged(template('dev'), BUNDLES);
    const first = await start(state, folder);
    await expect(start(state, folder)).rejects.toMatchObject({
      name: 'StateFolderInUse',
      message: expect.stringMatching(new RegExp(`process ${process.pid} at ${first.endpoint}`)),
    });
    const other = await start(temporaryFolder(), folder);
    expect(other.endpoint).not.toBe(first.endpoint);
    await putManifest(first);
    await until(() => existsSync(join(state, 'messages', 'lab-dev-runs', '000001.json')));
    expect(await runsOf(other)).toBe(0);
    await expect(runsOf({ ...other, credentials: first.credentials })).rejects.toMatchObject({
      name: 'UnrecognizedClientException',
    });
  });

  it('of a running engine can be attached to, and of a stopped one not', async () => {
    const state = temporaryFolder();
    expect(attachLocalAws(state)).toBeUndefined();
    const aws = await start(state, packaged(template('dev'), BUNDLES));
    const attached = attachLocalAws(state);
    expect(attached).toEqual({
      pid: process.pid,
      endpoint: aws.endpoint,
      region: 'us-east-1',
      account: '000000000000',
      credentials: aws.credentials,
      outputs: aws.outputs,
    });
    if (attached) expect(await runsOf(attached)).toBe(0);
    await aws.stop();
    await aws.stop();
    expect(attachLocalAws(state)).toBeUndefined();
  });

  it('whose engine was killed is taken over, and its execution goes on', async () => {
    const state = temporaryFolder();
    const folder = packaged(template('dev', 2), BUNDLES);
    const child = await startChild(state, folder);
    const attached = attachLocalAws(state);
    expect(attached?.pid).toBe(child.pid);
    if (attached === undefined) return;
    await expect(start(state, folder)).rejects.toMatchObject({ name: 'StateFolderInUse' });
    await putManifest(attached);
    const executions = join(state, 'executions');
    await until(() =>
      readdirSync(executions, { recursive: true }).some((name) => String(name).endsWith('execution.json')),
    );
    child.kill('SIGKILL');
    await once(child, 'exit');
    expect(attachLocalAws(state)).toBeUndefined();

    const messages: Message[] = [];
    const aws = await start(state, folder, (message) => messages.push(message));
    await until(() => messages.length === 1);
    expect(await runsOf(aws)).toBe(1);
    const list = await clients(aws).states.send(
      new ListExecutionsCommand({ stateMachineArn: aws.outputs.Machine }),
    );
    expect(list.executions).toHaveLength(1);
  });

  it('whose lock names a process number that is another’s now is taken over', async () => {
    const state = temporaryFolder();
    mkdirSync(join(state, 'lock'));
    writeFileSync(
      join(state, 'lock', '000000007.json'),
      JSON.stringify({ pid: process.pid, processStart: '1', released: false }),
    );
    await start(state, packaged(template('dev'), BUNDLES));
    expect(readdirSync(join(state, 'lock'))).toEqual(['000000008.json']);
  });

  it('goes to exactly one of many who start at once', async () => {
    const state = temporaryFolder();
    const folder = packaged(template('dev'), BUNDLES);
    const starts = await Promise.allSettled(Array.from({ length: 4 }, () => start(state, folder)));
    expect(starts.filter((each) => each.status === 'fulfilled')).toHaveLength(1);
    for (const each of starts) {
      if (each.status === 'rejected') expect(each.reason).toMatchObject({ name: 'StateFolderInUse' });
    }
  });

  it('is free again after a start that failed', async () => {
    const state = temporaryFolder();
    const broken = template('dev');
    broken.Resources.RunRole.Properties = role('states.amazonaws.com', []);
    await expect(start(state, packaged(broken, BUNDLES))).rejects.toThrow(
      'lambda.amazonaws.com cannot assume',
    );
    await start(state, packaged(template('dev'), BUNDLES));
  });
});
