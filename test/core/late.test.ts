/** Slides that come late, as the functions see them: waiting, arriving, and being started together, once. */
import { PutObjectCommand } from '@aws-sdk/client-s3';
import { SFNClient } from '@aws-sdk/client-sfn';
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { claimManifest, runInputSchema } from '../../core/claim.ts';
import type { Plan, PlannedSlide, RunContext } from '../../core/contracts.ts';
import { planKey, slidesKey } from '../../core/keys.ts';
import { LandingListing } from '../../core/landing.ts';
import { awaitMissing, placeOf, placesOf, startFollowUps } from '../../core/late.ts';
import { parseManifest } from '../../core/manifest.ts';
import { readBytes, writeJson, writeLines } from '../../core/store.ts';
import { MODEL, planned, RUN } from '../support/results.ts';
import { type Services, startServices } from '../support/services.ts';

let services: Services;
beforeAll(async () => {
  services = await startServices();
  await services.createBucket('landing');
});
afterAll(() => services.close());

const MINUTE = 60_000;
let study = '';
let runs = 0;
beforeEach(() => {
  study = `study ${++runs}`;
});

const put = (path: string, body = 'slide') =>
  services.s3.send(new PutObjectCommand({ Bucket: 'landing', Key: `${study}/${path}`, Body: body }));
const arrive = async (path: string, at: number) => {
  await put(path);
  return services.late.arrived('landing', `${study}/${path}`, at);
};

/** A run that has been planned, of whose slides some are missing. */
async function missed(slides: string[], more: Partial<RunContext> = {}): Promise<RunContext> {
  const run: RunContext = {
    ...RUN,
    runId: `run-${runs}-${Math.random().toString(16).slice(2, 14)}`,
    study,
    manifest: { bucket: 'landing', key: `${study}/repo.csv`, etag: 'e' },
    ...more,
  };
  const lines = slides.map(
    (slide, index): PlannedSlide => ({
      line: index + 2,
      slideId: `id-${slide}`,
      slide,
      state: 'MISSING',
      models: [],
      metadata: { case_id: `C${index}` },
      mpp: 0.25,
      mppSource: 'manifest',
    }),
  );
  const plan: Plan = {
    run,
    codeVersion: '1',
    models: [planned(MODEL)],
    versions: { [run.defaultModel]: `${run.defaultModel}@1.0.0` },
    counts: {},
  };
  await services.state.claimRun({ ...run, state: 'RUNNING', executionArn: 'arn' });
  await writeJson(services.s3, { bucket: 'silver', key: planKey(run.runId) }, plan);
  await writeLines(services.s3, { bucket: 'silver', key: slidesKey(run.runId) }, lines);
  await awaitMissing(run, lines, { s3: services.s3, late: services.late });
  return run;
}

/** What StartExecution was asked for, by name; a name that is taken is refused, as Step Functions does. */
function starter(onStart: () => void = () => {}) {
  const started = new Map<string, unknown>();
  const client = new SFNClient({
    region: 'us-east-1',
    credentials: { accessKeyId: 'a', secretAccessKey: 'b' },
  });
  client.middlewareStack.add(
    () => async (args) => {
      const { name = '', input = '' } = args.input as { name?: string; input?: string };
      if (started.has(name)) throw Object.assign(new Error(name), { name: 'ExecutionAlreadyExists' });
      started.set(name, JSON.parse(input));
      onStart();
      return { output: { $metadata: {} }, response: {} } as never;
    },
    { step: 'initialize', name: 'record' },
  );
  return { client, started };
}

const sweep = (stepFunctions: SFNClient, now: number) =>
  startFollowUps({
    ...services,
    stepFunctions,
    silverBucket: 'silver',
    stateMachineArn: 'arn:machine',
    quietMs: 5 * MINUTE,
    patienceMs: 60 * MINUTE,
    now: () => now,
  });

/** The slides that the started runs name. */
async function slidesOf(started: Map<string, unknown>): Promise<string[][]> {
  return Promise.all(
    [...started.values()].map(async (input) => {
      const asked = runInputSchema.parse(input);
      if (!('followUp' in asked)) throw new Error('no follow-up');
      const bytes = await readBytes(services.s3, asked.followUp.manifest);
      return parseManifest(bytes ?? Buffer.alloc(0)).map(({ slide }) => slide);
    }),
  );
}

