import { QueryCommand } from '@aws-sdk/lib-dynamodb';
import { parse } from 'csv-parse/sync';
import { afterAll, afterEach, beforeEach, describe, expect, it } from 'vitest';

import type { PlannedSlide, ResultSummary, RunSummary } from '../../core/contracts.ts';
import { messageKey, reportKey, resultsCsvKey, runJsonKey } from '../../core/keys.ts';
import { PRICES } from '../../core/prices.ts';
import {
  type PublishDependencies,
  type PublishInput,
  publish,
  publishInputSchema,
} from '../../core/publish.ts';
import { readBytes, readJson } from '../../core/store.ts';
import { emittedBy } from '../support/metrics.ts';
import { MODEL, plannedSlide, RUN, writePlan } from '../support/results.ts';
import { CREDENTIALS, type Services, startServices } from '../support/services.ts';

let services: Services;
let clock: number;

beforeEach(async () => {
  services = await startServices();
  clock = Date.parse('2026-11-12T09:00:00.000Z');
  await services.state.claimRun({ ...RUN, state: 'RUNNING', executionArn: 'arn' });
});
afterEach(() => services.close());
afterAll(() => {
  process.env.AWS_ENDPOINT_URL = undefined;
});

const deps = (): PublishDependencies => ({
  ...services,
  codeVersion: '0.1.0',
  prices: PRICES,
  // Later at every look, as clocks are.
  now: () => new Date(clock++),
});
const publishRun = (input: PublishInput = { run: RUN }) => publish(input, deps());
const text = async (key: string) =>
  Buffer.from((await readBytes(services.s3, { bucket: services.silver, key })) ?? []).toString('utf8');
const summary = async () => JSON.parse(await text(runJsonKey(RUN.runId))) as RunSummary;

const RESULT: ResultSummary = {
  model: MODEL.name,
  version: MODEL.version,
  key: `runs/${RUN.runId}/slides/s/${MODEL.name}/result.json`,
  tiles: { kept: 8, ok: 8, unreadable: 0 },
  tissueMm2: 1.5,
  outputs: { mean_haematoxylin_area: 0.25 },
};

async function endSlide(slideId: string, state: 'AGGREGATED' | 'FAILED' | 'INFERRING'): Promise<void> {
  await services.state.transition(RUN.runId, slideId, state, {
    slide: `scans/${slideId}.svs`,
    requests: { s3Get: 10 },
    ...(state === 'AGGREGATED' && { results: [RESULT] }),
    ...(state === 'FAILED' && { reason: { error: 'JobFailed', message: 'the job failed' } }),
  });
}

async function mixedRun(): Promise<void> {
  const slides: PlannedSlide[] = [
    plannedSlide('done', { line: 2 }),
    plannedSlide('broken', { line: 3 }),
    plannedSlide('stuck', { line: 4, metadata: { patient_id: 'Meier' } }),
    plannedSlide('done', {
      line: 5,
      state: 'DUPLICATE',
      reason: { error: 'SlideDuplicate', message: 'twice' },
    }),
    plannedSlide('late', {
      line: 6,
      state: 'MISSING',
      reason: { error: 'SlideMissing', message: 'scans/late.svs is not in Landing' },
    }),
  ];
  await writePlan(services, slides);
  await services.state.updateRun(RUN.runId, { plannedAt: '2026-11-12T08:01:00.000Z' });
  await endSlide('done', 'AGGREGATED');
  await endSlide('broken', 'FAILED');
  await endSlide('stuck', 'INFERRING');
  await services.state.putJob(RUN.runId, {
    ...{ jobName: 'job-1', model: MODEL.name, version: MODEL.version, state: 'SUCCEEDED' },
    ...{ instanceType: 'ml.g5.xlarge', instanceCount: 1, instanceSeconds: 1800 },
  });
}

