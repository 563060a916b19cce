/** The record of a real run, as an auditor looks at it: traced, verified, tampered with, reconciled. */
import { readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { BUNDLES, PROJECT } from '../../cli/paths.ts';
import { ensurePackage } from '../../cli/setup/package.ts';
import { Screen } from '../../cli/terminal.ts';
import type { Trace } from '../../core/trace.ts';
import { startLocalAws } from '../../local/engine.ts';
import { drawSlide, type Ended, python, readSummary, Workplace } from './support.ts';

const work = new Workplace();
const state = work.path('state');
const slideway = (...args: string[]): Promise<Ended> => work.slideway(...args, '--state', state);
let runId: string;
let slideBytes: Buffer;

beforeAll(async () => {
  drawSlide(work.path('one.tiff'));
  slideBytes = readFileSync(work.path('one.tiff'));
  const study = work.study('liver', {
    'one.tiff': slideBytes,
    'repo.csv': 'slide,slide_id,patient_id\none.tiff,S1,P-4711\nlost.tiff,S2,P-4712\n',
  });
  const ended = await slideway('run', study, '--quiet', '--out', work.path('out'));
  expect(ended.code, ended.stderr).toBe(3);
  runId = readSummary(work.path('out')).runId;
}, 240_000);
afterAll(() => work.remove());

/** The files on disk that hold the slide's bytes. */
function slideFiles(): string[] {
  const content = join(state, 's3', 'content');
  return readdirSync(content, { recursive: true })
    .map((name) => join(content, String(name)))
    .filter((path) => statSync(path).isFile() && statSync(path).size === slideBytes.length);
}

it('a heatmap is traced back to Landing', async () => {
  const key = `runs/${runId}/slides/S1/haematoxylin-area/heatmap.png`;
  const { code, stdout } = await slideway('trace', key, '--json');
  expect(code, stdout).toBe(0);
  const { object, paths } = JSON.parse(stdout) as Trace;
  expect(object?.checksum).toMatch(/^sha256:/);
  expect(paths[0]?.missing).toEqual([]);
  const steps = new Map(paths[0]?.steps.map((step) => [step.action, step]));
  expect([...steps.keys()]).toEqual([
    'SLIDE_AGGREGATED',
    'SLIDE_INFERRED',
    'JOB_SUCCEEDED',
    'INFERENCE_PLANNED',
    'SLIDE_INGESTED',
    'RUN_PLANNED',
    'RUN_CLAIMED',
  ]);
  const ingested = steps.get('SLIDE_INGESTED');
  expect(ingested?.inputs?.[0]).toMatchObject({
    key: 'liver/one.tiff',
    versionId: expect.any(String),
    checksum: ingested?.outputs?.[0]?.checksum,
  });
  expect(steps.get('JOB_SUCCEEDED')?.parameters).toMatchObject({
    imageUri: expect.stringContaining('slide-inference:'),
    roleArn: expect.stringContaining(':role/slideway-dev-job-'),
    modelDigest: steps.get('SLIDE_INFERRED')?.parameters?.modelDigest,
  });

  const { stdout: text } = await slideway('trace', 'S1');
  expect(text).toContain('Whole: every link back to Landing is on record.');
  expect(text).toContain(ingested?.hash);
  expect(text).not.toContain('P-4711');
  expect((await slideway('trace', 'S99')).code).toBe(2);
}, 60_000);

it('what is not in order in the study is told, and what is', async () => {
  const { code, stdout } = await slideway('reconcile', 'liver');
  expect(code).toBe(3);
  expect(stdout).toMatch(/^missing +S2 \(lost\.tiff\): /m);
  expect(stdout).toContain('1 in order, 1 missing, 0 extra, 0 changed, 0 stuck');
  const json = JSON.parse((await slideway('reconcile', 'liver', '--json', '--quiet')).stdout) as {
    counts: Record<string, number>;
    findings: unknown[];
  };
  expect(json.counts).toMatchObject({ 'in order': 1, missing: 1 });
  expect(json.findings).toHaveLength(2);
  expect((await slideway('reconcile', 'kidney')).code).toBe(2);
}, 60_000);

describe('the record', () => {
  it('that nobody touched is whole', async () => {
    const { code, stdout } = await slideway('verify');
    expect(code, stdout).toBe(0);
    expect(stdout).toMatch(/^Whole: 2 chains, 8 events, /);
    expect(stdout).toContain('There is no anchor yet');
  }, 60_000);

  it('is anchored by the schedule, in a bucket from which nothing goes', async () => {
    // As if the engine had not run when the schedule was due.
    const schedules = join(state, 'events', 'schedules');
    const [name = ''] = readdirSync(schedules).filter((file) => file.includes('anchors'));
    const path = join(schedules, name);
    const schedule = JSON.parse(readFileSync(path, 'utf8')) as { expression: string };
    writeFileSync(path, JSON.stringify({ ...schedule, next: '2026-01-01T00:00:00.000Z' }));
    const aws = await startLocalAws({
      state,
      package: await ensurePackage(new Screen(process.stderr, { quiet: true }), 'dev'),
      python,
      containers: join(PROJECT, 'containers'),
      bundles: BUNDLES,
    });
    while (aws.services.events.pending().length > 0) await new Promise((done) => setTimeout(done, 100));
    await aws.stop();
    const { code, stdout } = await slideway('verify', 'S1', '--json');
    expect(code, stdout).toBe(0);
    expect(JSON.parse(stdout)).toMatchObject({ whole: true, anchor: { heads: 2 } });
  }, 90_000);

  it('shows a byte of a slide that was changed on the disk', async () => {
    const changed = Buffer.from(slideBytes);
    changed[1000] = (changed[1000] ?? 0) ^ 1;
    const files = slideFiles();
    expect(files.length).toBeGreaterThan(0);
    for (const file of files) writeFileSync(file, changed);
    const { code, stdout } = await slideway('verify', 'S1');
    for (const file of files) writeFileSync(file, slideBytes);
    expect(code).toBe(1);
    expect(stdout).toContain(
      'object-changed  slides/liver/S1/S1.tiff does not hold the bytes that are on record.',
    );
    expect(stdout).toMatch(/where +SLIDE#S1 000000000001 SLIDE_INGESTED/);
    expect((await slideway('verify', runId)).code).toBe(0);
  }, 60_000);

  it('shows a slide whose file is gone', async () => {
    for (const file of slideFiles()) rmSync(file);
    const { code, stdout } = await slideway('verify', '--all');
    expect(code).toBe(1);
    expect(stdout).toContain('SLIDE#S1');
  }, 60_000);
});
