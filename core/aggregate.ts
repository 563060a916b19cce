/**
 * From tile values to the numbers of a slide. Sums are in float64 and in the tiles' order, so that the same tiles
 * give the same bytes. Unreadable tiles never enter.
 */
import type { Aggregate, ClassVote } from './contracts.ts';
import type { TileTable } from './tiles.ts';

/** The aggregates of no tiles. */
const NOTHING: Record<Aggregate, null> = {
  mean: null,
  median: null,
  p10: null,
  p90: null,
  max: null,
  top_k_mean: null,
};

/** All aggregates of one output over the readable tiles; nulls where there are none. */
export function aggregateOutput(
  { readable }: Pick<TileTable, 'readable'>,
  values: Float32Array,
  topK: number,
): Record<Aggregate, number | null> {
  const sorted = Float64Array.from(values.filter((_, i) => readable[i] === 1));
  if (sorted.length === 0) return { ...NOTHING };
  const mean = meanOf(sorted);
  sorted.sort();
  return {
    mean,
    median: quantile(sorted, 0.5),
    p10: quantile(sorted, 0.1),
    p90: quantile(sorted, 0.9),
    max: quantile(sorted, 1),
    top_k_mean: meanOf(sorted.subarray(Math.max(0, sorted.length - topK))),
  };
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
 * highest of most tiles. Ties go to the class that the model names first.
 */
export function vote(
  { rows, readable, outputs }: Pick<TileTable, 'rows' | 'readable' | 'outputs'>,
  means: Record<string, number | null>,
): ClassVote {
  const classes = [...outputs];
  const counts = classes.map(() => 0);
  let tiles = 0;
  for (let i = 0; i < rows; i++) {
    if (readable[i] === 0) continue;
    let winner = 0;
    let best = Number.NEGATIVE_INFINITY;
    for (let c = 0; c < classes.length; c++) {
      const value = classes[c]?.[1][i] ?? Number.NEGATIVE_INFINITY;
      if (value > best) {
        winner = c;
        best = value;
      }
    }
    counts[winner] = (counts[winner] ?? 0) + 1;
    tiles += 1;
  }
  const nameAt = (index: number) => (tiles > 0 ? (classes[index]?.[0] ?? null) : null);
  return {
    predictedByMean: nameAt(highest(classes.map(([name]) => means[name] ?? Number.NEGATIVE_INFINITY))),
    predictedByVote: nameAt(highest(counts)),
    votes: Object.fromEntries(classes.map(([name], c) => [name, counts[c] ?? 0])),
    voteShare: Object.fromEntries(
      classes.map(([name], c) => [name, tiles > 0 ? (counts[c] ?? 0) / tiles : null]),
    ),
  };
}

/** Index of the first highest number. */
function highest(values: readonly number[]): number {
  let best = 0;
  for (let i = 1; i < values.length; i++) {
    if ((values[i] ?? Number.NEGATIVE_INFINITY) > (values[best] ?? Number.NEGATIVE_INFINITY)) best = i;
  }
  return best;
}
