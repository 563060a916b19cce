/** The flow's promises, on the packaged state machine and functions: once per manifest, retries by class, small payloads. */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import { ListObjectsV2Command, PutObjectCommand, S3Client } from '@aws-sdk/client-s3';
import {
  DescribeExecutionCommand,
  ListExecutionsCommand,
  SFNClient,
  StartExecutionCommand,
} from '@aws-sdk/client-sfn';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { BUNDLES, PROJECT } from '../../cli/paths.ts';
import { ensureModel } from '../../cli/setup/model.ts';
import { ensurePackage } from '../../cli/setup/package.ts';
import { Screen } from '../../cli/terminal.ts';
import type { RunSummary } from '../../core/contracts.ts';
import { runJsonKey } from '../../core/keys.ts';
import { readJson } from '../../core/store.ts';
import { type LocalAws, startLocalAws } from '../../local/engine.ts';
import { hasCurrentServiceModel, serviceModelFindings } from '../template/packaged.ts';
import { drawSlide, python, Workplace } from './support.ts';

const work = new Workplace();
const screen = new Screen(process.stderr, { quiet: true });
let aws: LocalAws;
let s3: S3Client;
let stepFunctions: SFNClient;
let slide: Buffer;
/** What SageMaker is to answer to jobs, in the order in which they are asked for. */
const faults: ({ createError: string } | { failureReason: string })[] = [];
const jobNames: string[] = [];

beforeAll(async () => {
  aws = await startLocalAws({
    state: work.path('state'),
    package: await ensurePackage(screen, 'dev'),
    python,
    containers: join(PROJECT, 'containers'),
    bundles: BUNDLES,
    timeScale: 0.001,
    faults: (jobName) => {
      jobNames.push(jobName);
      return faults.shift();
    },
  });
  const config = { endpoint: aws.endpoint, region: aws.region, credentials: aws.credentials };
  s3 = new S3Client({ ...config, forcePathStyle: true });
  stepFunctions = new SFNClient(config);
  const model = readFileSync(await ensureModel(screen, python));
  await put(aws.outputs.ModelsBucket, 'models/haematoxylin-area/1.0.0/model.tar.gz', model);
  drawSlide(work.path('slide.tiff'));
  slide = readFileSync(work.path('slide.tiff'));
}, 240_000);
afterAll(async () => {
  s3?.destroy();
  stepFunctions?.destroy();
  await aws?.stop();
  work.remove();
});

const put = (bucket: string | undefined, key: string, body: Buffer | string) =>
  s3.send(new PutObjectCommand({ Bucket: bucket, Key: key, Body: body }));

async function drop(study: string, manifest = 'slide\nx.tiff\n'): Promise<void> {
  await put(aws.outputs.LandingBucket, `${study}/x.tiff`, slide);
  await put(aws.outputs.LandingBucket, `${study}/repo.csv`, manifest);
}

let known = 0;
/** Waits until `more` further executions are there and all have ended; the newest first. */
async function settled(more = 1): Promise<{ status: string; arn: string }[]> {
  known += more;
  const deadline = Date.now() + 240_000;
  for (;;) {
    const { executions = [] } = await stepFunctions.send(
      new ListExecutionsCommand({ stateMachineArn: aws.outputs.StateMachineArn }),
    );
    if (executions.length >= known && executions.every(({ status }) => status !== 'RUNNING')) {
      expect(executions).toHaveLength(known);
      return executions.map(({ status = '', executionArn = '' }) => ({ status, arn: executionArn }));
    }
    if (Date.now() > deadline) throw new Error(`still running: ${JSON.stringify(executions)}`);
    await wait(200);
  }
}

/** The only run of a study, as its run.json has it. */
async function summaryOf(study: string): Promise<RunSummary> {
  const bucket = aws.outputs.SilverBucket ?? '';
  const { CommonPrefixes } = await s3.send(
    new ListObjectsV2Command({ Bucket: bucket, Prefix: `runs/${study}-`, Delimiter: '/' }),
  );
  expect(CommonPrefixes).toHaveLength(1);
  const runId = CommonPrefixes?.[0]?.Prefix?.split('/')[1] ?? '';
  return (await readJson(s3, { bucket, key: runJsonKey(runId) })) as RunSummary;
}

