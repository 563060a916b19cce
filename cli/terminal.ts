/**
 * What a person sees: lines that stay, a block of lines that is redrawn in place where the output is a terminal,
 * and errors that say what to do.
 */
import { stripVTControlCharacters, styleText } from 'node:util';

/** Exit codes of the commands. */
export const EXIT = { succeeded: 0, failed: 1, usage: 2, partial: 3, interrupted: 130 } as const;

/** Something that the person at the keyboard can put right; shown as one line, without a stack. */
export class UserError extends Error {
  override readonly name = 'UserError';
  readonly exitCode: number;
  constructor(message: string, exitCode: number = EXIT.failed, options?: ErrorOptions) {
    super(message, options);
    this.exitCode = exitCode;
  }
}

/** The command, its options or what they point at are wrong. */
export const usageError = (message: string, options?: ErrorOptions): UserError =>
  new UserError(message, EXIT.usage, options);

type Style = 'bold' | 'dim' | 'red' | 'green' | 'yellow' | 'cyan';
export type Paint = (style: Style, text: string) => string;

export const plain: Paint = (_, text) => text;

export interface Output {
  isTTY?: boolean;
  columns?: number;
  rows?: number;
  write(text: string): unknown;
}

/** Colour only on a terminal, and not where NO_COLOR is set. */
export function paintFor(output: Output, env: NodeJS.ProcessEnv = process.env): Paint {
  const wanted = output.isTTY === true && !env.NO_COLOR && env.TERM !== 'dumb';
  return wanted ? (style, text) => styleText(style, text, { validateStream: false }) : plain;
}

const HIDE_CURSOR = '\u001b[?25l';
const SHOW_CURSOR = '\u001b[?25h';
const TICK_MS = 120;
const PLAIN_TICK_MS = 15_000;
const FRAMES = ['⠋', '⠙', '⠹', '⠸', '⠼', '⠴', '⠦', '⠧', '⠇', '⠏'];

export class Screen {
  readonly paint: Paint;
  /** Whether lines can be redrawn. */
  readonly live: boolean;
  readonly #output: Output;
  readonly #quiet: boolean;
  #block: string[] = [];

  constructor(output: Output, options: { quiet?: boolean; env?: NodeJS.ProcessEnv } = {}) {
    const env = options.env ?? process.env;
    this.#output = output;
    this.#quiet = options.quiet ?? false;
    this.paint = paintFor(output, env);
    this.live = output.isTTY === true && !this.#quiet && env.TERM !== 'dumb';
  }

  /** A line that stays. */
  print(line = ''): void {
    if (this.#quiet) return;
    const block = this.#block;
    this.#erase();
    this.#output.write(`${line}\n`);
    this.#draw(block);
  }

  /** A line that stays, also when quiet. */
  warn(line: string): void {
    const block = this.#block;
    this.#erase();
    this.#output.write(`${this.paint('yellow', line)}\n`);
    this.#draw(block);
  }

  /** Replaces the block at the bottom; nothing where lines cannot be redrawn. */
  show(lines: string[]): void {
    if (!this.live) return;
    this.#erase();
    this.#draw(lines);
  }

  /** Takes the block away. */
  clear(): void {
    this.#erase();
  }

  /**
   * Runs `work` with a line that shows it going on: redrawn on a terminal, else repeated now and then.
   * `work` may tell what it is at. The line that stays says how long it took.
   */
  async task<T>(title: string, work: (at: (detail: string) => void) => Promise<T>): Promise<T> {
    const started = Date.now();
    let detail = '';
    let frame = 0;
    if (!this.live) this.print(`${title} …`);
    const line = () => `${title} ${this.paint('dim', [took(started), detail].filter(Boolean).join(' · '))}`;
    const tick = () => {
      if (this.live) this.show([`${this.paint('cyan', FRAMES[frame++ % FRAMES.length] ?? '')} ${line()}`]);
      else this.print(`  … ${[took(started), detail].filter(Boolean).join(' · ')}`);
    };
    const timer = setInterval(tick, this.live ? TICK_MS : PLAIN_TICK_MS);
    try {
      const result = await work((text) => {
        detail = text;
      });
      this.clear();
      this.print(`${this.paint('green', '✓')} ${title} ${this.paint('dim', took(started))}`);
      return result;
    } catch (error) {
      this.clear();
      this.print(`${this.paint('red', '✗')} ${title} ${this.paint('dim', took(started))}`);
      throw error;
    } finally {
      clearInterval(timer);
    }
  }

  #erase(): void {
    if (this.#block.length > 0) this.#output.write(`\u001b[${this.#block.length}A\u001b[0J${SHOW_CURSOR}`);
    this.#block = [];
  }

  #draw(lines: string[]): void {
    if (lines.length === 0) return;
    // A line that wraps, or a block higher than the window, could not be erased again.
    const columns = (this.#output.columns ?? 80) - 1;
    const rows = Math.max((this.#output.rows ?? 24) - 2, 1);
    this.#block = lines.slice(0, rows).map((line) => cut(line, columns));
    this.#output.write(`${HIDE_CURSOR}${this.#block.join('\n')}\n`);
  }
}

/** Cuts a line to `columns`; a cut line loses its colours. */
export function cut(line: string, columns: number): string {
  const bare = stripVTControlCharacters(line);
  const letters = [...bare];
  return letters.length <= columns ? line : `${letters.slice(0, Math.max(columns - 1, 0)).join('')}…`;
}

const took = (started: number): string => duration((Date.now() - started) / 1000);

/** `0.4 s`, `12 s`, `3 min 05 s`, `2 h 07 min`. */
export function duration(seconds: number): string {
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  const two = (value: number) => String(value).padStart(2, '0');
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
  return `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} min`;
}

/** `512 B`, `3.4 MB`, `12 GB`. */
export function bytes(count: number): string {
  const units = ['B', 'kB', 'MB', 'GB', 'TB'];
  let value = count;
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit++;
  }
  return `${unit > 0 && value < 9.95 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

/** `1 slide`, `3 slides`. */
export const plural = (count: number, word: string): string =>
  `${count.toLocaleString('en')} ${word}${count === 1 ? '' : 's'}`;
