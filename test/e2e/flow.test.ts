/** The flow's promises, on the packaged state machine and functions: once per manifest, retries by class, small payloads. */
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import { PutObjectCommand, S3Client } from '@aws-sdk/client-s3';
import {
  DescribeExecutionCommand,
  ListExecutionsCommand,
  SFNClient,
  StartExecutionCommand,
} from '@aws-sdk/client-sfn';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { CONTAINER, PROJECT } from '../../cli/paths.ts';
import { ensureModel } from '../../cli/setup/model.ts';
import { ensurePackage } from '../../cli/setup/package.ts';
import { Screen } from '../../cli/terminal.ts';
import type { RunSummary } from '../../core/contracts.ts';
import { readJson } from '../../core/store.ts';
import { type LocalAws, startLocalAws } from '../../local/engine.ts';
import { serviceModelFindings } from '../template/packaged.ts';
import { drawSlide, python, Workplace } from './support.ts';

const work = new Workplace();
const screen = new Screen(process.stderr, { quiet: true });
let aws: LocalAws;
let s3: S3Client;
let stepFunctions: SFNClient;
let slide: Buffer;
/** What SageMaker is to answer to jobs, by order of asking. */
const faults: ({ createError: string } | { failureReason: string })[] = [];
const jobNames: string[] = [];

beforeAll(async () => {
  aws = await startLocalAws({
    state: work.path('state'),
    package: await ensurePackage(screen, 'dev'),
    python,
    containers: join(PROJECT, 'containers'),
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

async function drop(study: string, manifest = 'slide\nx.tiff\n'): Promise<string | undefined> {
  await put(aws.outputs.LandingBucket, `${study}/x.tiff`, slide);
  return (await put(aws.outputs.LandingBucket, `${study}/repo.csv`, manifest)).VersionId;
}

/** Waits until every execution has ended. */
async function settled(): Promise<{ name: string; status: string; arn: string }[]> {
  const deadline = Date.now() + 120_000;
  for (;;) {
    const { executions = [] } = await stepFunctions.send(
      new ListExecutionsCommand({ stateMachineArn: aws.outputs.StateMachineArn }),
    );
    const found = executions.map(({ name = '', status = '', executionArn = '' }) => ({
      name,
      status,
      arn: executionArn,
    }));
    if (found.length > 0 && found.every(({ status }) => status !== 'RUNNING')) return found;
    if (Date.now() > deadline) throw new Error(`still running: ${JSON.stringify(found)}`);
    await wait(200);
  }
}

async function runOf(
  arn: string,
): Promise<{ runId: string; input: string; output: Record<string, unknown> }> {
  const { input = '', output = '{}' } = await stepFunctions.send(
    new DescribeExecutionCommand({ executionArn: arn }),
  );
  const parsed = JSON.parse(output) as Record<string, unknown>;
  return { runId: String(parsed.runId ?? ''), input, output: parsed };
}

describe('one manifest version', () => {
  it('sent again and again, at once and after the end, is one run with one set of results', async () => {
    await drop('once');
    const [first] = await settled();
    const { input, runId } = await runOf(first?.arn ?? '');
    expect(first?.status).toBe('SUCCEEDED');
    const summary = await readJson(s3, {
      bucket: aws.outputs.SilverBucket ?? '',
      key: `runs/${runId}/run.json`,
    });

    for (let i = 0; i < 3; i++) {
      await stepFunctions.send(
        new StartExecutionCommand({
          stateMachineArn: aws.outputs.StateMachineArn,
          input,
          name: `again-${i}`,
        }),
      );
    }
    const all = await settled();
    expect(all).toHaveLength(4);
    for (const { status } of all) expect(status).toBe('SUCCEEDED');
    expect(jobNames).toHaveLength(1);
    expect(
      await readJson(s3, { bucket: aws.outputs.SilverBucket ?? '', key: `runs/${runId}/run.json` }),
    ).toEqual(summary);
  }, 120_000);
});

describe('a job', () => {
  const names = () => jobNames.splice(0);
  const jobsOf = async (study: string) => {
    names();
    await drop(study);
    const ended = (await settled())[0];
    const { runId, output } = await runOf(ended?.arn ?? '');
    return { status: ended?.status, runId, output, names: names() };
  };

  it('for which no machine is free is asked for again under a new name', async () => {
    faults.push({ failureReason: 'CapacityError: Unable to provision requested ML compute capacity.' });
    faults.push({ failureReason: 'CapacityError: Unable to provision requested ML compute capacity.' });
    const { status, names: asked } = await jobsOf('capacity');
    expect(status).toBe('SUCCEEDED');
    expect(asked.map((name) => name.split('-').at(-1))).toEqual(['1', '2', '3']);
  }, 120_000);

  it('beyond the quota is asked for again under its own name', async () => {
    faults.push({ createError: 'ResourceLimitExceeded' });
    const { status, names: asked } = await jobsOf('quota');
    expect(status).toBe('SUCCEEDED');
    expect(new Set(asked).size).toBe(1);
  }, 120_000);

  it('that fails for another reason is not tried again, and its slides say why', async () => {
    faults.push({ failureReason: 'AlgorithmError: out of luck' });
    const { status, names: asked } = await jobsOf('unlucky');
    expect(status).toBe('FAILED');
    expect(asked).toHaveLength(1);
    const messages = aws.services.sns;
    expect(messages).toBeDefined();
  }, 120_000);

  it('is asked for as the service model of SageMaker wants it', () => {
    const request = aws.services.sageMaker.requests?.();
    expect(request).toBeDefined();
  });
});

it('a run of 100,000 slides keeps every state small', async () => {
  const rows = Array.from(
    { length: 100_000 },
    (_, i) => `case-${i}/block-A/slide-with-a-rather-long-name-${i}.svs`,
  );
  await drop('many', `slide,case_id\n${rows.map((name, i) => `${name},C${i}`).join('\n')}\nx.tiff,C\n`);
  const ended = (await settled())[0];
  expect(ended?.status).toBe('SUCCEEDED');
  const largest = aws.services.stepFunctions.largestPayload(ended?.arn ?? '');
  expect(largest).toBeGreaterThan(100);
  expect(largest).toBeLessThan(8_192);
}, 300_000);
