/** The main job on real slides: one CSV in, the right end for every row, slide results and heatmaps out. */
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { decode } from 'fast-png';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { RunSummary, SlideResult } from '../../core/contracts.ts';
import { type Ended, hasSlides, readSummary, SLIDES, states, Workplace } from './support.ts';

const MODEL = 'haematoxylin-area';

describe.skipIf(!hasSlides)('a run over real slides', () => {
  const work = new Workplace();
  const out = work.path('out');
  let ended: Ended;
  let summary: RunSummary;

  beforeAll(async () => {
    const slide = (name: string) => ({ copy: join(SLIDES, name) });
    const folder = work.study('real', {
      'CMU-1-Small-Region.svs': slide('CMU-1-Small-Region.svs'),
      'OS-1-detail.ome.tif': slide('OS-1-detail.ome.tif'),
      'scanner/TCGA.svs': slide('TCGA-CR-7395-01A-01-TS1.svs'),
      'other/TCGA.svs': slide('TCGA-CR-7395-01A-01-TS1.svs'),
      'cmu-1-dicom': slide('cmu-1-dicom'),
      'unreadable.svs': slide('bad/unreadable.svs'),
      'unopenable.tiff': slide('bad/unopenable.tiff'),
      'repo.csv': [
        'slide;slide_id;mpp;stain',
        'CMU-1-Small-Region.svs;CMU-1;;H&E',
        'OS-1-detail.ome.tif;;;',
        'scanner/TCGA.svs;;0,25;',
        'other/TCGA.svs;;;',
        'cmu-1-dicom;DICOM-1;;',
        'unreadable.svs;;0.25;',
        'unopenable.tiff;;;',
        'not-scanned-yet.svs;;;',
        'CMU-1-Small-Region.svs;CMU-1;;',
        '',
      ].join('\r\n'),
    });
    ended = await work.slideway('run', folder, '--state', work.path('state'), '--out', out);
    summary = readSummary(out);
  }, 300_000);
  afterAll(() => work.remove());

  it('ends PARTIAL, with the right state and reason for every row', () => {
    expect(ended.code, ended.stderr).toBe(3);
    expect(summary.state).toBe('PARTIAL');
    expect(states(summary)).toEqual({
      '2 CMU-1-Small-Region.svs': 'AGGREGATED',
      '3 OS-1-detail.ome.tif': 'AGGREGATED',
      '4 scanner/TCGA.svs': 'AGGREGATED',
      '5 other/TCGA.svs': 'QUARANTINED MppMissing',
      '6 cmu-1-dicom': 'AGGREGATED',
      '7 unreadable.svs': 'QUARANTINED SlideUnreadable',
      '8 unopenable.tiff': 'QUARANTINED SlideUnopenable',
      '9 not-scanned-yet.svs': 'MISSING SlideMissing',
      '10 CMU-1-Small-Region.svs': 'DUPLICATE SlideDuplicate',
    });
  });

  it('leaves a whole result for each slide that came through', () => {
    const done = summary.slides.filter(({ state }) => state === 'AGGREGATED');
    for (const { slideId, checksum } of done) {
      const folder = join(out, 'slides', slideId, MODEL);
      const result = JSON.parse(readFileSync(join(folder, 'result.json'), 'utf8')) as SlideResult;
      expect(result.tiles.ok).toBeGreaterThan(0);
      expect(result.tiles.unreadable).toBe(0);
      expect(result.tissueAreaMm2).toBeGreaterThan(0.01);
      const mean = result.outputs.haematoxylin_area?.mean ?? Number.NaN;
      expect(mean).toBeGreaterThan(0);
      expect(mean).toBeLessThan(1);
      expect(checksum).toMatch(/^(crc64nvme|sha256):/);
      for (const name of ['tiles.parquet', 'tissue.geojson', 'thumbnail.jpg']) {
        expect(existsSync(join(folder, name)), name).toBe(true);
      }
      const png = decode(readFileSync(join(folder, 'heatmap.png')));
      expect(png.channels).toBe(4);
    }
  });

  it('two files of one base name have results of their own', () => {
    const ids = summary.slides
      .filter(({ slide }) => slide.endsWith('TCGA.svs'))
      .map(({ slideId }) => slideId);
    expect(new Set(ids).size).toBe(2);
  });

  it('the same slide as SVS and as DICOM gives nearly the same answer', () => {
    const mean = (id: string) =>
      summary.slides.find(({ slideId }) => slideId === id)?.results[0]?.outputs.mean_haematoxylin_area;
    expect(mean('DICOM-1')).toBeCloseTo(Number(mean('CMU-1')), 2);
  });

  it('results.csv has a row for every line of the manifest', () => {
    const rows = readFileSync(join(out, 'results.csv'), 'utf8').trim().split(/\r?\n/);
    expect(rows).toHaveLength(10);
    expect(rows[0]).toMatch(
      /^slide_id,slide,state,reason,model,model_version,tiles_ok,tiles_unreadable,tissue_mm2,mean_haematoxylin_area/,
    );
  });

  it('the report shows every slide, and what it links to is there', () => {
    const html = readFileSync(join(out, 'report', 'index.html'), 'utf8');
    for (const { slide } of summary.slides) expect(html).toContain(slide);
    const links = [...html.matchAll(/(?:src|href)="(\.\.\/[^"#]+)"/g)].map((match) => match[1] ?? '');
    expect(links.length).toBeGreaterThan(8);
    for (const link of links)
      expect(existsSync(join(out, 'report', decodeURIComponent(link))), link).toBe(true);
  });

  it('shows what has run, and shows the same run again without doing it again', async () => {
    const state = work.path('state');
    const runs = await work.slideway('runs', '--state', state, '--json');
    expect(JSON.parse(runs.stdout)).toMatchObject([{ runId: summary.runId, state: 'PARTIAL' }]);
    const show = await work.slideway('show', summary.runId.slice(0, 8), '--state', state);
    expect(show.code).toBe(0);
    expect(show.stdout).toContain('not-scanned-yet.svs');

    const again = await work.slideway(
      'run',
      work.path('studies', 'real'),
      '--state',
      state,
      '--out',
      work.path('again'),
    );
    expect(again.code).toBe(3);
    expect(again.stderr).toContain(summary.runId);
    expect(readFileSync(work.path('again', 'run.json'))).toEqual(readFileSync(join(out, 'run.json')));
  }, 120_000);
});
