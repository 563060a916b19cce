/** `slideway demo`: draws slides that look like H&E, then does exactly what `slideway run` does with them. */
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import { basename, join } from 'node:path';
import { forEachConcurrently } from '../../core/concurrency.ts';
import { CONTAINER, stateFolder, venvFolder, venvPython } from '../paths.ts';
import { CommandFailed, command } from '../setup/command.ts';
import { plural, type Screen, UserError } from '../terminal.ts';
import { type RunOptions, run, type Streams } from './run.ts';
import { ensureReady } from './setup.ts';

const SCRIPT = join(CONTAINER, 'demo', 'make_slides.py');

export interface DemoOptions extends RunOptions {
  slides: number;
  /** `<width>x<height>` in pixels. */
  size: string;
}

export async function demo(options: DemoOptions, streams: Streams, signal: AbortSignal): Promise<number> {
  const { screen } = streams;
  await ensureReady(screen, { stage: options.stage });
  const folder = await drawStudy(screen, stateFolder(options.state), options);
  // Other slides are another study: what Bronze holds under a name never changes.
  return run(folder, { ...options, study: options.study ?? `demo-${basename(folder)}` }, streams, signal);
}

/** The demo's study: slides of this version of the generator, made once, and their manifest. */
export async function drawStudy(
  screen: Screen,
  state: string,
  { slides, size }: Pick<DemoOptions, 'slides' | 'size'>,
): Promise<string> {
  const version = createHash('sha256')
    .update(await readFile(SCRIPT))
    .update(size)
    .digest('hex')
    .slice(0, 6);
  const folder = join(state, 'demo', version);
  await mkdir(folder, { recursive: true });
  const names = Array.from({ length: slides }, (_, seed) => `demo-${seed + 1}.tiff`);
  const missing = [...names.entries()].filter(([, name]) => !existsSync(join(folder, name)));
  if (missing.length > 0) {
    await screen.task(`Drawing ${plural(missing.length, 'demo slide')} (${size} px)`, async (at) => {
      let done = 0;
      await forEachConcurrently(
        missing,
        Math.max(Math.floor(availableParallelism() / 2), 1),
        async ([seed, name]) => {
          await drawSlide(join(folder, name), seed, size);
          done += 1;
          at(`${done}/${missing.length}`);
        },
      );
    });
  }
  const rows = names.map((name, index) => `${name},demo-${index + 1},H&E`);
  await writeWhole(join(folder, 'repo.csv'), `${['slide,slide_id,stain', ...rows].join('\n')}\n`);
  return folder;
}

async function drawSlide(path: string, seed: number, size: string): Promise<void> {
  try {
    // Each draws on one core, several side by side.
    const env = { ...process.env, OMP_NUM_THREADS: '1', OPENBLAS_NUM_THREADS: '1' };
    await command(
      venvPython(venvFolder()),
      ['-B', SCRIPT, '--seed', String(seed), '--size', size, '--out', path],
      { env },
    );
  } catch (error) {
    if (!(error instanceof CommandFailed)) throw error;
    throw new UserError(
      `The demo slide could not be drawn: ${error.tail.at(-1) ?? error.message}`,
      undefined,
      {
        cause: error,
      },
    );
  }
}

async function writeWhole(path: string, text: string): Promise<void> {
  const temporary = `${path}.${process.pid}`;
  try {
    await writeFile(temporary, text);
    await rename(temporary, path);
  } finally {
    await rm(temporary, { force: true });
  }
}
