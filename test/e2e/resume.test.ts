/** Killed at any stage and started again: the run completes, nothing is lost or done twice, the results are the same. */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { drawSlide, readSummary, Workplace } from './support.ts';

const work = new Workplace();
const SLIDES = ['one.tiff', 'two.tiff', 'three.tiff'];
const MANIFEST = `slide,slide_id\n${SLIDES.map((name) => `${name},${name.slice(0, -5)}`).join('\n')}\nlost.svs,lost\n`;
/** What may differ between two runs over the same slides: times, and names that come from the manifest's version. */
const OWN =
  /seconds$|^timings$|^bound$|At$|^time$|^runId$|^executionArn$|^versionId$|^jobName$|^cost$|^jobs$|^etag$|^outputs$|^key$/i;

let folder = '';
beforeAll(() => {
  const files: Record<string, { copy: string } | string> = { 'repo.csv': MANIFEST };
  for (const [seed, name] of SLIDES.entries()) {
    drawSlide(work.path(name), '2048x1536', seed);
    files[name] = { copy: work.path(name) };
  }
  folder = work.study('study', files);
}, 120_000);
afterAll(() => work.remove());

const command = (name: string) => [
  'run',
  folder,
  '--state',
  work.path(`state-${name}`),
  '--out',
  work.path(`out-${name}`),
];

function withoutOwn(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(withoutOwn);
  if (value === null || typeof value !== 'object') return value;
  return Object.fromEntries(
    Object.entries(value)
      .filter(([name]) => !OWN.test(name))
      .map(([name, inner]) => [name, withoutOwn(inner)]),
  );
}

/** Every file of the results: its bytes, or for JSON what is not of its own run. */
function results(out: string): Record<string, unknown> {
  return Object.fromEntries(
    readdirSync(out, { recursive: true, withFileTypes: true })
      .filter(
        (entry) =>
          entry.isFile() && !/report|complete\.json|message\.json/.test(join(entry.parentPath, entry.name)),
      )
      .map((entry) => join(entry.parentPath, entry.name))
      .sort()
      .map((path) => {
        const name = path.slice(out.length + 1);
        const bytes = readFileSync(path);
        return [
          name,
          name.endsWith('.json') ? withoutOwn(JSON.parse(bytes.toString())) : bytes.toString('base64'),
        ];
      }),
  );
}

/** How often each slide was worked through by a job, from the jobs' own logs. */
function workedThrough(state: string): Record<string, number> {
  const counts: Record<string, number> = {};
  for (const entry of readdirSync(join(state, 'logs'), { recursive: true, withFileTypes: true })) {
    if (!entry.isFile()) continue;
    for (const [, slideId = ''] of readFileSync(join(entry.parentPath, entry.name), 'utf8').matchAll(
      /slide-complete\\?",.*?slideId\\?":\s*\\?"([^"\\]+)/g,
    )) {
      counts[slideId] = (counts[slideId] ?? 0) + 1;
    }
  }
  return counts;
}

it('killed again and again until it is through, it gives byte for byte what an undisturbed run gives', async () => {
  const undisturbed = await work.slideway(...command('calm'));
  expect(undisturbed.code, undisturbed.stderr).toBe(3);

  let kills = 0;
  const ends: string[] = [];
  for (let uptime = 900; ; uptime += 450) {
    const attempt = work.start(...command('killed'));
    const over = await Promise.race([attempt.ended, wait(uptime).then(() => undefined)]);
    if (over) {
      expect(over.code, over.stderr).toBe(3);
      break;
    }
    attempt.kill();
    kills += 1;
    ends.push((await attempt.ended).stderr.trim().split('\n').at(-1) ?? '');
  }
  expect(kills).toBeGreaterThan(3);

  const [calm, killed] = [results(work.path('out-calm')), results(work.path('out-killed'))];
  expect(Object.keys(killed)).toEqual(Object.keys(calm));
  for (const name of Object.keys(calm)) expect(killed[name], name).toEqual(calm[name]);
  expect(Object.keys(calm).filter((name) => name.endsWith('.parquet'))).toHaveLength(SLIDES.length);
  expect(workedThrough(work.path('state-killed'))).toEqual({ one: 1, two: 1, three: 1 });
  expect(readSummary(work.path('out-killed')).jobs).toHaveLength(1);
}, 400_000);

it('stopped by Ctrl-C it says how to go on, and goes on', async () => {
  const first = work.start(...command('stopped'));
  await first.says(/Analysing/);
  first.interrupt();
  const { code, stderr } = await first.ended;
  expect(code).toBe(130);
  expect(stderr).toMatch(/The same command goes on from here/);
  const second = await work.slideway(...command('stopped'));
  expect(second.code, second.stderr).toBe(3);
  expect(second.stderr).toContain('Going on with the run');
  expect(results(work.path('out-stopped'))).toEqual(results(work.path('out-calm')));
}, 120_000);
