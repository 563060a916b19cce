import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { describe, expect, it } from 'vitest';
import type { PlannedSlide, RunItem, SlideItem, SlideState } from '../../core/contracts.ts';
import {
  type Reconciled,
  type ReconcileOptions,
  type RunSources,
  reconcile,
  type Sources,
  type StoredObject,
} from '../../core/reconcile.ts';
import { compareKeys } from '../../core/spool.ts';
import { RUN } from '../support/results.ts';

const STUDY = 'colon';
const NOW = new Date('2026-11-20T12:00:00Z');

const run = (change: Partial<RunItem> = {}): RunItem => ({
  ...RUN,
  study: STUDY,
  runId: 'colon-1',
  startedAt: '2026-11-20T08:00:00.000Z',
  manifest: { bucket: 'landing', key: 'colon/repo.csv', versionId: 'm1', etag: 'e' },
  state: 'SUCCEEDED',
  executionArn: 'arn',
  ...change,
});

const line = (slideId: string, change: Partial<PlannedSlide> = {}): PlannedSlide => ({
  line: 2,
  slideId,
  slide: `${slideId}.svs`,
  state: 'EXPECTED',
  source: {
    bucket: 'landing',
    kind: 'file',
    key: `${STUDY}/${slideId}.svs`,
    files: 1,
    size: 9,
    etag: `"${slideId}"`,
  },
  models: ['m'],
  metadata: {},
  ...change,
});

const bronzeKey = (slideId: string) => `slides/${STUDY}/${slideId}/${slideId}.svs`;
const resultKey = (runId: string, slideId: string) => `runs/${runId}/slides/${slideId}/m/result.json`;

const item = (
  slideId: string,
  state: SlideState = 'AGGREGATED',
  change: Partial<SlideItem> = {},
): SlideItem => ({
  slideId,
  slide: `${slideId}.svs`,
  state,
  updatedAt: '2026-11-20T09:00:00.000Z',
  bronze: {
    bucket: 'bronze',
    key: bronzeKey(slideId),
    files: [{ key: bronzeKey(slideId), versionId: `v-${slideId}`, size: 9, checksum: 'c' }],
    size: 9,
    checksum: 'c',
  },
  ...(state === 'AGGREGATED' && {
    results: [
      {
        model: 'm',
        version: '1',
        key: resultKey('colon-1', slideId),
        tiles: { kept: 1, ok: 1, unreadable: 0 },
        tissueMm2: 1,
        outputs: {},
      },
    ],
  }),
  ...change,
});

const landed = (slideId: string): StoredObject => ({
  key: `${STUDY}/${slideId}.svs`,
  size: 9,
  etag: `"${slideId}"`,
});
const inBronze = (slideId: string): StoredObject => ({
  key: bronzeKey(slideId),
  size: 9,
  versionId: `v-${slideId}`,
});
const MANIFEST: StoredObject = { key: `${STUDY}/repo.csv`, size: 1, etag: '"e"', versionId: 'm1' };

async function* each<T>(items: Iterable<T>): AsyncGenerator<T> {
  yield* items;
}
const byKey = (objects: StoredObject[]) => [...objects].sort((a, b) => compareKeys(a.key, b.key));

interface Study {
  runs?: { run?: RunItem; planned: PlannedSlide[]; items?: SlideItem[]; silver?: string[] }[];
  landing?: StoredObject[];
  bronze?: StoredObject[];
  nested?: string[];
}

const sourcesOf = ({ runs = [], landing = [], bronze = [], nested }: Study): Sources => ({
  study: STUDY,
  landingBucket: 'landing',
  bronzeBucket: 'bronze',
  silverBucket: 'silver',
  runs: each(
    runs.map(
      ({ run: of = run(), planned, items = [], silver = [] }): RunSources => ({
        run: of,
        planned: each(planned),
        items: each(items),
        silver: each([...silver].sort(compareKeys).map((key) => ({ key }))),
      }),
    ),
  ),
  landing: each(byKey(landing)),
  bronze: each(byKey(bronze)),
  ...(nested && { nested }),
});

const OPTIONS: ReconcileOptions = { now: NOW, stuckAfterMs: 24 * 3600 * 1000 };
const all = (study: Study): Promise<Reconciled[]> => Array.fromAsync(reconcile(sourcesOf(study), OPTIONS));
const inShort = (found: Reconciled[]) =>
  Object.fromEntries(found.map(({ status, slideId, object }) => [slideId ?? object, status]));

/** Slides of which everything is where it ought to be. */
const whole = (...ids: string[]) => ({
  planned: ids.map((id) => line(id)),
  items: ids.map((id) => item(id)),
  silver: ids.map((id) => resultKey('colon-1', id)),
});
const A_B_AND_ONE_MORE = ['a', 'a-b', 'ä'];

