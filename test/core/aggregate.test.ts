import fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { aggregateOutput, aggregatesOf, inOrder, quantile, splitColumn, Vote } from '../../core/aggregate.ts';

const all = (values: number[]) => ({ readable: new Uint8Array(values.length).fill(1) });

describe('the aggregates of an output', () => {
  it('interpolates quantiles as numpy does', () => {
    // numpy.quantile([1, 2, 4, 8], [0.1, 0.5, 0.9]) → [1.3, 3.0, 6.8]
    const { median, p10, p90, max } = aggregateOutput(all([8, 1, 4, 2]), Float32Array.of(8, 1, 4, 2), 10);
    expect(p10).toBeCloseTo(1.3, 12);
    expect(median).toBe(3);
    expect(p90).toBeCloseTo(6.8, 12);
    expect(max).toBe(8);
  });

  it('leaves unreadable tiles out of every number', () => {
    const values = Float32Array.of(1, Number.NaN, 3);
    const result = aggregateOutput({ readable: Uint8Array.of(1, 0, 1) }, values, 10);
    expect(result).toEqual({ mean: 2, median: 2, p10: 1.2, p90: 2.8, max: 3, top_k_mean: 2 });
  });

  it('gives any percentile that is asked for, and nothing else', () => {
    // numpy.quantile([1, 2, 4, 8], [0.01, 0.37, 0.99]) → [1.03, 2.22, 7.88]
    const wanted = ['p1', 'p37', 'p99'] as const;
    const result = aggregateOutput(all([8, 1, 4, 2]), Float32Array.of(8, 1, 4, 2), 10, wanted);
    expect(Object.keys(result)).toEqual(wanted);
    expect(result.p1).toBeCloseTo(1.03, 12);
    expect(result.p37).toBeCloseTo(2.22, 12);
    expect(result.p99).toBeCloseTo(7.88, 12);
  });

  it('are those that are always there and those asked for; of an embedding only the latter', () => {
    const aggregate = ['p99', 'p5', 'mean'] as const;
    expect(aggregatesOf({ task: 'regression', aggregate: [...aggregate] })).toEqual([
      ...['mean', 'median', 'p5', 'p10', 'p90', 'p99', 'max', 'top_k_mean'],
    ]);
    expect(aggregatesOf({ task: 'embedding', aggregate: [...aggregate] })).toEqual(['mean', 'p5', 'p99']);
  });

  it('are told from the output in a column’s name', () => {
    expect(splitColumn('top_k_mean_mean_x')).toEqual({ aggregate: 'top_k_mean', output: 'mean_x' });
    expect(splitColumn('p5_x')).toEqual({ aggregate: 'p5', output: 'x' });
    for (const other of ['predicted_mean', 'head_x', 'p0_x', 'p100_x', 'mean_']) {
      expect(splitColumn(other)).toBeUndefined();
    }
    expect(inOrder(['max', 'p90', 'p9', 'mean', 'p90'])).toEqual(['mean', 'p9', 'p90', 'max']);
  });

  it('takes the mean of the k highest tiles, or of all where there are fewer', () => {
    const values = Float32Array.of(5, 1, 4, 2, 3);
    expect(aggregateOutput(all([...values]), values, 2).top_k_mean).toBe(4.5);
    expect(aggregateOutput(all([...values]), values, 99).top_k_mean).toBe(3);
  });

  it('is null throughout where no tile can be read', () => {
    const nothing = { mean: null, median: null, p10: null, p90: null, max: null, top_k_mean: null };
    expect(aggregateOutput(all([]), new Float32Array(0), 10)).toEqual(nothing);
    expect(aggregateOutput({ readable: Uint8Array.of(0) }, Float32Array.of(Number.NaN), 10)).toEqual(nothing);
  });

  it('sums in float64: a million equal tiles have exactly their own mean', () => {
    const values = new Float32Array(1_000_000).fill(0.5);
    expect(aggregateOutput({ readable: new Uint8Array(1_000_000).fill(1) }, values, 10).mean).toBe(0.5);
  });

  it('keeps mean and quantiles between the lowest and the highest tile, quantiles in order', () => {
    const tiles = fc.array(fc.float({ noNaN: true, noDefaultInfinity: true, min: -1e6, max: 1e6 }), {
      minLength: 1,
      maxLength: 200,
    });
    fc.assert(
      fc.property(tiles, (numbers) => {
        const { p10, median, p90, max } = aggregateOutput(all(numbers), Float32Array.from(numbers), 3);
        const sorted = Float64Array.from(Float32Array.from(numbers)).sort();
        // −0 and 0 are one number here.
        const inOrder = [sorted[0], p10, median, p90, max].map((value) => Number(value) + 0);
        expect(inOrder).toEqual(inOrder.toSorted((a, b) => a - b));
        expect(quantile(sorted, 0) + 0).toBe(Number(sorted[0]) + 0);
      }),
    );
  });
});

describe('the vote of a classification', () => {
  const outputs = new Map([
    ['stroma', Float32Array.of(0.6, 0.1, 0.5, Number.NaN)],
    ['fat', Float32Array.of(0.4, 0.9, 0.5, Number.NaN)],
  ]);
  const vote = (readable: Uint8Array, means: Record<string, number | null>) => {
    const votes = new Vote({ readable });
    for (const [name, values] of outputs) votes.add(name, values, means[name] ?? null);
    return votes.count();
  };

  it('counts each readable tile for its highest class, ties for the class named first', () => {
    const result = vote(Uint8Array.of(1, 1, 1, 0), { stroma: 0.4, fat: 0.6 });
    expect(result.votes).toEqual({ stroma: 2, fat: 1 });
    expect(result.voteShare.stroma).toBeCloseTo(2 / 3);
    expect(result.predictedByVote).toBe('stroma');
    expect(result.predictedByMean).toBe('fat');
  });

  it('predicts nothing where no tile can be read', () => {
    const result = vote(new Uint8Array(4), { stroma: null, fat: null });
    expect(result).toEqual({
      predictedByMean: null,
      predictedByVote: null,
      votes: { stroma: 0, fat: 0 },
      voteShare: { stroma: null, fat: null },
    });
  });
});
