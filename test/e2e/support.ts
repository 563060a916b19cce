/** Whole runs as a person makes them: the command line in a process of its own, on a study folder made by the test. */
import { execFileSync, spawn } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { CONTAINER, PROJECT, venvFolder, venvPython } from '../../cli/paths.ts';
import type { RunSummary } from '../../core/contracts.ts';

export const SLIDES = resolve(PROJECT, process.env.SLIDEWAY_TEST_SLIDES ?? '../shared/slides');
export const hasSlides = existsSync(join(SLIDES, 'CMU-1-Small-Region.svs'));

export const python = venvPython(venvFolder());

/** Draws an H&E-like slide at 0.5 µm per pixel. */
export function drawSlide(path: string, size = '1024x1024', seed = 0): void {
  const script = join(CONTAINER, 'demo', 'make_slides.py');
  execFileSync(python, ['-B', script, '--out', path, '--size', size, '--seed', String(seed)], {
    stdio: 'pipe',
  });
}

/** Runs a Python program of the project's environment; from a file, because TorchScript reads its source. */
export function runPython(work: Workplace, program: string, ...args: string[]): void {
  const path = work.path('program.py');
  writeFileSync(path, program);
  execFileSync(python, ['-B', path, ...args], { stdio: 'pipe' });
}

export interface Ended {
  code: number | null;
  signal: NodeJS.Signals | null;
  stdout: string;
  stderr: string;
}

export interface Started {
  /** Ends the command and everything it started, at once. */
  kill(): void;
  interrupt(): void;
  ended: Promise<Ended>;
  /** Resolves when a line of progress matches. */
  says(pattern: RegExp): Promise<void>;
}

/** Folders of one test file, removed at its end. */
export class Workplace {
  readonly folder = mkdtempSync(join(tmpdir(), 'slideway-e2e-'));
  readonly #running = new Set<Started>();

  path(...names: string[]): string {
    return join(this.folder, ...names);
  }

  /** A study's folder: files by path, each a text, bytes, or a file or folder to copy. */
  study(name: string, files: Record<string, string | Uint8Array | { copy: string }>): string {
    const folder = this.path('studies', name);
    for (const [path, content] of Object.entries(files)) {
      const target = join(folder, path);
      mkdirSync(dirname(target), { recursive: true });
      if (typeof content === 'string' || content instanceof Uint8Array) writeFileSync(target, content);
      else cpSync(content.copy, target, { recursive: true });
    }
    return folder;
  }

  start(...args: string[]): Started {
    const child = spawn(process.execPath, [join(PROJECT, 'cli/main.ts'), ...args], {
      cwd: this.folder,
      detached: true,
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    let stdout = '';
    let stderr = '';
    child.stdout.on('data', (chunk) => {
      stdout += chunk;
    });
    child.stderr.on('data', (chunk) => {
      stderr += chunk;
    });
    const started: Started = {
      kill: () => {
        if (child.pid !== undefined && child.exitCode === null) process.kill(-child.pid, 'SIGKILL');
      },
      interrupt: () => child.kill('SIGINT'),
      ended: new Promise((done, fail) => {
        child.on('error', fail);
        child.on('close', (code, signal) => {
          this.#running.delete(started);
          done({ code, signal, stdout, stderr });
        });
      }),
      says: (pattern) =>
        new Promise((done, fail) => {
          const look = () => pattern.test(stderr) && done();
          look();
          child.stderr.on('data', look);
          child.on('close', () => fail(new Error(`ended without saying ${pattern}:\n${stderr}`)));
        }),
    };
    this.#running.add(started);
    return started;
  }

  slideway(...args: string[]): Promise<Ended> {
    return this.start(...args).ended;
  }

  remove(): void {
    for (const started of this.#running) started.kill();
    rmSync(this.folder, { recursive: true, force: true });
  }
}

export const readSummary = (out: string): RunSummary =>
  JSON.parse(readFileSync(join(out, 'run.json'), 'utf8')) as RunSummary;

/** State and reason of each line of the manifest, as `STATE Error`. */
export const states = (summary: RunSummary): Record<string, string> =>
  Object.fromEntries(
    summary.slides.map(({ line, slide, state, reason }) => [
      `${line} ${slide}`,
      reason ? `${state} ${reason.error}` : state,
    ]),
  );
