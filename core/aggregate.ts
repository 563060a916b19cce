/**
 * From tile values to the numbers of a slide. Sums are in float64 and in the tiles' order, so that the same tiles
 * give the same bytes. Unreadable tiles never enter.
 */
import { type Aggregate, ALWAYS_AGGREGATED, type ClassVote, type Model } from './contracts.ts';
import type { TileTable } from './tiles.ts';

/** In the order in which they stand everywhere: mean, median, percentiles, max, top-k mean. */
const rank = (aggregate: Aggregate): number =>
  ({ mean: 0, median: 1, max: 200, top_k_mean: 201 })[aggregate as string] ?? 2 + Number(aggregate.slice(1));

export const inOrder = (aggregates: Iterable<Aggregate>): Aggregate[] =>
  [...new Set(aggregates)].sort((a, b) => rank(a) - rank(b));

/** What a slide result has of every output: of an embedding, whose outputs are many, only what the package asks for. */
export const aggregatesOf = ({ task, aggregate }: Pick<Model, 'task' | 'aggregate'>): Aggregate[] =>
  inOrder(task === 'embedding' ? aggregate : [...ALWAYS_AGGREGATED, ...aggregate]);

/** The aggregate and the output that a column's name, `<aggregate>_<output>`, is made of. */
export function splitColumn(column: string): { aggregate: Aggregate; output: string } | undefined {
  const [, aggregate, output] = /^(mean|median|max|top_k_mean|p[1-9][0-9]?)_(.+)$/.exec(column) ?? [];
  return aggregate && output ? { aggregate: aggregate as Aggregate, output } : undefined;
}

/** The wanted aggregates of one output over the readable tiles; nulls where there are none. */
export function aggregateOutput(
  { readable }: Pick<TileTable, 'readable'>,
  values: Float32Array,
  topK: number,
  wanted: readonly Aggregate[] = ALWAYS_AGGREGATED,
): Partial<Record<Aggregate, number | null>> {
  const known = readableOf(values, readable);
  if (known.length === 0) return Object.fromEntries(wanted.map((aggregate) => [aggregate, null]));
  const mean = meanOf(known);
  // In place, and only where something asks for it: an embedding has thousands of outputs.
  if (wanted.some((aggregate) => aggregate !== 'mean')) known.sort();
  const of = (aggregate: Aggregate): number => {
    if (aggregate === 'mean') return mean;
    if (aggregate === 'median') return quantile(known, 0.5);
    if (aggregate === 'max') return quantile(known, 1);
    if (aggregate === 'top_k_mean') return meanOf(known.subarray(Math.max(0, known.length - topK)));
    return quantile(known, Number(aggregate.slice(1)) / 100);
  };
  return Object.fromEntries(wanted.map((aggregate) => [aggregate, of(aggregate)]));
}

/** The values of the readable tiles, in their order. */
export function readableOf(values: Float32Array, readable: Uint8Array): Float64Array {
  const known = new Float64Array(values.length);
  let count = 0;
  for (let i = 0; i < values.length; i++) {
    if (readable[i] === 1) known[count++] = values[i] ?? Number.NaN;
  }
  return known.subarray(0, count);
}

/**
 * Quantile of sorted values by linear interpolation between the two nearest ranks: numpy's and R's default
 * (Hyndman and Fan's type 7).
 */
export function quantile(sorted: Float64Array, share: number): number {
  const rank = share * (sorted.length - 1);
  const below = sorted[Math.floor(rank)];
  const above = sorted[Math.ceil(rank)];
  if (below === undefined || above === undefined) throw new RangeError('quantile of no values');
  return below + (above - below) * (rank - Math.floor(rank));
}

function meanOf(values: Float64Array): number {
  let sum = 0;
  for (const value of values) sum += value;
  return sum / values.length;
}

/**
 * What the tiles say together for a classification: the class with the highest mean, and the class that is the
 * highest of most tiles. Ties go to the class that the model names first. Classes come one after the other, so that
 * only one's values are ever held.
 */
export class Vote {
  readonly #readable: Uint8Array;
  /** Of each tile, the highest value so far and whose it is. */
  readonly #best: Float32Array;
  readonly #winner: Uint16Array;
  readonly #classes: { name: string; mean: number | null }[] = [];

  constructor({ readable }: Pick<TileTable, 'readable'>) {
    this.#readable = readable;
    this.#best = new Float32Array(readable.length).fill(Number.NEGATIVE_INFINITY);
    this.#winner = new Uint16Array(readable.length);
  }

  add(name: string, values: Float32Array, mean: number | null): void {
    const index = this.#classes.push({ name, mean }) - 1;
    for (let i = 0; i < values.length; i++) {
      const value = values[i] ?? Number.NaN;
      if (value > (this.#best[i] ?? 0)) {
        this.#best[i] = value;
        this.#winner[i] = index;
      }
    }
  }

  count(): ClassVote {
    const counts = this.#classes.map(() => 0);
    let tiles = 0;
    for (const [i, readable] of this.#readable.entries()) {
      if (readable === 0) continue;
      const winner = this.#winner[i] ?? 0;
      counts[winner] = (counts[winner] ?? 0) + 1;
      tiles += 1;
    }
    const nameAt = (index: number) => (tiles > 0 ? (this.#classes[index]?.name ?? null) : null);
    const means = this.#classes.map(({ mean }) => mean ?? Number.NEGATIVE_INFINITY);
    return {
      predictedByMean: nameAt(highest(means)),
      predictedByVote: nameAt(highest(counts)),
      votes: Object.fromEntries(this.#classes.map(({ name }, c) => [name, counts[c] ?? 0])),
      voteShare: Object.fromEntries(
        this.#classes.map(({ name }, c) => [name, tiles > 0 ? (counts[c] ?? 0) / tiles : null]),
      ),
    };
  }
}

/** Index of the first highest number. */
export function highest(values: readonly number[]): number {
  let best = 0;
  for (let i = 1; i < values.length; i++) {
    if ((values[i] ?? Number.NEGATIVE_INFINITY) > (values[best] ?? Number.NEGATIVE_INFINITY)) best = i;
  }
  return best;
}
