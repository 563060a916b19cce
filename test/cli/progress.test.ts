import { describe, expect, it } from 'vitest';
import { bar, block, Teller } from '../../cli/progress.ts';
import { plain } from '../../cli/terminal.ts';
import { type RunView, readHistory, type SlideView, TileProgress } from '../../cli/watch.ts';

const slide = (name: string, more: Partial<SlideView> = {}): SlideView => ({
  slideId: name,
  slide: `${name}.svs`,
  state: 'EXPECTED',
  bytes: 2_000_000,
  analysed: false,
  ...more,
});

const view = (slides: SlideView[], stage: RunView['stage'] = 'analyse'): RunView => ({
  run: {
    runId: 'demo-123',
    study: 'demo',
    manifest: { bucket: 'landing', key: 'demo/repo.csv', etag: '"x"' },
    defaultModel: 'haematoxylin-area',
    parameters: { tissueMinFraction: 0.5, mppTolerance: 0.02 },
    startedAt: '2026-01-01T00:00:00.000Z',
    state: 'RUNNING',
    executionArn: 'arn:aws:states:us-east-1:000000000000:execution:slide-run:x',
  },
  stage,
  slides,
  ended: false,
});

describe('Tiles', () => {
  const line = (event: string, fields: object) => JSON.stringify({ event, slideId: 's', ...fields });

  it('are counted from the jobs’ log lines, the last one of a slide and model counting', () => {
    const progress = new TileProgress();
    progress.add(line('slide-started', { model: 'm' }));
    progress.add(line('slide-progress', { model: 'm', tilesDone: 10, tilesTotal: 100, tilesPerSecond: 50 }));
    progress.add(
      line('slide-progress', { model: 'm', tilesDone: 60, tilesTotal: 100, tilesPerSecond: 55.5 }),
    );
    expect(progress.tiles('s')).toEqual({ done: 60, total: 100, perSecond: 55.5 });
    expect(progress.analysed('s', 1)).toBe(false);
  });

  it('of several models are added up, and the slide is analysed when all have ended', () => {
    const progress = new TileProgress();
    const done = { tilesDone: 100, tilesTotal: 100, tilesPerSecond: 80 };
    progress.add(line('slide-complete', { model: 'a', ...done }));
    progress.add(line('slide-progress', { model: 'b', tilesDone: 5, tilesTotal: 40, tilesPerSecond: 9 }));
    expect(progress.tiles('s')).toEqual({ done: 105, total: 140, perSecond: 9 });
    expect(progress.analysed('s', 2)).toBe(false);
    progress.add(line('slide-failed', { model: 'b', error: 'X', message: 'y' }));
    expect(progress.analysed('s', 2)).toBe(true);
  });

  it('of a slide that is only cut are counted, and the slide is analysed when its predictions are joined', () => {
    const progress = new TileProgress();
    const done = { model: 'a', tilesDone: 100, tilesTotal: 100 };
    progress.add(line('slide-complete', done), true);
    expect(progress.tiles('s')).toEqual({ done: 100, total: 100, perSecond: 0 });
    expect(progress.analysed('s', 1)).toBe(false);
    progress.add(line('slide-started', { model: 'a' }));
    progress.add(line('slide-complete', done));
    expect(progress.analysed('s', 1)).toBe(true);
    progress.add(line('slide-quarantined', { model: 'b', error: 'X', message: 'y' }), true);
    expect(progress.analysed('s', 2)).toBe(true);
  });

  it.each(['', 'not JSON', '{"event":"job-started"}', '{broken', '[1]', '{"event":"slide-progress"}'])(
    'are not disturbed by the line %j',
    (text) => {
      const progress = new TileProgress();
      progress.add(text);
      expect(progress.tiles('s')).toBeUndefined();
    },
  );
});