describe('a run with slides that ended in every way', () => {
  beforeEach(mixedRun);

  it('is PARTIAL, and every line of the manifest is in run.json and results.csv', async () => {
    expect(await publishRun()).toMatchObject({ runId: RUN.runId, state: 'PARTIAL', first: true });
    const run = await summary();
    expect(run.slides.map(({ line, state, reason }) => [line, state, reason?.error ?? null])).toEqual([
      [2, 'AGGREGATED', null],
      [3, 'FAILED', 'JobFailed'],
      [4, 'FAILED', 'Unfinished'],
      [5, 'DUPLICATE', 'SlideDuplicate'],
      [6, 'MISSING', 'SlideMissing'],
    ]);
    expect(run.counts).toEqual({ AGGREGATED: 1, FAILED: 2, DUPLICATE: 1, MISSING: 1 });
    expect(run.slides[0]?.results[0]?.outputs).toEqual({ mean_haematoxylin_area: 0.25 });
    expect(run.jobs.map(({ jobName }) => jobName)).toEqual(['job-1']);
    expect(run.cost.requests.s3Get).toBe(30);
    expect(run.cost.estimatedUsd).toBeGreaterThan(0.7);
    const lines = parse(await text(resultsCsvKey(RUN.runId)), { columns: true }) as Record<string, string>[];
    expect(lines.map(({ slide_id, state }) => [slide_id, state])).toEqual(
      run.slides.map(({ slideId, state }) => [slideId, state]),
    );
    const report = await text(reportKey(RUN.runId));
    expect(report).toContain('Needs attention');
    expect(report.match(/<article/g)).toHaveLength(5);
  });

  it('ends in the state table and in the lineage', async () => {
    await publishRun();
    expect(await services.state.run(RUN.runId)).toMatchObject({
      state: 'PARTIAL',
      endedAt: '2026-11-12T09:00:00.000Z',
      counts: { AGGREGATED: 1 },
    });
    const { Items = [] } = await services.documents.send(
      new QueryCommand({
        TableName: 'lineage',
        KeyConditionExpression: 'pk = :pk',
        ExpressionAttributeValues: { ':pk': `RUN#${RUN.runId}` },
      }),
    );
    expect(Items.map(({ action }) => action)).toEqual(['RUN_PARTIAL']);
    expect(Items[0]?.outputs).toMatchObject([
      { key: runJsonKey(RUN.runId), checksum: expect.stringMatching(/^sha256:/) },
      { key: resultsCsvKey(RUN.runId) },
      { key: reportKey(RUN.runId) },
    ]);
  });

  it('sends one message, that names slides by id and line alone', async () => {
    await publishRun();
    expect(services.messages).toHaveLength(1);
    const [message] = services.messages;
    expect(message?.attributes).toMatchObject({ state: 'PARTIAL', runId: RUN.runId });
    expect(message?.message).toContain('late (line 6): … is not in Landing (SlideMissing)');
    expect(message?.message).not.toMatch(/\.svs|Meier/);
    const record = await readJson(services.s3, { bucket: services.silver, key: messageKey(RUN.runId) });
    expect(record).toMatchObject({ messageId: message?.messageId, subject: message?.subject });
  });

  it('published again, changes nothing and is silent', async () => {
    await publishRun();
    const before = await Promise.all(
      [runJsonKey, resultsCsvKey, reportKey].map((key) => text(key(RUN.runId))),
    );
    const late = { stage: 'PublishRun', error: 'Sandbox.Timedout', cause: '' };
    expect(await publishRun({ run: RUN, failure: late })).toMatchObject({ state: 'PARTIAL', first: false });
    const after = await Promise.all(
      [runJsonKey, resultsCsvKey, reportKey].map((key) => text(key(RUN.runId))),
    );
    expect(after).toEqual(before);
    expect(services.messages).toHaveLength(1);
  });

  it('is sent its message later, when the topic could not be reached at first', async () => {
    const { sns } = services;
    sns.config.endpoint = async () => ({ protocol: 'http:', hostname: '127.0.0.1', port: 1, path: '/' });
    sns.config.maxAttempts = async () => 1;
    await expect(publishRun()).rejects.toThrow();
    expect((await services.state.run(RUN.runId))?.state).toBe('PARTIAL');
    services.sns = new (sns.constructor as typeof import('@aws-sdk/client-sns').SNSClient)({
      endpoint: services.endpoint,
      region: 'us-east-1',
      credentials: CREDENTIALS,
    });
    expect(await publishRun()).toMatchObject({ first: false });
    expect(services.messages).toHaveLength(1);
    services.sns.destroy();
  });
});

