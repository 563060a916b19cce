import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { align, compareKeys, NotSorted, Spool } from '../../core/spool.ts';

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'slideway-spool-'));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const text = () => fc.string({ unit: 'binary' });

it('keys are ordered as S3 and DynamoDB order them, by the bytes of UTF-8', () => {
  fc.assert(
    fc.property(text(), text(), (a, b) => {
      const bytes = Buffer.compare(Buffer.from(a), Buffer.from(b));
      expect(Math.sign(compareKeys(a, b))).toBe(bytes);
    }),
  );
  expect(compareKeys('\u{1f600}', '\uffee')).toBeGreaterThan(0);
});

it('what goes through files comes back whole and sorted, those of one key as they were added', async () => {
  await fc.assert(
    fc.asyncProperty(fc.array(fc.tuple(fc.string({ maxLength: 3 }), text())), async (items) => {
      const spool = new Spool<{ value: string; at: number }>(folder, 64);
      for (const [at, [key, value]] of items.entries()) await spool.add(key, { value, at });
      const expected = items
        .map(([key, value], at) => ({ key, item: { value, at } }))
        .sort((a, b) => compareKeys(a.key, b.key) || a.item.at - b.item.at);
      expect(await Array.fromAsync(spool.read())).toEqual(expected);
      expect(await Array.fromAsync(spool.read())).toEqual(expected);
      await spool.remove();
    }),
    { numRuns: 40 },
  );
  expect(readdirSync(folder)).toEqual([]);
});

async function* stream(...keys: string[]): AsyncGenerator<string> {
  yield* keys;
}
const sorted = (...keys: string[]) => ({ items: stream(...keys), key: (item: string) => item });

it('streams are read side by side, each key once with all that stands under it', async () => {
  const rows = await Array.fromAsync(align(sorted('a', 'b', 'b'), sorted('b', 'd'), sorted('a', 'c')));
  expect(rows).toEqual([
    { key: 'a', a: ['a'], b: [], c: ['a'] },
    { key: 'b', a: ['b', 'b'], b: ['b'], c: [] },
    { key: 'c', a: [], b: [], c: ['c'] },
    { key: 'd', a: [], b: ['d'], c: [] },
  ]);
});

it('a stream that is not sorted is refused', async () => {
  await expect(Array.fromAsync(align(sorted('b', 'a'), sorted()))).rejects.toThrow(NotSorted);
});
