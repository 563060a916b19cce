import { parse } from 'csv-parse/sync';
import { describe, expect, it } from 'vitest';

import type { ResultSummary, RunSummary } from '../../core/contracts.ts';
import { costOf } from '../../core/cost.ts';
import {
  type RunHead,
  resultsCsv,
  runJson,
  runStateOf,
  type SlideRow,
  slideRow,
} from '../../core/results.ts';
import { CLASSIFIER, EMBEDDER, MODEL, planned, plannedSlide, RUN } from '../support/results.ts';

const result = (model: string, outputs: ResultSummary['outputs']): ResultSummary => ({
  model,
  version: '1.0.0',
  key: `runs/r/slides/s/${model}/result.json`,
  tiles: { kept: 4, ok: 3, unreadable: 1 },
  tissueMm2: 1.5,
  outputs,
});

const row = (change: Partial<SlideRow> = {}): SlideRow => ({
  ...slideRow(plannedSlide('s1'), { state: 'AGGREGATED', checksum: 'c1' }),
  ...change,
});

async function* stream<T>(values: T[]): AsyncGenerator<T> {
  yield* values;
}
async function textOf(chunks: AsyncIterable<string>): Promise<string> {
  let text = '';
  for await (const chunk of chunks) text += chunk;
  return text;
}

describe('the state of a slide at the end of its run', () => {
  it('is that of its item', () => {
    const reason = { error: 'E', message: 'm' };
    expect(row()).toMatchObject({ state: 'AGGREGATED', checksum: 'c1', reason: null });
    expect(slideRow(plannedSlide('s1'), { state: 'FAILED', reason })).toMatchObject({
      state: 'FAILED',
      reason,
    });
  });

  it('is FAILED, Unfinished, where it was still under way, and says how far it came', () => {
    for (const state of ['EXPECTED', 'COPYING', 'INGESTED', 'INFERRING', 'INFERRED'] as const) {
      const { state: end, reason } = slideRow(plannedSlide('s1'), { state });
      expect(end).toBe('FAILED');
      expect(reason?.error).toBe('Unfinished');
      expect(reason?.message).toContain(state);
    }
    expect(slideRow(plannedSlide('s1'), undefined).reason?.error).toBe('Unfinished');
  });

  it('is the plan’s for a line that the plan decided, though another line has its id', () => {
    const twice = plannedSlide('s1', {
      state: 'DUPLICATE',
      reason: { error: 'SlideDuplicate', message: 'm' },
    });
    const answered = { state: 'AGGREGATED' as const, results: [result('m', {})] };
    expect(slideRow(twice, answered)).toMatchObject({ state: 'DUPLICATE', results: [] });
    expect(slideRow(plannedSlide('s2', { state: 'MISSING' }), undefined).state).toBe('MISSING');
  });
});

describe('the state of a run', () => {
  it.each([
    [{ AGGREGATED: 3 }, 'SUCCEEDED'],
    [{ AGGREGATED: 3, DUPLICATE: 2 }, 'SUCCEEDED'],
    [{ AGGREGATED: 3, MISSING: 1 }, 'PARTIAL'],
    [{ FAILED: 1, QUARANTINED: 2 }, 'FAILED'],
    [{ DUPLICATE: 2 }, 'FAILED'],
    [{}, 'FAILED'],
  ])('with %o is %s', (counts, state) => {
    expect(runStateOf(counts)).toBe(state);
  });
});

describe('results.csv', () => {
  it('has a line for every slide and model, with and without a result', async () => {
    const rows = [
      row({
        models: [MODEL.name, CLASSIFIER.name],
        results: [result(MODEL.name, { mean_haematoxylin_area: 0.25 })],
      }),
      row({
        slideId: 's2',
        state: 'QUARANTINED',
        reason: { error: 'X', message: 'look, "here"' },
        models: [],
      }),
    ];
    const csv = await textOf(resultsCsv(stream(rows), [MODEL, CLASSIFIER].map(planned)));
    expect(
      csv.startsWith('slide_id,slide,state,reason,model,model_version,tiles_ok,tiles_unreadable,tissue_mm2,'),
    ).toBe(true);
    expect(csv.endsWith('\r\n')).toBe(true);
    const lines = parse(csv, { columns: true }) as Record<string, string>[];
    expect(Object.keys(lines[0] ?? {}).slice(9)).toEqual([
      'mean_haematoxylin_area',
      'p90_haematoxylin_area',
      'top_k_mean_haematoxylin_area',
      'mean_stroma',
      'mean_epithelium',
      'mean_fat',
      'predicted_mean',
      'predicted_vote',
    ]);
    expect(lines.map(({ slide_id, model, tiles_ok }) => [slide_id, model, tiles_ok])).toEqual([
      ['s1', 'haematoxylin-area', '3'],
      ['s1', 'three-tissues', ''],
      ['s2', '', ''],
    ]);
    expect(lines[0]?.mean_haematoxylin_area).toBe('0.25');
    expect(lines[1]?.model_version).toBe('2.1.0');
    expect(lines[2]?.reason).toBe('X: look, "here"');
  });

  it('has what heads say, and no column for the features of an embedding', async () => {
    const outputs = { head_benign: 0.25, head_malignant: 0.75, predicted_head: 'malignant' };
    const rows = [row({ models: [EMBEDDER.name], results: [result(EMBEDDER.name, outputs)] })];
    const csv = await textOf(resultsCsv(stream(rows), [planned(EMBEDDER)]));
    const [line] = parse(csv, { columns: true }) as Record<string, string>[];
    expect(Object.entries(line ?? {}).slice(9)).toEqual([
      ['head_benign', '0.25'],
      ['head_malignant', '0.75'],
      ['predicted_head', 'malignant'],
    ]);
  });

  it('gives a spreadsheet no formula, and leaves numbers alone', async () => {
    const rows = ['=1+1', '+1', '-1', '@x', '\tx'].map((slide) =>
      row({ slide, models: [MODEL.name], results: [result(MODEL.name, { mean_haematoxylin_area: -0.5 })] }),
    );
    const lines = parse(await textOf(resultsCsv(stream(rows), [planned(MODEL)])), {
      columns: true,
    }) as Record<string, string>[];
    expect(lines.map(({ slide }) => slide)).toEqual(["'=1+1", "'+1", "'-1", "'@x", "'\tx"]);
    expect(lines[0]?.mean_haematoxylin_area).toBe('-0.5');
  });
});

describe('run.json', () => {
  const head: RunHead = {
    ...{ runId: RUN.runId, study: RUN.study, manifest: RUN.manifest, startedAt: RUN.startedAt },
    state: 'SUCCEEDED',
    reason: null,
    endedAt: RUN.startedAt,
    models: [],
    parameters: RUN.parameters,
    codeVersion: '0.1.0',
    counts: {},
    jobs: [],
    cost: costOf({ rows: 0, expected: 0, inferred: 0, jobs: [], requests: {} }),
  };

  it.each([0, 1, 3])('is one JSON document, streamed: %i slides', async (slides) => {
    const rows = Array.from({ length: slides }, (_, i) =>
      row({ slideId: `s${i}`, results: [result('m', { mean_x: 1 })] }),
    );
    const document = JSON.parse(await textOf(runJson(head, stream(rows)))) as RunSummary;
    expect(document).toEqual({
      ...head,
      slides: rows.map(({ slideId, slide, line, state, reason, checksum }) => ({
        ...{ slideId, slide, line, state, reason, checksum },
        results: [
          { model: 'm', version: '1.0.0', key: 'runs/r/slides/s/m/result.json', outputs: { mean_x: 1 } },
        ],
      })),
    });
  });
});