describe('a run that', () => {
  it('has results for all its slides is SUCCEEDED', async () => {
    await writePlan(services, [plannedSlide('a'), plannedSlide('a', { line: 3, state: 'DUPLICATE' })]);
    await endSlide('a', 'AGGREGATED');
    expect((await publishRun()).state).toBe('SUCCEEDED');
  });

  it('has none is FAILED for what most of its slides failed for', async () => {
    await writePlan(services, [plannedSlide('a'), plannedSlide('b', { line: 3 })]);
    await endSlide('a', 'FAILED');
    await endSlide('b', 'FAILED');
    await publishRun();
    expect((await summary()).reason).toEqual({
      error: 'NoResults',
      message: 'No slide came through. Most often (2 of 2): the job failed',
    });
  });

  it('failed before it had a plan is FAILED with stage and reason, in words', async () => {
    const cause = JSON.stringify({
      errorType: 'ManifestInvalid',
      errorMessage: 'no header row',
      trace: ['at x'],
    });
    const failure = { stage: 'PlanRun', error: 'ManifestInvalid', cause };
    expect((await publishRun({ run: RUN, failure })).state).toBe('FAILED');
    const run = await summary();
    expect(run.reason).toEqual({ error: 'ManifestInvalid', message: 'PlanRun: no header row' });
    expect(run.slides).toEqual([]);
    expect(await text(reportKey(RUN.runId))).toContain('There is no slide in this run');
    expect(services.messages[0]?.message).toContain('PlanRun: no header row');
  });

  it('failed before its missing slides could wait does not say that they come by themselves', async () => {
    const reason = { error: 'SlideMissing', message: 'a.svs is not in Landing.' };
    await writePlan(services, [plannedSlide('a', { state: 'MISSING', reason })]);
    await publishRun({ run: RUN, failure: { stage: 'PlanRun', error: 'Sandbox.Timedout', cause: 'killed' } });
    expect((await summary()).slides).toMatchObject([{ state: 'FAILED', reason: { error: 'Unfinished' } }]);
    expect(services.messages[0]?.message).not.toContain('done by itself');
  });

  it('could not be claimed has its message', async () => {
    const event = { detail: { bucket: { name: 'landing' }, object: { key: 'repo.csv', etag: 'e' } } };
    const input = publishInputSchema.parse({
      event,
      failure: { stage: 'ClaimManifest', error: 'ManifestMisplaced', cause: 'put it into a folder' },
    });
    expect(await publishRun(input)).toMatchObject({ runId: null, state: 'FAILED' });
    expect(services.messages[0]?.message).toContain('s3://landing/repo.csv');
    expect(services.messages[0]?.message).toContain('put it into a folder');
  });

  it('has more slides than a part of an upload holds is streamed whole', async () => {
    const slides = Array.from({ length: 12_000 }, (_, i) =>
      plannedSlide(`slide-${i}`, {
        line: i + 2,
        state: 'QUARANTINED',
        reason: { error: 'X', message: 'r'.repeat(600) },
      }),
    );
    await writePlan(services, slides);
    await publishRun();
    const run = await summary();
    expect(run.slides).toHaveLength(12_000);
    expect(run.slides.at(-1)?.slideId).toBe('slide-11999');
    expect(await text(reportKey(RUN.runId).replace('index', 'page-60'))).toContain('slide-11999');
  });
});

describe('the handler', () => {
  it('does the same from its environment and answers with the state', async () => {
    await writePlan(services, [plannedSlide('a')]);
    await endSlide('a', 'AGGREGATED');
    Object.assign(process.env, {
      AWS_ENDPOINT_URL: services.endpoint,
      AWS_REGION: 'us-east-1',
      AWS_ACCESS_KEY_ID: CREDENTIALS.accessKeyId,
      AWS_SECRET_ACCESS_KEY: CREDENTIALS.secretAccessKey,
      SILVER_BUCKET: services.silver,
      STATE_TABLE: 'state',
      LINEAGE_TABLE: 'lineage',
      TOPIC_ARN: services.topicArn,
      STAGE: 'test',
      CODE_VERSION: '0.1.0',
      POWERTOOLS_SERVICE_NAME: 'publish-run',
      POWERTOOLS_METRICS_NAMESPACE: 'Slideway',
      POWERTOOLS_LOG_LEVEL: 'SILENT',
    });
    await services.state.updateRun(RUN.runId, {
      plannedAt: '2026-11-12T08:00:10.000Z',
      ingestedAt: '2026-11-12T08:01:00.000Z',
    });
    const { handler } = await import('../../functions/publish-run/handler.ts');
    const context = { functionName: 'publish-run', awsRequestId: '1' } as never;
    const emitted = await emittedBy(() => handler({ run: RUN }, context));
    expect(emitted.answer).toEqual({ runId: RUN.runId, state: 'SUCCEEDED' });
    expect(emitted.metrics).toMatchObject({
      'RunsEnded service=publish-run stage=test state=SUCCEEDED': 1,
      'SlidesAggregated service=publish-run stage=test': 1,
      'SlidesFailed service=publish-run stage=test': 0,
      'Tiles service=publish-run stage=test': 8,
      'TilesUnreadable service=publish-run stage=test': 0,
      'PlanSeconds service=publish-run stage=test': 10,
      'IngestSeconds service=publish-run stage=test': 50,
      'EstimatedUsdPerSlide service=publish-run stage=test': expect.any(Number),
    });
    // A run that was published before is not counted again.
    expect((await emittedBy(() => handler({ run: RUN }, context))).metrics).toEqual({});
  });
});
