import { describe, expect, it } from 'vitest';

import type { HeatmapGeometry } from '../../core/contracts.ts';
import { costOf } from '../../core/cost.ts';
import { type ReportPage, reportPages, SLIDES_PER_PAGE } from '../../core/report.ts';
import { isProblem, type RunHead, type SlideRow } from '../../core/results.ts';
import { MODEL, planned, RUN } from '../support/results.ts';

const HEATMAP: HeatmapGeometry = {
  output: 'haematoxylin_area',
  colormap: 'inferno',
  range: { min: 0, max: 1, of: 'unit' },
  origin: { x: 0, y: 0 },
  level0PerPixel: 4,
  micronsPerPixel: { x: 2, y: 2 },
  area: { width: 555, height: 742 },
  picture: { width: 555, height: 830 },
};

const done = (slideId: string, change: Partial<SlideRow['results'][number]> = {}): SlideRow => ({
  ...{ slideId, slide: `scans/${slideId}.svs`, line: 2, reason: null, checksum: 'c', models: [MODEL.name] },
  state: 'AGGREGATED',
  results: [
    {
      ...{ model: MODEL.name, version: MODEL.version, key: 'k', tissueMm2: 1.25 },
      tiles: { kept: 4, ok: 4, unreadable: 0 },
      outputs: { mean_haematoxylin_area: 0.123456, top_k_mean_haematoxylin_area: null },
      size: { width: 2220, height: 2967 },
      heatmap: HEATMAP,
      ...change,
    },
  ],
});

const failed = (slideId: string, message = 'no luck'): SlideRow => ({
  ...{ slideId, slide: `scans/${slideId}.svs`, line: 3, checksum: null, models: [], results: [] },
  state: 'FAILED',
  reason: { error: 'JobFailed', message },
});

function headOf(rows: SlideRow[], change: Partial<RunHead> = {}): RunHead {
  const counts: RunHead['counts'] = {};
  for (const { state } of rows) counts[state] = (counts[state] ?? 0) + 1;
  return {
    ...{ runId: RUN.runId, study: RUN.study, manifest: RUN.manifest, startedAt: RUN.startedAt },
    ...{ state: 'PARTIAL', reason: null, endedAt: '2026-11-12T09:14:00.000Z', codeVersion: '0.1.0', counts },
    models: [{ ...planned(MODEL), license: MODEL.license }],
    parameters: RUN.parameters,
    jobs: [],
    cost: costOf({ rows: 0, expected: 0, inferred: 0, jobs: [], requests: {} }),
    ...change,
  };
}

async function render(rows: SlideRow[], change?: Partial<RunHead>): Promise<ReportPage[]> {
  async function* problemsFirst() {
    yield* rows.filter(isProblem);
    yield* rows.filter((row) => !isProblem(row));
  }
  const pages: ReportPage[] = [];
  for await (const page of reportPages(headOf(rows, change), problemsFirst())) pages.push(page);
  return pages;
}
const first = async (rows: SlideRow[], change?: Partial<RunHead>) =>
  (await render(rows, change))[0]?.html ?? '';

