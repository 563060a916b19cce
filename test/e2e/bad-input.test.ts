/** What people drop by mistake: each has its named error on record, and the rest goes on. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { buffer } from 'node:stream/consumers';
import { gzipSync } from 'node:zlib';
import { pack } from 'tar-stream';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { drawSlide, readSummary, runPython, states, Workplace } from './support.ts';

const work = new Workplace();

async function archive(files: Record<string, string | Buffer>): Promise<Buffer> {
  const tar = pack();
  for (const [name, content] of Object.entries(files)) tar.entry({ name }, content);
  tar.finalize();
  return gzipSync(await buffer(tar));
}

const descriptor = (changes: object) =>
  JSON.stringify({
    name: 'm',
    version: '1.0.0',
    license: 'CC0-1.0',
    task: 'regression',
    outputs: ['x'],
    tile: { px: 64, mpp: 1 },
    input: { mean: [0, 0, 0], std: [1, 1, 1] },
    mode: 'processing',
    ...changes,
  });

/** Glass without tissue. */
const BLANK = `
import sys, numpy, tifffile
tifffile.imwrite(sys.argv[1], numpy.full((1024, 1024, 3), 245, "uint8"), tile=(256, 256), photometric="rgb")
`;

/** TorchScript that fails on every tile. */
const RAISING = `
import sys, torch
class Raises(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 0:
            raise RuntimeError("this model always fails")
        return x
torch.jit.script(Raises()).save(sys.argv[1])
`;

const slide = work.path('made.tiff');

beforeAll(() => drawSlide(slide), 120_000);
afterAll(() => work.remove());

let runs = 0;
async function run(name: string, files: Parameters<Workplace['study']>[1], ...more: string[]) {
  const out = work.path(`out-${runs++}`);
  const ended = await work.slideway(
    'run',
    work.study(name, files),
    '--state',
    work.path('state'),
    '--out',
    out,
    ...more,
  );
  return { ...ended, out };
}

describe('a file that is no manifest fails the run with its reason', () => {
  it.each([
    ['empty', '', /empty/],
    ['binary', Buffer.from([0x49, 0x49, 0x2a, 0, 8, 0, 0, 0]), /binary/],
    ['without a slide column', 'name,mpp\nx.svs,0.5\n', /no column `slide`/],
  ])(
    '%s',
    async (name, manifest, message) => {
      const { code, out, stderr } = await run(name, { 'repo.csv': manifest });
      expect(code, stderr).toBe(1);
      const summary = readSummary(out);
      expect(summary).toMatchObject({ state: 'FAILED', reason: { error: 'ManifestInvalid' }, slides: [] });
      expect(summary.reason?.message).toMatch(message);
      expect(readFileSync(join(out, 'report/index.html'), 'utf8')).toMatch(/class="chip bad">Failed/);
    },
    60_000,
  );
});

