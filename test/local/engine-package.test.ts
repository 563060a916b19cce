/** Slideway's own package on the local AWS, as far as it goes without a container: every service, every role. */
import { resolve } from 'node:path';
import { CloudWatchLogsClient, GetLogEventsCommand } from '@aws-sdk/client-cloudwatch-logs';
import { GetObjectCommand, ListObjectsV2Command, PutObjectCommand, S3Client } from '@aws-sdk/client-s3';
import { DescribeExecutionCommand, ListExecutionsCommand, SFNClient } from '@aws-sdk/client-sfn';
import { afterAll, describe, expect, it } from 'vitest';
import { packageFolder } from '../../cli/setup/package.ts';
import { startLocalAws } from '../../local/engine.ts';
import type { Message } from '../../local/sns.ts';
import { projectPython } from '../support/python.ts';
import { temporaryFolder, until } from './kit.ts';

const messages: Message[] = [];
const aws = await startLocalAws({
  state: temporaryFolder(),
  package: resolve(process.env.SLIDEWAY_PACKAGE || packageFolder('dev')),
  python: projectPython(),
  containers: resolve('containers'),
  executor: 'process',
  timeScale: 0.01,
  onMessage: (message) => messages.push(message),
});
afterAll(() => aws.stop());
const options = { endpoint: aws.endpoint, region: aws.region, credentials: aws.credentials };
const s3 = new S3Client(options);
const states = new SFNClient(options);

/** Drops a manifest and waits until its run has told of its end. */
async function run(
  study: string,
  manifest: string,
): Promise<{ message: Message | undefined; status: string | undefined }> {
  const before = messages.length;
  const key = `${study}/repo.csv`;
  await s3.send(
    new PutObjectCommand({ Bucket: aws.outputs.LandingBucket, Key: key, Body: Buffer.from(manifest) }),
  );
  await until(() => messages.length > before);
  const list = new ListExecutionsCommand({ stateMachineArn: aws.outputs.StateMachineArn });
  const executionArn = (await states.send(list)).executions?.[0]?.executionArn;
  await aws.services.stepFunctions.ended(executionArn ?? '');
  const { status } = await states.send(new DescribeExecutionCommand({ executionArn }));
  return { message: messages.at(-1), status };
}

describe('a dropped manifest', () => {
  it('whose only slide is missing ends as FAILED, with a summary and a message, under the roles of the template', async () => {
    const { message, status } = await run('gone', 'slide\nmissing.svs\n');
    expect(status).toBe('FAILED');
    expect(message?.attributes).toMatchObject({ state: 'FAILED' });
    const runId = message?.attributes.runId;
    const summary = await s3.send(
      new GetObjectCommand({ Bucket: aws.outputs.SilverBucket, Key: `runs/${runId}/run.json` }),
    );
    expect(JSON.parse((await summary.Body?.transformToString()) ?? '')).toMatchObject({
      runId,
      state: 'FAILED',
      slides: [{ slide: 'missing.svs', state: 'MISSING' }],
    });
    const principals = Object.keys(aws.counts().byPrincipal).map((arn) => arn.split('/').at(-1));
    expect(principals).toEqual(
      expect.arrayContaining([
        'slideway-dev-claim-manifest-us-east-1',
        'slideway-dev-plan-run-us-east-1',
        'slideway-dev-publish-run-us-east-1',
      ]),
    );
  });

  it('that is no manifest ends as FAILED too, and says why', async () => {
    const { message, status } = await run('empty', '');
    expect(status).toBe('FAILED');
    expect(message?.message).toContain('ManifestInvalid');
  });
});

it('nothing but a manifest starts a run', async () => {
  const before = messages.length;
  await s3.send(
    new PutObjectCommand({ Bucket: aws.outputs.LandingBucket, Key: 'study/notes.csv', Body: 'x' }),
  );
  await s3.send(
    new PutObjectCommand({ Bucket: aws.outputs.SilverBucket, Key: 'study/repo.csv', Body: 'slide\n' }),
  );
  await until(() => aws.services.events.pending().length === 0);
  const runs = await s3.send(
    new ListObjectsV2Command({ Bucket: aws.outputs.SilverBucket, Prefix: 'runs/study' }),
  );
  expect(runs.KeyCount).toBe(0);
  expect(messages).toHaveLength(before);
});

it('tiles are let go after their days, results are not, and a log says so', async () => {
  const Bucket = aws.outputs.SilverBucket;
  for (const Key of ['tiles/t/t-00000.tar', 'runs/r/slides/s/m/tiles.parquet'])
    await s3.send(new PutObjectCommand({ Bucket, Key, Body: 'x' }));
  await aws.services.s3.expire(Date.now() + 9 * 24 * 3600 * 1000);
  const listed = async (Prefix: string) =>
    (await s3.send(new ListObjectsV2Command({ Bucket, Prefix }))).Contents?.map(({ Key }) => Key);
  expect(await listed('tiles/')).toBeUndefined();
  expect(await listed('runs/r/')).toEqual(['runs/r/slides/s/m/tiles.parquet']);
  const logs = new CloudWatchLogsClient(options);
  const { events = [] } = await logs.send(
    new GetLogEventsCommand({ logGroupName: '/local/s3', logStreamName: 'lifecycle' }),
  );
  expect(events.map(({ message }) => JSON.parse(message ?? ''))).toEqual([
    expect.objectContaining({ event: 'expired', bucket: Bucket, rule: 'tiles', objects: 1, versions: 1 }),
  ]);
});
