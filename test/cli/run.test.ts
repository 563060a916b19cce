/** The command as people start it, with a real local AWS. Runs that end before inference need no model and no slide. */
import { spawn } from 'node:child_process';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { buffer } from 'node:stream/consumers';
import { gzipSync } from 'node:zlib';
import { pack } from 'tar-stream';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { exitCodeOf, readStudy, studyName } from '../../cli/commands/run.ts';
import { pick } from '../../cli/commands/show.ts';
import { pixelSize, positiveInteger } from '../../cli/main.ts';
import { PROJECT } from '../../cli/paths.ts';
import { readyPython } from '../../cli/setup/python.ts';
import type { RunItem } from '../../core/contracts.ts';

interface Ended {
  code: number | null;
  out: string;
  err: string;
}

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'slideway-cli-'));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

function slideway(args: string[], onText: (text: string, pid: number) => void = () => {}): Promise<Ended> {
  const env = { ...process.env, SLIDEWAY_STATE: join(folder, 'state'), SLIDEWAY_DEBUG: '' };
  const child = spawn(process.execPath, [join(PROJECT, 'cli', 'main.ts'), ...args], { env, cwd: folder });
  const ended: Ended = { code: null, out: '', err: '' };
  child.stdout.on('data', (data) => {
    ended.out += data;
  });
  child.stderr.on('data', (data) => {
    ended.err += data;
    onText(ended.err, child.pid ?? 0);
  });
  return new Promise((resolve) => {
    child.on('close', (code) => resolve({ ...ended, code }));
  });
}

function study(name: string, files: Record<string, string>): string {
  const path = join(folder, name);
  mkdirSync(path, { recursive: true });
  for (const [file, text] of Object.entries(files)) writeFileSync(join(path, file), text);
  return path;
}

async function writePackage(path: string, weights: string): Promise<void> {
  const model = {
    ...{ name: 'own', version: '1.0.0', license: 'none', task: 'regression', outputs: ['share'] },
    ...{ tile: { px: 256, mpp: 0.5 }, input: { mean: [0, 0, 0], std: [1, 1, 1] }, mode: 'processing' },
  };
  const tar = pack();
  tar.entry({ name: 'model.json' }, JSON.stringify(model));
  tar.entry({ name: 'model.pt' }, weights);
  tar.finalize();
  writeFileSync(path, gzipSync(await buffer(tar as AsyncIterable<Buffer>)));
}

describe('Options', () => {
  it('take whole numbers and sizes, and refuse others by what they should be', () => {
    expect(positiveInteger('3')).toBe(3);
    expect(pixelSize('4096X2048')).toBe('4096x2048');
    for (const text of ['0', '2.5', 'three', '']) expect(() => positiveInteger(text)).toThrow(/whole number/);
    for (const text of ['4096', '10x10', '999999x999999', 'axb']) {
      expect(() => pixelSize(text)).toThrow(/<width>x<height>/);
    }
  });

  it('--study may not lead out of its place', () => {
    expect(studyName('/breast/2026/')).toBe('breast/2026');
    for (const text of ['', '/', 'a/../b', 'a//b', 'a\nb']) expect(() => studyName(text)).toThrow(/--study/);
  });

  it('a state of a run has its exit code', () => {
    expect((['SUCCEEDED', 'FAILED', 'PARTIAL'] as const).map(exitCodeOf)).toEqual([0, 1, 3]);
  });

  it('the beginning of an id means a run, if it means one only', () => {
    const runs = ['a-12', 'a-13', 'a-1'].map((runId) => ({ runId }) as RunItem);
    expect(pick(runs, 'a-13').runId).toBe('a-13');
    expect(pick(runs, 'a-1').runId).toBe('a-1');
    expect(() => pick(runs, 'a')).toThrow(/a-12, a-13, a-1/);
    expect(() => pick(runs, 'b')).toThrow(/no run b/);
  });
});

describe('A study', () => {
  it('takes its name from the folder, and its manifest from the file that is named', async () => {
    const path = study('breast', { 'list.csv': 'slide\na.svs\n', 'a.svs': 'x' });
    const read = await readStudy(join(path, 'list.csv'));
    expect({ name: read.name, made: read.made }).toEqual({ name: 'breast', made: false });
    expect(read.files.map((file) => file.path)).toEqual(['a.svs', 'list.csv']);
  });

  it('without a manifest gets one', async () => {
    const read = await readStudy(study('lung', { 'b.svs': 'x', 'a.tif': 'x' }));
    expect(read.made).toBe(true);
    expect(Buffer.from(read.manifest).toString()).toBe('slide\na.tif\nb.svs\n');
  });
});