describe('the report', () => {
  it('lays the heatmap’s slide area exactly over the thumbnail', async () => {
    const html = await first([done('s1')]);
    // 555 px × 4 = 2220 level-0 pixels: all of the slide's width. 830 px × 4 of 2967: the legend hangs over.
    expect(html).toContain('width:100.0000%;height:111.8975%');
    expect(html).toContain('--ratio:0.74823');
    expect(html).toContain('src="../slides/s1/haematoxylin-area/thumbnail.jpg"');
    expect(html).toContain('src="../slides/s1/haematoxylin-area/heatmap.png"');
  });

  it('shows the numbers, those that are not there as such', async () => {
    const html = await first([done('s1')]);
    expect(html).toContain('<td>0.1235</td><td>–</td>');
    expect(html).toContain('1.25 mm²');
    expect(html).toContain('74 min');
  });

  it('shows what a head says of the whole slide, and percentiles as asked for', async () => {
    const outputs = { p5_x: 0.5, head_benign: 0.25, head_malignant: 0.75, predicted_head: 'malignant' };
    const html = await first([done('s1', { outputs })]);
    expect(html).toContain('<th>Whole slide</th><th>malignant</th>');
    expect(html).toContain('<th scope="row">malignant</th><td>0.75</td>');
    expect(html).toContain('<th>p5</th>');
    expect(html).toContain('<option value="output:head_malignant">');
  });

  it('names the SageMaker jobs, what each did and on which machines', async () => {
    const job = { model: 'm', version: '1', state: 'SUCCEEDED', instanceType: 'ml.c5.4xlarge' } as const;
    const html = await first([done('s1')], {
      jobs: [
        { ...job, jobName: 'm-tile-1', kind: 'tile', instanceCount: 2, instanceSeconds: 90 },
        {
          ...{ ...job, jobName: 'm-transform-1', kind: 'transform', state: 'FAILED' },
          ...{ reason: { error: 'TransformFailed', message: '' }, instanceCount: 1, instanceSeconds: 30 },
        },
      ],
    });
    expect(html).toContain('<td>slides to tiles</td><td>SUCCEEDED</td><td>2 × ml.c5.4xlarge</td>');
    expect(html).toContain('<td>tiles to predictions</td><td>FAILED: TransformFailed</td>');
  });

  it('puts what needs attention first, with its reason and what to do', async () => {
    const html = await first([done('good'), failed('bad')]);
    expect(html.indexOf('>bad<')).toBeLessThan(html.indexOf('>good<'));
    expect(html).toContain('no luck');
    expect(html.match(/Drop the manifest again; if it fails again/g)).toHaveLength(1);
  });

  it('lets nothing that comes from outside be HTML', async () => {
    const nasty = `<script>alert("1")</script>'&`;
    const rows = [failed(nasty, nasty), done(nasty)];
    const html = await first(rows, { study: nasty, reason: { error: nasty, message: nasty } });
    expect(html.match(/<script/g)).toHaveLength(1);
    expect(html).not.toContain('alert("1")');
    expect(html).toContain('&#60;script&#62;alert(&#34;1&#34;)');
    expect(html).toContain('../slides/%3Cscript%3Ealert(%221%22)%3C%2Fscript%3E&#39;%26/');
  });

  it('needs no other host and runs only its own script', async () => {
    const html = await first([done('s1')]);
    expect(html).not.toMatch(/(src|href)="(https?:)?\/\//);
    expect(html).toMatch(/default-src 'none'; .* script-src 'sha256-/);
  });

  it('says in words what is missing from a slide without tissue or with unreadable tiles', async () => {
    const { heatmap: _, ...bare } = done('x').results[0] ?? ({} as SlideRow['results'][number]);
    const note = 'No tissue was found, so there was no tile to look at.';
    const noTissue = {
      ...done('s1'),
      results: [{ ...bare, tiles: { kept: 0, ok: 0, unreadable: 0 }, note }],
    };
    const html = await first([noTissue]);
    expect(html).toContain('No tissue was found');
    expect(html).not.toContain('heatmap.png');
    const torn = await first([
      done('s2', { note: '100 of 1200 tiles could not be read; no number counts them.' }),
    ]);
    expect(torn).toContain('100 of 1200 tiles could not be read');
  });

  it('is a page for a run without slides, too', async () => {
    const reason = { error: 'ManifestInvalid', message: 'PlanRun: no header row' };
    const html = await first([], { state: 'FAILED', reason, models: [] });
    expect(html).toContain('PlanRun: no header row');
    expect(html).toContain('There is no slide in this run');
  });

  it('has pages of 200 slides that lead to one another', async () => {
    const rows = Array.from({ length: 2 * SLIDES_PER_PAGE + 1 }, (_, i) => done(`s${i}`));
    const pages = await render(rows);
    expect(pages.map(({ name }) => name)).toEqual(['index.html', 'page-2.html', 'page-3.html']);
    expect(pages.map(({ html }) => html.match(/<article/g)?.length)).toEqual([200, 200, 1]);
    expect(pages[0]?.html).toContain('href="page-2.html" rel="next"');
    expect(pages[2]?.html).toContain('href="page-2.html" rel="prev"');
  });

  it('lists a dozen outputs and leaves the rest to result.json', async () => {
    const outputs = Object.fromEntries(Array.from({ length: 40 }, (_, i) => [`mean_d${i}`, i]));
    expect(await first([done('s1', { outputs })])).toContain('and 28 more in result.json');
  });
});