describe('a study', () => {
  it('of which everything is there is in order, whatever the ids sort like', async () => {
    const ids = A_B_AND_ONE_MORE;
    const found = await all({
      runs: [whole(...ids)],
      landing: [...ids.map(landed), MANIFEST],
      bronze: ids.map(inBronze),
    });
    expect(inShort(found)).toEqual({ a: 'in order', 'a-b': 'in order', ä: 'in order' });
    expect(found.every(({ notes }) => notes.length === 0)).toBe(true);
  });

  it('stays in order when Landing has been emptied of what was taken in', async () => {
    const found = await all({ runs: [whole('a')], landing: [MANIFEST], bronze: [inBronze('a')] });
    expect(inShort(found)).toEqual({ a: 'in order' });
  });

  it('has slides that are missing: not come, gone from Bronze, or without their result', async () => {
    const missing = line('gone', {
      state: 'MISSING',
      reason: { error: 'SlideMissing', message: 'not here' },
    });
    delete missing.source;
    const { planned, items, silver } = whole('a', 'b');
    const found = await all({
      runs: [{ planned: [...planned, missing], items, silver: silver.slice(1) }],
      landing: [landed('a'), landed('b'), MANIFEST],
      bronze: [inBronze('a')],
    });
    expect(inShort(found)).toEqual({ a: 'missing', b: 'missing', gone: 'missing' });
    expect(found.map(({ notes }) => notes[0])).toEqual([
      `${resultKey('colon-1', 'a')} is not in Silver any more.`,
      `${bronzeKey('b')} is not in Bronze any more.`,
      'not here',
    ]);
  });

  it('has things that are extra: in Landing, in Bronze, in Silver', async () => {
    const { planned, items, silver } = whole('a');
    const found = await all({
      runs: [{ planned, items, silver: [...silver, resultKey('colon-1', 'forged')] }],
      landing: [landed('a'), landed('unnamed'), MANIFEST],
      bronze: [inBronze('a'), inBronze('stray'), { key: `${bronzeKey('a')}.bak`, size: 1 }],
    });
    expect(inShort(found)).toEqual({
      a: 'in order',
      forged: 'extra',
      's3://landing/colon/unnamed.svs': 'extra',
      's3://bronze/slides/colon/stray/stray.svs': 'extra',
      's3://bronze/slides/colon/a/a.svs.bak': 'extra',
    });
  });

  it('has slides that changed: in Landing since the plan, in Bronze since ingestion', async () => {
    const found = await all({
      runs: [whole('a', 'b', 'c')],
      landing: [{ ...landed('a'), etag: '"other"' }, landed('b'), landed('c'), MANIFEST],
      bronze: [inBronze('a'), { ...inBronze('b'), versionId: 'later' }, { ...inBronze('c'), size: 10 }],
    });
    expect(inShort(found)).toEqual({ a: 'changed', b: 'changed', c: 'changed' });
  });

  it('has slides that are stuck: for a person, in an ended run, for too long, or come late', async () => {
    const late = line('late', { state: 'MISSING', reason: { error: 'SlideMissing', message: '' } });
    delete late.source;
    const ended = {
      planned: [line('q'), line('ended'), late],
      items: [
        item('q', 'QUARANTINED', { reason: { error: 'MppUnknown', message: 'no µm per pixel' } }),
        item('ended', 'INFERRING'),
      ],
    };
    const running = {
      run: run({ runId: 'colon-2', state: 'RUNNING', startedAt: '2026-11-20T09:00:00.000Z' }),
      planned: [line('fresh'), line('old'), line('untouched')],
      items: [item('fresh', 'INFERRING'), item('old', 'COPYING', { updatedAt: '2026-11-18T00:00:00.000Z' })],
    };
    const ids = ['q', 'ended', 'late', 'fresh', 'old', 'untouched'];
    const found = await all({
      runs: [ended, running],
      landing: [...ids.map(landed), MANIFEST],
      bronze: ['q', 'ended', 'fresh', 'old'].map(inBronze),
    });
    expect(inShort(found)).toEqual({
      ended: 'stuck',
      fresh: 'in order',
      late: 'stuck',
      old: 'stuck',
      q: 'stuck',
      untouched: 'in order',
    });
  });

  it('is judged by the newest run of each slide', async () => {
    const missed = line('a', { state: 'MISSING', reason: { error: 'SlideMissing', message: '' } });
    delete missed.source;
    const later = whole('a');
    const found = await all({
      runs: [
        { planned: [missed, line('b')], items: [item('b', 'FAILED')] },
        {
          run: run({ runId: 'colon-2', startedAt: '2026-11-20T10:00:00.000Z' }),
          planned: [...later.planned, line('a', { line: 3, state: 'DUPLICATE' })],
          items: [item('a', 'AGGREGATED', { results: [] })],
        },
      ],
      landing: [landed('a'), landed('b'), MANIFEST],
      bronze: [inBronze('a'), inBronze('b')],
    });
    expect(inShort(found)).toEqual({ a: 'in order', b: 'stuck' });
  });

  it('is in order where slides share their bytes, also when the one that brought them was replaced', async () => {
    const { planned, items, silver } = whole('a', 'b');
    const [first, second] = items;
    const shared = { ...first?.bronze, files: [{ ...first?.bronze?.files[0], versionId: 'before' }] };
    const found = await all({
      runs: [{ planned, items: [first, { ...second, bronze: shared }] as SlideItem[], silver }],
      landing: [landed('a'), landed('b'), MANIFEST],
      bronze: [inBronze('a')],
    });
    expect(inShort(found)).toEqual({ a: 'in order', b: 'in order' });
  });

  it('counts the files of slides that have several', async () => {
    const dicom = (slideId: string, files: number) =>
      line(slideId, {
        slide: slideId,
        source: {
          bucket: 'landing',
          kind: 'dicom',
          key: `${STUDY}/${slideId}/`,
          folder: `${STUDY}/${slideId}/`,
          files,
          size: 9 * files,
        },
      });
    const mrxs = line('x', {
      slide: 'x.mrxs',
      source: {
        bucket: 'landing',
        kind: 'mrxs',
        key: `${STUDY}/x.mrxs`,
        folder: `${STUDY}/x/`,
        files: 3,
        size: 27,
        etag: '"x"',
      },
    });
    const file = (path: string): StoredObject => ({ key: `${STUDY}/${path}`, size: 9, etag: '"x"' });
    const found = await all({
      runs: [
        {
          planned: [dicom('d', 2), dicom('short', 2), mrxs],
          items: ['d', 'short', 'x'].map((id) => item(id, 'AGGREGATED', { results: [] })),
        },
      ],
      landing: [
        ...['d/', 'd/1.dcm', 'd/sub/2.dcm', 'short/1.dcm', 'x.mrxs', 'x/a.dat', 'x/b.dat'].map(file),
        MANIFEST,
      ],
      bronze: ['d', 'short', 'x'].map(inBronze),
    });
    expect(inShort(found)).toEqual({ d: 'in order', short: 'changed', x: 'in order' });
  });

  it('leaves out studies inside it, and tells of a manifest without a run and of a run without a plan', async () => {
    const found = await all({
      runs: [
        {
          run: run({ state: 'FAILED', reason: { error: 'ManifestInvalid', message: 'no header' } }),
          planned: [],
        },
      ],
      landing: [
        { key: `${STUDY}/inner/z.svs`, size: 1 },
        { ...MANIFEST, versionId: 'm2', etag: '"f"' },
      ],
      bronze: [{ key: `slides/${STUDY}/inner/z/z.svs`, size: 1 }],
      nested: [`${STUDY}/inner/`],
    });
    expect(found.map(({ status, notes }) => [status, notes[0]?.slice(0, 30)])).toEqual([
      ['stuck', 'This manifest has no run. Drop'],
      ['stuck', 'The run colon-1 has no plan: n'],
    ]);
  });
});