describe('Wrong use', () => {
  it.each([
    [['run'], /missing required argument/],
    [['demo', '--slides', 'x'], /whole number/],
    [['fly'], /unknown command/],
    [['run', 'nowhere'], /nowhere cannot be read: ENOENT/],
    [['show', 'nothing'], /no run nothing/],
  ])('%j ends with 2 and one clear line', async (args, message) => {
    const { code, err } = await slideway(args);
    expect(code).toBe(2);
    expect(err).toMatch(message);
    expect(err).not.toContain('    at ');
  });

  it('of a folder without slides ends with 2', async () => {
    const { code, err } = await slideway(['run', study('empty', { 'notes.txt': '' })]);
    expect(code).toBe(2);
    expect(err).toMatch(/neither a repo\.csv nor anything that looks like a slide/);
  });

  it('is told by --help, which ends with 0, as --version does', async () => {
    const help = await slideway(['run', '--help']);
    expect(help.code).toBe(0);
    expect(help.out).toMatch(/--model[\s\S]*Examples:/);
    const { code, out } = await slideway(['--version']);
    expect({ code, out }).toEqual({
      code: 0,
      out: `${JSON.parse(readFileSync(join(PROJECT, 'package.json'), 'utf8')).version}\n`,
    });
  });
});

describe('Nothing has run', () => {
  it('is what runs says, without making anything', async () => {
    expect(await slideway(['runs', '--json'])).toMatchObject({ code: 0, out: '[]\n' });
    expect(readdirSync(folder)).not.toContain('state');
  });
});

describe.skipIf(!readyPython())('With the local AWS', () => {
  it('a package that is none ends with 2', async () => {
    const path = study('model', { 'a.svs': 'x', 'model.tar.gz': 'not a package' });
    const { code, err } = await slideway(['run', path, '--model', join(path, 'model.tar.gz')]);
    expect(err).toMatch(/model\.tar\.gz: not a readable model\.tar\.gz/);
    expect(code).toBe(2);
  });

  it('a model that nobody registered ends with 2', async () => {
    const { code, err } = await slideway(['run', study('model', { 'a.svs': 'x' }), '--model', 'tumour@9']);
    expect(err).toMatch(/--model: No model `tumour@9` is registered/);
    expect(code).toBe(2);
  });

  it('a package is registered and named in the manifest; its version never changes', async () => {
    const path = study('own-model', { 'repo.csv': 'slide\ngone.svs\n' });
    const file = join(path, 'model.tar.gz');
    await writePackage(file, 'some weights');
    const first = await slideway(['run', path, '--model', file, '--json']);
    expect(first.code).toBe(1);
    expect(JSON.parse(first.out).run.state).toBe('FAILED');
    const byName = await slideway(['run', path, '--model', 'own@1.0.0']);
    expect(byName.err).toContain('Nothing has changed since the run');
    await writePackage(file, 'other weights');
    const second = await slideway(['run', path, '--model', file]);
    expect(second.err).toMatch(/own 1\.0\.0 is registered with other content .*raise "version"/);
    expect(second.code).toBe(2);
  });

  it('a manifest that is none is a run that failed, with the reason', async () => {
    const { code, out, err } = await slideway([
      'run',
      study('broken', { 'repo.csv': 'a,b\n1,2\n' }),
      '--json',
    ]);
    expect({ code, err }).toMatchObject({ code: 1 });
    const answer = JSON.parse(out);
    expect(answer.run.state).toBe('FAILED');
    expect(answer.run.reason.message).toMatch(/no column `slide`/);
  });

  it('the same command again shows the same run; --new runs it again', async () => {
    const path = study('missing', { 'repo.csv': 'slide\ngone.svs\n' });
    const first = await slideway(['run', path]);
    expect(first).toMatchObject({
      code: 1,
      out: expect.stringMatching(/gone\.svs\s+Not found[\s\S]*FAILED/),
    });
    const id = /FAILED {2}(\S+)/.exec(first.out)?.[1] ?? '';
    const again = await slideway(['run', path]);
    expect(again.err).toContain(`Nothing has changed since the run ${id} (FAILED)`);
    expect(again.code).toBe(1);
    const anew = await slideway(['run', path, '--new']);
    expect(anew.out).not.toContain(id);
    const listed = JSON.parse((await slideway(['runs', '--json'])).out) as { study: string }[];
    expect(listed.filter((run) => run.study === 'missing')).toHaveLength(2);
    const shown = await slideway(['show', id]);
    expect(shown).toMatchObject({
      code: 0,
      out: expect.stringMatching(/gone\.svs is not in Landing[\s\S]*What to do/),
    });
    expect((await slideway(['show', 'missing'])).code).toBe(2);
  });

  it('an answer that nobody reads to its end does no harm', { timeout: 60_000 }, async () => {
    const env = { ...process.env, SLIDEWAY_STATE: join(folder, 'state') };
    const child = spawn(process.execPath, [join(PROJECT, 'cli', 'main.ts'), 'runs'], { env, cwd: folder });
    child.stdout.destroy();
    const [said, code] = await Promise.all([
      buffer(child.stderr),
      new Promise((resolve) => child.on('close', resolve)),
    ]);
    expect(said.toString()).toBe('');
    expect(code).toBe(0);
  });

  it('Ctrl-C stops in order and says how to go on', async () => {
    const path = study('stopped', { 'repo.csv': 'slide\ngone.svs\n' });
    let sent = false;
    const { code, err } = await slideway(['run', path], (text, pid) => {
      if (sent || !text.includes('Reading the manifest')) return;
      sent = true;
      process.kill(pid, 'SIGINT');
    });
    expect(err).toMatch(/Stopping …[\s\S]*The same command goes on/);
    expect(code).toBe(130);
    const resumed = await slideway(['run', path]);
    expect(resumed.code).toBe(1);
    expect(resumed.out).toContain('Not found');
  });
});
