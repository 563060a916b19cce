/**
 * Chance that can be played again. A decision hangs on the seed and on what it is about, never on the order in which
 * things happen to be decided: two slides that are taken in side by side have the same faults in every replay.
 */
import { createHash } from 'node:crypto';

export type Key = string | number;

export class Dice {
  readonly #seed: string;

  constructor(...seed: Key[]) {
    this.#seed = seed.join('/');
  }

  /** In [0, 1), the same for the same key. */
  roll(...key: Key[]): number {
    const digest = createHash('md5')
      .update(`${this.#seed}/${key.join('/')}`)
      .digest();
    return digest.readUIntBE(0, 6) / 2 ** 48;
  }

  chance(probability: number, ...key: Key[]): boolean {
    return this.roll(...key) < probability;
  }

  /** A whole number, both ends included. */
  between(from: number, to: number, ...key: Key[]): number {
    return from + Math.floor(this.roll(...key) * (to - from + 1));
  }

  pick<T>(choices: readonly T[], ...key: Key[]): T {
    const picked = choices[this.between(0, choices.length - 1, ...key)];
    if (picked === undefined) throw new RangeError('nothing to pick from');
    return picked;
  }

  bytes(length: number, ...key: Key[]): Buffer {
    const seed = Buffer.from(`${this.#seed}/${key.join('/')}`);
    return createHash('shake256', { outputLength: length }).update(seed).digest();
  }
}