describe('The history of an execution', () => {
  const at = new Date();
  const entered = (name: string) => ({
    timestamp: at,
    type: 'TaskStateEntered' as const,
    id: 1,
    stateEnteredEventDetails: { name },
  });

  it('tells the stage by the last state that begins one', () => {
    expect(readHistory([]).stage).toBe('plan');
    expect(readHistory([entered('Run job'), entered('Run inference'), entered('Ingest slides')]).stage).toBe(
      'analyse',
    );
  });

  it('tells the names of the jobs', () => {
    const output = JSON.stringify({ inference: { jobs: [{ jobName: 'a' }, { jobName: 'b' }] } });
    const exited = {
      timestamp: at,
      type: 'TaskStateExited' as const,
      id: 2,
      stateExitedEventDetails: { name: 'Plan inference', output },
    };
    expect(readHistory([entered('Run inference'), exited]).jobs).toEqual(['a', 'b']);
  });
});

describe('The block of a run', () => {
  it('shows how far each stage is, and the slides that are worked on', () => {
    const lines = block(
      view([
        slide('a', { state: 'AGGREGATED', analysed: true, tiles: { done: 100, total: 100, perSecond: 0 } }),
        slide('b', { state: 'INFERRING', tiles: { done: 500, total: 2000, perSecond: 410.4 } }),
        slide('c', { state: 'COPYING' }),
        slide('d', { state: 'MISSING' }),
        slide('a', { state: 'DUPLICATE' }),
      ]),
      plain,
      62,
    );
    expect(lines).toEqual([
      'demo-123  Analysing slides  1 min 02 s',
      '  Copied      █████████████░░░░░░░ 2/3',
      '  Analysed    ███████░░░░░░░░░░░░░ 1/3  600/2,100 tiles  410 tiles/s',
      '  Aggregated  ███████░░░░░░░░░░░░░ 1/3',
      '  1 slide set aside',
      `  ${'b.svs'.padEnd(36)}  █████░░░░░░░░░░░░░░░ 500/2,000 tiles  410 tiles/s`,
      `  ${'c.svs'.padEnd(36)}  copying 2.0 MB`,
    ]);
  });

  it('is one line until the manifest is read', () => {
    expect(block(view([], 'plan'), plain, 1)).toEqual(['demo-123  Reading the manifest  1.0 s']);
  });

  it('draws bars from empty to full, never beyond', () => {
    expect([bar(0, 4, plain), bar(0.5, 4, plain), bar(2, 4, plain)]).toEqual(['░░░░', '██░░', '████']);
  });
});

describe('A run told in lines', () => {
  const analysing = (done: number) =>
    slide('a', { state: 'INFERRING', tiles: { done, total: 100, perSecond: 20 } });

  it('tells each thing once', () => {
    const teller = new Teller();
    expect(teller.tell(view([slide('a')], 'copy'))).toEqual([
      'The manifest lists 1 slide.',
      'Copying slides to Bronze …',
    ]);
    expect(teller.tell(view([slide('a')], 'copy'))).toEqual([]);
    expect(teller.tell(view([slide('a', { state: 'INGESTED' })], 'copy'))).toEqual([
      '  a.svs: copied (2.0 MB)',
    ]);
    expect(teller.tell(view([slide('a', { state: 'AGGREGATED', analysed: true })], 'publish'))).toEqual([
      'Writing the report …',
      '  a.svs: result ready',
    ]);
  });

  it('tells tiles now and then, not each time', () => {
    const teller = new Teller();
    teller.tell(view([slide('a')]));
    expect(teller.tell(view([analysing(3)]))).toEqual(['  a.svs: analysing 3/100 tiles  20 tiles/s']);
    expect(teller.tell(view([analysing(20)]))).toEqual([]);
    expect(teller.tell(view([analysing(30)]))).toEqual(['  a.svs: analysing 30/100 tiles  20 tiles/s']);
  });

  it('tells why a slide is set aside', () => {
    const reason = { error: 'MppUnknown', message: 'The file has no µm per pixel.' };
    const lines = new Teller().tell(view([slide('a', { state: 'QUARANTINED', reason })]));
    expect(lines).toContain('  a.svs: needs a look: The file has no µm per pixel.');
  });
});
