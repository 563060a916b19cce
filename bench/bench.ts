/** What a bench is: figures measured on this machine, and ratios of two things measured in the same run. */
import type { Screen } from '../cli/terminal.ts';

export interface Context {
  /** Where progress is shown. */
  screen: Screen;
  /** Smaller and quicker, to see that the bench works; its figures mean little. */
  quick: boolean;
  signal: AbortSignal;
}

export interface Measured {
  figures: Record<string, number>;
  ratios: Record<string, number>;
}

export interface Bench {
  name: string;
  about: string;
  measure(context: Context): Promise<Measured>;
}

/** The middle of several measurements. */
export function median(values: number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  const [low = Number.NaN, high = Number.NaN] = [sorted[Math.ceil(sorted.length / 2) - 1], sorted[middle]];
  return (low + high) / 2;
}