it('rows and slides of every bad kind end with their own reason beside a good one', async () => {
  runPython(work, BLANK, work.path('blank.tiff'));
  const { code, out, stderr } = await run('bad rows', {
    'good.tiff': { copy: slide },
    'a/same.tiff': Buffer.concat([readFileSync(slide), Buffer.from('a')]),
    'b/same.tiff': Buffer.concat([readFileSync(slide), Buffer.from('b')]),
    'blank.tiff': { copy: work.path('blank.tiff') },
    'empty.svs': '',
    'text.svs': 'this is no slide',
    'cut.tiff': readFileSync(slide).subarray(0, 20_000),
    'repo.csv': [
      '\ufeff"slide","mpp"',
      'good.tiff,',
      'good.tiff,',
      'a/same.tiff,',
      'b\\same.tiff,',
      'blank.tiff,0.5',
      'empty.svs,',
      'text.svs,0.5',
      'cut.tiff,0.5',
      '../x.svs,',
      '/etc/passwd,',
      'gone.svs,',
      'good.tiff,much',
    ].join('\r\n'),
  });
  expect(code, stderr).toBe(3);
  const found = states(readSummary(out));
  expect(found['9 cut.tiff']).toMatch(/^QUARANTINED Slide(Unopenable|Unreadable)$/);
  delete found['9 cut.tiff'];
  expect(found).toEqual({
    '2 good.tiff': 'AGGREGATED',
    '3 good.tiff': 'DUPLICATE SlideDuplicate',
    '4 a/same.tiff': 'AGGREGATED',
    '5 b/same.tiff': 'AGGREGATED',
    '6 blank.tiff': 'AGGREGATED',
    '7 empty.svs': 'QUARANTINED SlideEmpty',
    '8 text.svs': 'QUARANTINED SlideUnopenable',
    '10 ../x.svs': 'QUARANTINED PathOutsideStudy',
    '11 /etc/passwd': 'QUARANTINED PathOutsideStudy',
    '12 gone.svs': 'MISSING SlideMissing',
    '13 good.tiff': 'QUARANTINED MppInvalid',
  });
  const blankResult = readSummary(out).slides.find(({ slide: name }) => name === 'blank.tiff')?.results[0];
  expect(blankResult?.outputs.mean_haematoxylin_area).toBeNull();
}, 180_000);

describe('a model package', () => {
  it('that cannot be read, or breaks the schema, is refused before anything is uploaded', async () => {
    for (const [bytes, message] of [
      [Buffer.from('no package'), /not a readable model.tar.gz/],
      [await archive({ 'model.json': descriptor({ outputs: [] }), 'model.pt': 'w' }), /outputs/],
    ] as const) {
      const { code, stderr } = await run(
        'broken',
        {
          'x.tiff': { copy: slide },
          'broken.tar.gz': bytes,
          'repo.csv': 'slide\nx.tiff\n',
        },
        '--model',
        work.path('studies', 'broken', 'broken.tar.gz'),
      );
      expect(code).toBe(2);
      expect(stderr).toMatch(message);
    }
  }, 120_000);

  it('whose weights do not load, or that raises, fails its own slides and no others', async () => {
    runPython(work, RAISING, work.path('raises.pt'));
    const raises = await archive({
      'model.json': descriptor({ name: 'raises' }),
      'model.pt': readFileSync(work.path('raises.pt')),
    });
    const torn = await archive({
      'model.json': descriptor({ name: 'torn' }),
      'model.pt': 'these are no weights',
    });
    const files = { 'x.tiff': { copy: slide }, 'raises.tar.gz': raises, 'torn.tar.gz': torn };
    const first = await run(
      'torn',
      { ...files, 'repo.csv': 'slide\nx.tiff\n' },
      '--model',
      work.path('studies', 'torn', 'torn.tar.gz'),
    );
    expect(first.code, first.stderr).toBe(1);
    expect(states(readSummary(first.out))['2 x.tiff']).toBe('FAILED JobFailed');
    expect(readSummary(first.out).slides[0]?.reason?.message).toContain('ModelPackageInvalid');

    const second = await run(
      'raises',
      { ...files, 'y.tiff': { copy: slide }, 'repo.csv': 'slide,model\nx.tiff,\ny.tiff,haematoxylin-area\n' },
      '--model',
      work.path('studies', 'raises', 'raises.tar.gz'),
    );
    expect(second.code, second.stderr).toBe(3);
    expect(states(readSummary(second.out))).toEqual({
      '2 x.tiff': 'FAILED ModelError',
      '3 y.tiff': 'AGGREGATED',
    });
  }, 180_000);
});

it('wrong use is told in one line', async () => {
  for (const args of [
    ['run', work.path('nowhere')],
    ['run'],
    ['fly'],
    ['run', work.path('studies', 'torn'), '--model', 'no-such-model'],
  ]) {
    const { code, stderr } = await work.slideway(...args, '--state', work.path('state'));
    expect(code, args.join(' ')).toBe(2);
    expect(stderr).not.toMatch(/\n\s+at /);
  }
}, 60_000);