it('200,000 slides are merged as streams, in memory that does not grow with them', async () => {
  const COUNT = 200_000;
  // What is garbage already does not count.
  setFlagsFromString('--expose-gc');
  const collect = runInNewContext('gc') as () => void;
  let count = 0;
  let peak = 0;
  const id = (i: number) => `slide-${String(i).padStart(7, '0')}`;
  /** Items made one at a time; how many of them are held at once is seen by the heap. */
  async function* made<T>(of: (i: number) => T): AsyncGenerator<T> {
    for (let i = 0; i < COUNT; i++) {
      if (++count % 50_000 === 0) {
        collect();
        peak = Math.max(peak, process.memoryUsage().heapUsed);
      }
      yield of(i);
    }
  }
  const sources: Sources = {
    study: STUDY,
    landingBucket: 'landing',
    bronzeBucket: 'bronze',
    silverBucket: 'silver',
    runs: each([
      {
        run: run(),
        // Manifests are in any order.
        planned: made((i) => line(id((i * 7919) % COUNT))),
        items: made((i) => item(id(i), i === 7 ? 'FAILED' : 'AGGREGATED')),
        silver: made((i) => ({ key: resultKey('colon-1', id(i)) })),
      },
    ]),
    landing: made((i) => landed(id(i))),
    bronze: made((i) => (i === 9 ? { ...inBronze(id(i)), versionId: 'other' } : inBronze(id(i)))),
  };
  collect();
  const before = process.memoryUsage().heapUsed;
  const counts: Record<string, number> = {};
  for await (const { status } of reconcile(sources, OPTIONS)) counts[status] = (counts[status] ?? 0) + 1;
  expect(counts).toEqual({ 'in order': COUNT - 2, stuck: 1, changed: 1 });
  // Held as objects the five streams would take well over 500 MB.
  expect(peak - before).toBeGreaterThan(0);
  expect(peak - before).toBeLessThan(100 * 2 ** 20);
}, 120_000);
