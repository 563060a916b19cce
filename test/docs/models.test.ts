/** docs/models.md as its reader follows it: every command of the page, in order, in a folder that looks like the project's. */
import { spawn } from 'node:child_process';
import {
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parse } from 'csv-parse/sync';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { PROJECT, venvFolder } from '../../cli/paths.ts';
import { readyPython } from '../../cli/setup/python.ts';
import type { SlideResult } from '../../core/contracts.ts';

const page = readFileSync(join(PROJECT, 'docs', 'models.md'), 'utf8');
/** The page's shell blocks, each under the heading or step that it belongs to. */
const blocks = [...page.matchAll(/^```sh\n([\s\S]*?)^```/gm)].map(([, text = '']) => text);

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'slideway-page-'));
  for (const name of ['cli', 'containers', 'node_modules', 'package.json']) {
    symlinkSync(join(PROJECT, name), join(folder, name));
  }
  symlinkSync(venvFolder(), join(folder, '.venv'));
  mkdirSync(join(folder, 'bin'));
  // npx would look into the registry for a package that is not installed here: the project is its own.
  writeFileSync(join(folder, 'bin', 'npx'), '#!/bin/sh\nshift\nexec node cli/slideway.mjs "$@"\n', {
    mode: 0o755,
  });
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

interface Ended {
  code: number | null;
  said: string;
}

function shell(script: string): Promise<Ended> {
  const env = {
    ...process.env,
    PATH: `${join(folder, 'bin')}:${process.env.PATH}`,
    SLIDEWAY_VENV: venvFolder(),
    SLIDEWAY_STATE: join(folder, 'state'),
  };
  const child = spawn('bash', ['-e', '-c', script], { cwd: folder, env });
  const ended: Ended = { code: null, said: '' };
  for (const stream of [child.stdout, child.stderr]) {
    stream.on('data', (data) => {
      ended.said += data;
    });
  }
  return new Promise((resolve) => {
    child.on('close', (code) => resolve({ ...ended, code }));
  });
}

const results = (run: string) => join(folder, 'slideway-results', run);
const rows = (run: string) =>
  parse(readFileSync(join(results(run), 'results.csv')), { columns: true }) as Record<string, string>[];
const answers = (run: string, model: string): SlideResult[] =>
  readdirSync(join(results(run), 'slides')).map((slide) =>
    JSON.parse(readFileSync(join(results(run), 'slides', slide, model, 'result.json'), 'utf8')),
  );

describe.skipIf(!readyPython())('The model author’s page', () => {
  it('can be followed from top to bottom', { timeout: 400_000 }, async () => {
    expect(blocks.length).toBeGreaterThan(7);
    for (const block of blocks) {
      const { code, said } = await shell(block);
      expect(code, `${block}\n${said}`).toBe(0);
    }
  });

  it('ends in results for three slides, the same numbers in both modes', () => {
    const columns = ['mean_normal', 'p90_tumour', 'tiles_ok', 'predicted_vote'] as const;
    const of = (run: string) => rows(run).map((row) => columns.map((column) => row[column]));
    expect(of('classified')).toHaveLength(3);
    expect(of('transformed')).toEqual(of('classified'));
    expect(answers('classified', 'classifier').map(({ mode }) => mode)).toEqual(Array(3).fill('processing'));
    const transformed = answers('transformed', 'classifier');
    expect(transformed.map(({ mode, tileset }) => [mode, tileset?.format])).toEqual(
      Array(3).fill(['transform', 'png']),
    );
    for (const { outputs } of transformed) expect(outputs.normal?.mean).toBeGreaterThan(0);
  });

  it('ends in features and a head’s answer, drawn by its attention', () => {
    for (const { head, heatmap, outputs, tiles, lineage } of answers('embedded', 'colours')) {
      expect(Object.keys(outputs)).toHaveLength(12);
      expect(head?.tiles).toBe(tiles.ok);
      expect((head?.outputs.benign ?? 0) + (head?.outputs.malignant ?? 0)).toBeCloseTo(1, 5);
      expect(heatmap?.output).toBe('attention');
      expect(lineage.outputs).toHaveProperty(['features.h5']);
    }
    expect(rows('embedded')[0]).toMatchObject({
      predicted_head: expect.stringMatching(/^(benign|malignant)$/),
    });
  });
});
