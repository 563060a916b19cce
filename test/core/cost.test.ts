import { readFile } from 'node:fs/promises';
import { describe, expect, it } from 'vitest';
import type { JobKind } from '../../core/contracts.ts';
import { type CountedRun, costOf, TRANSITIONS, transitionsOf } from '../../core/cost.ts';
import { PRICES, parsePrices } from '../../core/prices.ts';

const job: CountedRun['jobs'][number] = {
  ...{ kind: 'process', model: 'm', state: 'SUCCEEDED' },
  ...{ instanceType: 'ml.g5.xlarge', instanceCount: 2, instanceSeconds: 3600 },
};
const run = { rows: 10, expected: 8, inferred: 7, jobs: [job], requests: { s3Put: 1000, s3Get: 10_000 } };

describe('the cost of a run', () => {
  it('is what was counted times the price table', () => {
    const cost = costOf(run);
    expect(cost.instanceSeconds).toBe(3600);
    expect(cost.requests).toEqual({ lambda: 20, s3Get: 10_000, s3Put: 1000 });
    expect(cost.transitions).toBe(7 + 3 + 20 + 16 + 2 + 5);
    expect(cost.estimatedUsd).toBeCloseTo(1.408 + 0.005 + 0.004 + 53 * 0.000025 + 20 * 2e-7, 6);
    expect(cost.prices).toBe(PRICES.date);
    expect(cost.unpriced).toEqual([]);
  });

  it('counts what each model in transform mode takes, and what a job that failed adds', () => {
    const of = (kind: JobKind, model: string, state: 'SUCCEEDED' | 'FAILED' = 'SUCCEEDED') => ({
      ...{ ...job, kind, model, state },
    });
    const jobs = [of('tile', 'a'), of('transform', 'a', 'FAILED'), of('transform', 'a'), of('join', 'a')];
    const cost = costOf({ ...run, jobs: [...jobs, of('tile', 'b')] });
    // a: tiling, two rounds with a failure, a model made and deleted, joining; b: tiling that left nothing to score.
    expect(cost.transitions).toBe(7 + 3 + 20 + 16 + 2 + (7 + 6 + 1 + 6 + 2 + 4 + 2) + (7 + 2));
    // Five jobs on record, and plan-transform four times.
    expect(cost.requests.lambda).toBe(4 + 8 + 7 + 5 + 4);
    expect(cost.instanceSeconds).toBe(5 * 3600);
  });

  it('names the instance types that it has no price for, and still counts their time', () => {
    const cost = costOf({ ...run, jobs: [{ ...job, instanceType: 'ml.x9.large' }] });
    expect(cost.unpriced).toEqual(['ml.x9.large']);
    expect(cost.instanceSeconds).toBe(3600);
    expect(cost.estimatedUsd).toBeLessThan(0.02);
  });

  it('has no transitions for what a run without anything to do does not enter', () => {
    expect(transitionsOf({ ...run, expected: 0, jobs: [] })).toBe(TRANSITIONS.run);
  });

  it('takes a stage’s own prices in place of the table’s', () => {
    const own = parsePrices('{"date":"2027-01-01","instanceHour":{"ml.g5.xlarge":2}}');
    expect(costOf(run, own).estimatedUsd - costOf(run).estimatedUsd).toBeCloseTo(0.592, 6);
    expect(costOf(run, own).prices).toBe('2027-01-01');
    expect(own.instanceHour['ml.g5.2xlarge']).toBe(1.515);
    expect(() => parsePrices('{"gpu":1}')).toThrow();
  });

  it('counts states that the state machine has', async () => {
    const source = await readFile(new URL('../../core/cost.ts', import.meta.url), 'utf8');
    const machine = await readFile(new URL('../../statemachines/slide-run.asl.yml', import.meta.url), 'utf8');
    const documented = [...source.matchAll(/^ {2}\/\*\* (.*?)\.? \*\/$/gm)].flatMap(([, names]) =>
      (names ?? '').split(/, then | or |; for .*|, its end|, /).filter((name) => /^[A-Z]/.test(name)),
    );
    expect(documented.length).toBeGreaterThan(10);
    for (const name of documented) {
      if (/^(Lines|Requests)/.test(name)) continue;
      expect(machine).toContain(`${name.replace(/\.$/, '')}:`);
    }
  });
});
