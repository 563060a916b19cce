import { readFile } from 'node:fs/promises';
import { describe, expect, it } from 'vitest';

import { outputNames } from '../../core/contracts.ts';
import { ResultCorrupt, readTiles } from '../../core/tiles.ts';
import { CLASSIFIER, EMBEDDER, MODEL, tileGrid, tilesParquet } from '../support/results.ts';

const readAll = async (bytes: Uint8Array) => (await readTiles(bytes, MODEL)).values('haematoxylin_area');
const fixture = (name: string) => readFile(new URL(`../fixtures/${name}`, import.meta.url));

describe('tiles.parquet', () => {
  it.each(['tiles-zstd.parquet', 'tiles-plain.parquet'])(
    'is read as the container writes it: %s',
    async (name) => {
      const tiles = await readTiles(await fixture(name), MODEL);
      expect(tiles.rows).toBe(4);
      expect([...tiles.minx]).toEqual([0, 256, 512, 768]);
      expect([...tiles.height]).toEqual([256, 256, 256, 256]);
      expect([...tiles.readable]).toEqual([1, 1, 0, 1]);
      expect([...(await tiles.values('haematoxylin_area'))]).toEqual([0.25, 0.5, Number.NaN, 0.75]);
      expect(tiles.metadata.get('slideId')).toBe('s1');
    },
  );

  it('is read over many row groups, a column per class', async () => {
    const tiles = tileGrid(100, 35, 64, (x, y) => [x, y, 0]);
    const table = await readTiles(tilesParquet(CLASSIFIER, tiles, {}), CLASSIFIER);
    expect(table.rows).toBe(3500);
    expect(table.minx[3499]).toBe(99 * 64);
    expect((await table.values('stroma'))[3499]).toBeCloseTo(0.99);
    expect((await table.values('epithelium'))[3499]).toBeCloseTo(34 / 35);
  });

  it('may have no row', async () => {
    expect((await readTiles(tilesParquet(MODEL, [], {}), MODEL)).rows).toBe(0);
  });

  it('does not count a value that stands beside `unreadable`', async () => {
    const [tile] = tileGrid(1, 1, 64, () => undefined);
    const table = await readTiles(tilesParquet(MODEL, tile ? [tile] : [], {}), MODEL);
    expect(await table.values('haematoxylin_area')).toEqual(Float32Array.of(Number.NaN));
  });

  it('has the features of an embedding by number, and the attention of its head', async () => {
    const tiles = [{ minx: 0, miny: 0, side: 64, values: [1, 2, 3], attention: 0.25 }];
    const table = await readTiles(tilesParquet(EMBEDDER, tiles, {}), EMBEDDER);
    expect(await table.values('f0002')).toEqual(Float32Array.of(3));
    expect(await table.values('attention')).toEqual(Float32Array.of(0.25));
    const without = tilesParquet({ ...EMBEDDER, head: undefined }, tiles, {});
    await expect(readTiles(without, EMBEDDER)).rejects.toThrow(/lacks the column attention/);
  });

  it('of thousands of columns gives each its own values', async () => {
    const model = { ...EMBEDDER, dimensions: 4096, head: undefined };
    const values = Array.from({ length: 4096 }, (_, d) => d);
    const bytes = tilesParquet(
      model,
      tileGrid(100, 1, 64, () => values),
      {},
    );
    const table = await readTiles(bytes, model);
    for (const [d, name] of outputNames(model).entries()) {
      expect((await table.values(name)).every((value) => value === d)).toBe(true);
    }
  }, 60_000);

  it.each([
    ['is not Parquet', Buffer.from('not a table'), /not a Parquet file/],
    ['lacks an output', tilesParquet(CLASSIFIER, [], {}), /lacks the column value_haematoxylin_area/],
    [
      'has a readable tile without a value',
      tilesParquet(MODEL, [{ minx: 64, miny: 0, side: 64, values: [Number.NaN] }], {}),
      /tile at 64, 0 is ok but has no haematoxylin_area/,
    ],
  ])('is corrupt where it %s', async (_, bytes, message) => {
    const reading = readAll(bytes);
    await expect(reading).rejects.toThrow(ResultCorrupt);
    await expect(reading).rejects.toThrow(message);
  });

  it('is corrupt where its middle is damaged', async () => {
    const bytes = Buffer.from(await fixture('tiles-zstd.parquet'));
    bytes.fill(0x5a, 4, 200);
    await expect(readAll(bytes)).rejects.toThrow(ResultCorrupt);
  });
});