describe('one manifest version', () => {
  it('sent again and again, also after the end, is one run with one set of results', async () => {
    await drop('once');
    const [first] = await settled();
    expect(first?.status).toBe('SUCCEEDED');
    const { input } = await stepFunctions.send(new DescribeExecutionCommand({ executionArn: first?.arn }));
    const summary = await summaryOf('once');
    expect(summary.state).toBe('SUCCEEDED');

    for (let i = 0; i < 3; i++) {
      await stepFunctions.send(
        new StartExecutionCommand({
          stateMachineArn: aws.outputs.StateMachineArn,
          input,
          name: `again-${i}`,
        }),
      );
    }
    for (const { status } of await settled(3)) expect(status).toBe('SUCCEEDED');
    expect(jobNames).toHaveLength(1);
    expect(await summaryOf('once')).toEqual(summary);
  }, 120_000);

  it('has its state transitions counted as Step Functions counts them', async () => {
    await drop('counted', 'slide\nx.tiff\nx.tiff\ngone.svs\n');
    const [ended] = await settled();
    const { cost } = await summaryOf('counted');
    expect(cost.transitions).toBe(aws.services.stepFunctions.transitions(ended?.arn ?? '').standard);
  }, 120_000);
});

describe('a job', () => {
  async function run(study: string): Promise<{ status: string | undefined; names: string[] }> {
    jobNames.length = 0;
    await drop(study);
    const [ended] = await settled();
    return { status: ended?.status, names: [...jobNames] };
  }

  it('for which no machine is free is asked for again under a new name', async () => {
    const failureReason = 'CapacityError: Unable to provision requested ML compute capacity.';
    faults.push({ failureReason }, { failureReason });
    const { status, names } = await run('capacity');
    expect(status).toBe('SUCCEEDED');
    expect(names.map((name) => name.split('-').at(-1))).toEqual(['1', '2', '3']);
  }, 120_000);

  it('beyond the quota is asked for again until there is room', async () => {
    faults.push({ createError: 'ResourceLimitExceeded' });
    const { status, names } = await run('quota');
    expect(status).toBe('SUCCEEDED');
    expect(names).toHaveLength(2);
    expect(names[0]).toBe(names[1]);
  }, 120_000);

  it('that SageMaker throttles is asked for again', async () => {
    faults.push({ createError: 'ThrottlingException' });
    const { status, names } = await run('throttled');
    expect(status).toBe('SUCCEEDED');
    expect(names).toHaveLength(2);
  }, 120_000);

  it('that fails for another reason is not tried again, and its slides say why', async () => {
    faults.push({ failureReason: 'AlgorithmError: out of luck' });
    const { status, names } = await run('unlucky');
    expect(status).toBe('FAILED');
    expect(names).toHaveLength(1);
    const summary = await summaryOf('unlucky');
    expect(summary).toMatchObject({ state: 'FAILED', reason: { error: 'NoResults' } });
    expect(summary.slides[0]).toMatchObject({ state: 'FAILED', reason: { error: 'JobFailed' } });
    expect(summary.slides[0]?.reason?.message).toContain('out of luck');
  }, 120_000);

  it.skipIf(!hasCurrentServiceModel)('is asked for as the service model of SageMaker wants it', () => {
    const names = readdirSync(work.path('state', 'jobs')).filter((name) => name.startsWith('slideway-dev-'));
    const calls = names.map((name) => ({
      service: 'sagemaker',
      operation: 'CreateProcessingJob',
      request: JSON.parse(readFileSync(work.path('state', 'jobs', name, 'job.json'), 'utf8'))
        .request as unknown,
    }));
    expect(calls.length).toBeGreaterThan(2);
    expect(serviceModelFindings(calls)).toEqual([]);
  });
});

it('a run of 100,000 slides keeps every state small', async () => {
  const rows = Array.from(
    { length: 100_000 },
    (_, i) => `case-${i}/block-A/a-slide-with-a-rather-long-name-${i}.svs,C${i}`,
  );
  await drop('many', `slide,case_id\n${rows.join('\n')}\nx.tiff,C\n`);
  const [ended] = await settled();
  expect(ended?.status).toBe('SUCCEEDED');
  expect((await summaryOf('many')).counts).toEqual({ MISSING: 100_000, AGGREGATED: 1 });
  const largest = aws.services.stepFunctions.largestPayload(ended?.arn ?? '');
  expect(largest).toBeGreaterThan(100);
  expect(largest).toBeLessThan(8_192);
}, 300_000);
