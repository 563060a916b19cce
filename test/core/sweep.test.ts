import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { PutObjectCommand } from '@aws-sdk/client-s3';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { slidesKey, sweepKey } from '../../core/keys.ts';
import { Spool } from '../../core/spool.ts';
import { readJson, writeLines } from '../../core/store.ts';
import { type SweepDependencies, sweep, unnamedSlides } from '../../core/sweep.ts';
import { plannedSlide, RUN } from '../support/results.ts';
import { type Services, startServices } from '../support/services.ts';

const HOUR = 3_600_000;
let services: Services;
/** Executions that still run. */
let running: Set<string>;
/** SageMaker's models, with the run that each is tagged with. */
let models: Map<string, string | undefined>;
/** Hours from now at which is looked. */
let later: number;

beforeEach(async () => {
  services = await startServices();
  await services.createBucket('landing');
  running = new Set();
  models = new Map();
  later = 0;
});
afterEach(() => services.close());

const dependencies = (): SweepDependencies => ({
  ...services,
  landing: 'landing',
  limits: { manifestMinutes: 15, unnamedHours: 24, stuckHours: 30, runHours: 168 },
  isRunning: async (arn) => running.has(arn),
  now: () => new Date(Date.now() + later * HOUR),
  models: {
    async *list() {
      for (const name of models.keys()) yield { name, arn: `arn:${name}`, since: new Date(0) };
    },
    runOf: async ({ name }) => models.get(name),
    remove: async ({ name }) => {
      models.delete(name);
    },
  },
});

const land = async (key: string) =>
  (await services.s3.send(new PutObjectCommand({ Bucket: 'landing', Key: key, Body: 'x' }))).VersionId;

/** A run of the study's manifest as it lies in Landing, which names these slides; published whole, unless it runs. */
async function runOf(study: string, slides: string[], state: 'RUNNING' | 'SUCCEEDED' = 'SUCCEEDED') {
  const runId = `${study}-run`;
  const versionId = await land(`${study}/repo.csv`);
  await services.state.claimRun({
    ...RUN,
    ...{ runId, study, state, executionArn: `arn:${runId}`, startedAt: new Date().toISOString() },
    ...(state === 'SUCCEEDED' && { endedAt: 'then', publishedAt: 'then' }),
    manifest: { bucket: 'landing', key: `${study}/repo.csv`, ...(versionId && { versionId }), etag: 'e' },
  });
  await writeLines(
    services.s3,
    { bucket: services.silver, key: slidesKey(runId) },
    slides.map((slide) => plannedSlide(slide, { slide })),
  );
  return runId;
}

const keys = (findings: { first: { key: string }[] }) => findings.first.map(({ key }) => key);