describe('the place where a slide waits', () => {
  it.each([
    ['s/x.svs', 's/x.svs', true],
    ['s/x.svs', 's/y.svs', false],
    ['s/x.svs', 's/x.svs.part', false],
    ['s/x.mrxs', 's/x.mrxs', true],
    ['s/x.mrxs', 's/x/Slidedat.ini', true],
    ['s/x.mrxs', 's/x/deep/Data.dat', true],
    ['s/x.vsi', 's/_x_/stack1/frame.ets', true],
    ['s/a/series', 's/a/series/1.dcm', true],
    ['s/a/series', 's/a/series/deep/1.dcm', true],
    ['s/a/series', 's/a/other/1.dcm', false],
    ['s/a', 's/x.svs', false],
  ])('of %s is found by %s: %s', (slide, object, found) => {
    expect(placesOf(object).includes(placeOf(slide))).toBe(found);
  });
});

describe('slides that were missing', () => {
  it('and come together are started as one run, with the parameters of the run that missed them', async () => {
    const run = await missed(['a.svs', 'b.svs', 'c.svs']);
    const { client, started } = starter();
    expect(await arrive('a.svs', 0)).toBe(1);
    expect(await arrive('b.svs', 4 * MINUTE)).toBe(1);
    expect(await arrive('other.svs', 4 * MINUTE)).toBe(0);
    await sweep(client, 5 * MINUTE);
    expect(started.size).toBe(0);
    const { started: now } = await sweep(client, 9 * MINUTE);
    expect(now).toEqual([{ of: run.runId, execution: `${run.runId}-late-1`, slides: 2 }]);
    expect(await slidesOf(started)).toEqual([['a.svs', 'b.svs']]);

    const [input] = started.values();
    const { run: next } = await claimManifest(
      { event: runInputSchema.parse(input), executionArn: 'arn:next', startedAt: '2026-11-13T08:00:00.000Z' },
      {
        ...services,
        config: {
          defaultModel: 'another',
          codeVersion: '2',
          parameters: { tissueMinFraction: 0.1, mppTolerance: 0 },
        },
      },
    );
    expect(next).toMatchObject({
      study,
      landing: 'landing',
      followUp: { kind: 'late', of: run.runId },
      defaultModel: run.defaultModel,
      parameters: run.parameters,
    });
    const [row] = parseManifest((await readBytes(services.s3, next.manifest)) ?? Buffer.alloc(0));
    expect(row).toMatchObject({
      slideId: 'id-a.svs',
      mpp: 0.25,
      models: [`${run.defaultModel}@1.0.0`],
      metadata: { case_id: 'C0' },
    });

    await arrive('c.svs', 20 * MINUTE);
    expect(await arrive('a.svs', 20 * MINUTE)).toBe(0);
    await sweep(client, 30 * MINUTE);
    expect(await slidesOf(started)).toEqual([['a.svs', 'b.svs'], ['c.svs']]);
    await sweep(client, 60 * MINUTE);
    expect(started.size).toBe(2);
  });

  it('are started once, though events are repeated, late and in any order, and several sweep at once', async () => {
    await missed(['a.svs', 'b.svs']);
    const { client, started } = starter();
    for (const at of [1, 3, 2, 1]) await Promise.all(['a.svs', 'b.svs'].map((path) => arrive(path, at)));
    await Promise.all(Array.from({ length: 6 }, () => sweep(client, 10 * MINUTE)));
    await services.late.arrived('landing', `${study}/a.svs`, 11 * MINUTE);
    await sweep(client, 30 * MINUTE);
    expect(await slidesOf(started)).toEqual([['a.svs', 'b.svs']]);
  });

  it('whose start was broken off are started by the next sweep, with the rows that were written', async () => {
    const run = await missed(['a.svs', 'b.svs']);
    await arrive('a.svs', 0);
    const broken = starter(() => {
      throw new Error('killed');
    });
    const { failed } = await sweep(broken.client, 10 * MINUTE);
    expect(failed).toMatchObject([{ of: run.runId }]);
    await arrive('b.svs', 11 * MINUTE);
    const { client, started } = starter();
    await sweep(client, 20 * MINUTE);
    await sweep(client, 30 * MINUTE);
    expect([...started.keys()]).toEqual([`${run.runId}-late-1`, `${run.runId}-late-2`]);
    expect(await slidesOf(started)).toEqual([['a.svs'], ['b.svs']]);
  });

  it('do not wait for ever for others that still come', async () => {
    await missed(['a.svs', 'b.svs']);
    const { client, started } = starter();
    await arrive('a.svs', 0);
    for (let at = 2; at <= 58; at += 2) {
      await arrive('b.svs', at * MINUTE);
      await sweep(client, (at + 1) * MINUTE);
    }
    expect(started.size).toBe(0);
    await arrive('b.svs', 60 * MINUTE);
    await sweep(client, 61 * MINUTE);
    expect(await slidesOf(started)).toEqual([['a.svs']]);
  });

  it('are not started while files of theirs are wanting or still come', async () => {
    await missed(['x.mrxs', 'series']);
    const { client, started } = starter();
    await arrive('x.mrxs', 0);
    await arrive('series/1.dcm', 0);
    await arrive('series/2.dcm', 4 * MINUTE);
    await sweep(client, 6 * MINUTE);
    expect(started.size).toBe(0);
    await sweep(client, 10 * MINUTE);
    expect(await slidesOf(started)).toEqual([['series']]);
    await arrive('x/Data.dat', 20 * MINUTE);
    await sweep(client, 30 * MINUTE);
    expect(await slidesOf(started)).toEqual([['series'], ['x.mrxs']]);
  });

  it('and came between the listing and the waiting are seen', async () => {
    await put('quick.svs');
    const { runId } = await missed(['quick.svs', 'slow.svs']);
    const { client, started } = starter();
    await sweep(client, Date.now() + 10 * MINUTE);
    const own = new Map([...started].filter(([name]) => name.startsWith(runId)));
    expect(await slidesOf(own)).toEqual([['quick.svs']]);
  });

  it('are those of the newest run of the study, and of no older one', async () => {
    const first = await missed(['a.svs', 'b.svs'], { startedAt: '2026-11-12T08:00:00.000Z' });
    const second = await missed(['a.svs'], { startedAt: '2026-11-12T09:00:00.000Z' });
    const { client, started } = starter();
    expect(await arrive('a.svs', 0)).toBe(1);
    await arrive('b.svs', 0);
    await services.state.transition(second.runId, 'id-b.svs', 'COPYING', { slide: 'b.svs' });
    await sweep(client, 10 * MINUTE);
    expect([...started.keys()]).toEqual([`${second.runId}-late-1`]);
    expect([...started.keys()]).not.toContain(`${first.runId}-late-1`);
    await sweep(client, 60 * MINUTE);
    expect(started.size).toBe(1);
  });

  it('wait in their thousands', async () => {
    const slides = Array.from({ length: 2000 }, (_, i) => `deep/folder/slide-${i}.svs`);
    await missed(slides);
    expect(await arrive('deep/folder/slide-1999.svs', 0)).toBe(1);
  }, 60_000);
});

describe('a slide of several files', () => {
  it('that came only just now is not taken for whole, where the stage asks for quiet', async () => {
    await put('x.mrxs');
    await put('x/Data.dat');
    await put('series/1.dcm');
    await put('plain.svs');
    const find = async (quietMs: number, path: string) => {
      const found = (await LandingListing.read(services.s3, 'landing', study, quietMs)).find(path);
      return 'state' in found ? found.reason.error : found.kind;
    };
    expect(await find(MINUTE, 'x.mrxs')).toBe('SlideArriving');
    expect(await find(MINUTE, 'series')).toBe('SlideArriving');
    expect(await find(MINUTE, 'plain.svs')).toBe('file');
    expect(await find(0, 'x.mrxs')).toBe('mrxs');
    expect(await find(0, 'series')).toBe('dicom');
  });
});