describe('a sweep', () => {
  it('finds nothing where everything is in order, and says so in Silver', async () => {
    await runOf('breast', ['a.svs', 'deep/b.tiff']);
    for (const key of ['breast/a.svs', 'breast/deep/b.tiff', 'breast/notes.txt']) await land(key);
    later = 100;
    const found = await sweep(dependencies());
    expect(found).toMatchObject({
      looked: { landing: 4, runs: 1, running: 0 },
      staleManifests: { count: 0 },
      unnamedSlides: { count: 0 },
      stuckSlides: { count: 0 },
      endlessRuns: { count: 0 },
      leftModels: { count: 0 },
    });
    expect(
      await readJson(services.s3, { bucket: services.silver, key: sweepKey(found.at.slice(0, 10)) }),
    ).toEqual(found);
  });

  it('finds a manifest without a run, once it is old enough, and a newer version of one that has', async () => {
    await runOf('breast', []);
    const versionId = await land('colon/repo.csv');
    expect((await sweep(dependencies())).staleManifests.count).toBe(0);
    later = 0.3;
    expect((await sweep(dependencies())).staleManifests).toEqual({
      count: 1,
      first: [{ key: 'colon/repo.csv', versionId, since: expect.any(String) }],
    });
    await land('breast/repo.csv');
    expect(keys((await sweep(dependencies())).staleManifests)).toEqual(['breast/repo.csv', 'colon/repo.csv']);
  });

  it('finds slides that no manifest names, of several files once, and nothing that belongs to one', async () => {
    await runOf('breast', ['a.svs', 'm.mrxs', 'dcm/s1', 'a-late.svs']);
    for (const key of [
      'breast/a.svs',
      'breast/a-late.svs',
      'breast/forgotten.svs',
      'breast/m.mrxs',
      'breast/m/Data0001.dat',
      'breast/dcm/s1/1.dcm',
      'breast/dcm/s1/deep/2.dcm',
      'breast/dcm/s10/1.dcm',
      'breast/dcm/s10/2.dcm',
      'breast/.hidden/x.svs',
      'other/x.ndpi',
    ])
      await land(key);
    expect((await sweep(dependencies())).unnamedSlides.count).toBe(0);
    later = 25;
    expect(keys((await sweep(dependencies())).unnamedSlides)).toEqual([
      'breast/dcm/s10/',
      'breast/forgotten.svs',
      'other/x.ndpi',
    ]);
  });

  it('finds slides that are stuck in a state, of runs under way only', async () => {
    const runId = await runOf('breast', ['a.svs', 'b.svs', 'c.svs'], 'RUNNING');
    const ended = await runOf('colon', ['d.svs']);
    running.add(`arn:${runId}`);
    await services.state.transition(runId, 'a', 'INFERRING', { slide: 'a.svs' });
    await services.state.transition(runId, 'b', 'AGGREGATED', { slide: 'b.svs' });
    await services.state.transition(runId, 'c', 'MISSING', { slide: 'c.svs' });
    await services.state.transition(ended, 'd', 'COPYING', { slide: 'd.svs' });
    expect((await sweep(dependencies())).stuckSlides.count).toBe(0);
    later = 31;
    expect((await sweep(dependencies())).stuckSlides).toEqual({
      count: 1,
      byState: { INFERRING: 1 },
      first: [{ runId, slideId: 'a', state: 'INFERRING', since: expect.any(String) }],
    });
  });

  it('finds a run whose execution ended without it, and one that takes too long', async () => {
    const dead = await runOf('breast', [], 'RUNNING');
    const slow = await runOf('colon', [], 'RUNNING');
    running.add(`arn:${slow}`);
    const why = async () =>
      Object.fromEntries(
        (await sweep(dependencies())).endlessRuns.first.map(({ runId, why }) => [runId, why]),
      );
    expect(await why()).toEqual({ [dead]: 'execution ended' });
    later = 169;
    expect(await why()).toEqual({ [dead]: 'execution ended', [slow]: 'too long' });
  });

  it('finds a run that ended, but whose record and message were broken off', async () => {
    const half = await runOf('breast', [], 'RUNNING');
    await services.state.updateRun(half, { state: 'SUCCEEDED', endedAt: 'then' });
    expect((await sweep(dependencies())).endlessRuns.first).toMatchObject([{ runId: half }]);
    await services.state.published(half, 'now');
    expect((await sweep(dependencies())).endlessRuns.count).toBe(0);
  });
});

it('deletes the models of runs that have ended, and no others', async () => {
  const dead = await runOf('breast', [], 'RUNNING');
  const alive = await runOf('colon', [], 'RUNNING');
  running.add(`arn:${alive}`);
  models = new Map([
    ['a-model-of-an-aborted-run', dead],
    ['b-model-of-a-run-under-way', alive],
    ['c-model-of-a-run-that-is-gone', 'gone'],
    ['d-model-of-somebody-else', undefined],
  ]);
  expect((await sweep(dependencies())).leftModels).toEqual({
    count: 2,
    first: [
      { name: 'a-model-of-an-aborted-run', runId: dead, since: new Date(0).toISOString() },
      { name: 'c-model-of-a-run-that-is-gone', runId: 'gone', since: new Date(0).toISOString() },
    ],
  });
  expect([...models.keys()]).toEqual(['b-model-of-a-run-under-way', 'd-model-of-somebody-else']);
});

it('a million keys take no more memory than a thousand', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'slideway-sweep-'));
  const modified = new Date(0);
  const key = (n: number) => `study/${String(n).padStart(7, '0')}.svs`;
  async function unnamedOf(total: number): Promise<{ unnamed: string[]; growth: number }> {
    const names = new Spool<null>(folder);
    // Every ten-thousandth is named by nobody; names come in an order of their own.
    for (let n = total - 1; n >= 0; n--) if (n % 10_000 !== 7) await names.add(key(n), null);
    async function* objects() {
      for (let n = 0; n < total; n++) yield { key: key(n), modified };
    }
    global.gc?.();
    const before = process.memoryUsage().heapUsed;
    let most = 0;
    const unnamed: string[] = [];
    for await (const slide of unnamedSlides(objects(), names.read())) {
      unnamed.push(slide.key);
      most = Math.max(most, process.memoryUsage().heapUsed - before);
    }
    await names.remove();
    return { unnamed, growth: most };
  }
  try {
    const { unnamed, growth } = await unnamedOf(1_000_000);
    expect(unnamed).toEqual(Array.from({ length: 100 }, (_, n) => key(n * 10_000 + 7)));
    expect(growth).toBeLessThan(150 * 2 ** 20);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}, 120_000);
