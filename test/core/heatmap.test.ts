import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

import { build } from 'esbuild';
import { decode } from 'fast-png';
import { describe, expect, it } from 'vitest';

import { COLORMAPS, colourAt } from '../../core/colormaps.ts';
import { drawHeatmap, type HeatmapInput, scaleBar } from '../../core/heatmap.ts';
import { readTiles } from '../../core/tiles.ts';
import { EMBEDDER, type ExampleTile, MODEL, tilesParquet } from '../support/results.ts';

const SLIDE = { width: 2220, height: 2967, mppX: 0.5, mppY: 0.5 };

async function draw(tiles: ExampleTile[], change: Partial<HeatmapInput> = {}) {
  const table = await readTiles(tilesParquet(MODEL, tiles, {}), MODEL);
  const { png, geometry } = await drawHeatmap({
    tiles: table,
    output: 'haematoxylin_area',
    values: await table.values('haematoxylin_area'),
    colormap: 'inferno',
    model: MODEL,
    slide: SLIDE,
    footprint: 256,
    ...change,
  });
  const image = decode(png);
  const pixel = (x: number, y: number) => {
    const at = (y * image.width + x) * 4;
    return [...image.data.subarray(at, at + 4)];
  };
  return { png, geometry, image, pixel };
}

const opaque = (value: number) => [...colourAt('inferno', value), 255];

describe('the colours', () => {
  it('begin and end as the published tables do, and rise in lightness', () => {
    expect(colourAt('inferno', 0)).toEqual([0, 0, 4]);
    expect(colourAt('inferno', 1)).toEqual([252, 255, 164]);
    expect(colourAt('viridis', 0.5)).toEqual([33, 144, 140]);
    for (const colours of Object.values(COLORMAPS)) {
      const lightness = colours.map(([r, g, b]) => 0.2126 * r + 0.7152 * g + 0.0722 * b);
      expect(lightness).toEqual([...lightness].sort((a, b) => a - b));
    }
  });
});

describe('the heatmap', () => {
  it('has a tile’s colour exactly where the tile is, and nothing where there is none', async () => {
    const { geometry, pixel, image } = await draw([{ minx: 256, miny: 512, side: 256, values: [0.5] }]);
    expect(geometry.level0PerPixel).toBe(4);
    expect(geometry.area).toEqual({ width: 555, height: 742 });
    expect(geometry.picture).toEqual({ width: image.width, height: image.height });
    expect(geometry.micronsPerPixel).toEqual({ x: 2, y: 2 });
    expect(pixel(64, 128)).toEqual(opaque(128 / 255));
    expect(pixel(127, 191)).toEqual(opaque(128 / 255));
    for (const [x, y] of [
      [63, 128],
      [64, 127],
      [128, 191],
      [127, 192],
    ] as const) {
      expect(pixel(x, y)[3]).toBe(0);
    }
  });

  it('leaves no seam between neighbours whose footprint is not a whole number of pixels', async () => {
    const { pixel } = await draw([
      { minx: 0, miny: 0, side: 257, values: [0.2] },
      { minx: 257, miny: 0, side: 257, values: [0.9] },
    ]);
    const row = Array.from({ length: 128 }, (_, x) => pixel(x, 30));
    expect(row.filter((colour) => colour[3] !== 255)).toEqual([]);
    expect(new Set(row.map(String)).size).toBe(2);
  });

  it('draws the mean where tiles overlap', async () => {
    const { pixel } = await draw([
      { minx: 0, miny: 0, side: 256, values: [0.2] },
      { minx: 128, miny: 0, side: 256, values: [0.8] },
    ]);
    expect(pixel(10, 10)).toEqual(opaque(51 / 255));
    expect(pixel(48, 10)).toEqual(opaque(128 / 255));
  });

  it('hatches a tile that could not be read in greys, never in a colour of the map', async () => {
    const { pixel } = await draw([{ minx: 0, miny: 0, side: 256 }]);
    const greys = new Set(Array.from({ length: 64 }, (_, x) => String(pixel(x, 20))));
    expect(greys).toEqual(new Set(['196,198,202,255', '122,126,134,255']));
  });

  it('shows a tile that is smaller than a pixel', async () => {
    const { geometry, image } = await draw([{ minx: 40_010, miny: 40_010, side: 16, values: [1] }], {
      slide: { ...SLIDE, width: 100_000, height: 80_000 },
      footprint: 16,
    });
    expect(geometry.level0PerPixel).toBe(49);
    const at = (Math.floor(40_018 / 49) * image.width + Math.floor(40_018 / 49)) * 4;
    expect(image.data[at + 3]).toBe(255);
  });

  it('spans 0 to 1 for fractions, and the 1st to 99th percentile for other quantities', async () => {
    const tiles = (scale: number) =>
      Array.from({ length: 101 }, (_, i) => ({
        minx: 0,
        miny: 16 * i,
        side: 16,
        values: [(i / 100) * scale],
      }));
    expect((await draw(tiles(1))).geometry.range).toEqual({ min: 0, max: 1, of: 'unit' });
    expect((await draw(tiles(200))).geometry.range).toEqual({ min: 2, max: 198, of: 'p1-p99' });
  });

  it('spans the slide’s own percentiles for attention, whose weights are all small shares of one', async () => {
    const tiles = Array.from({ length: 101 }, (_, i) => ({ minx: 0, miny: 16 * i, side: 16, values: [0] }));
    const values = Float32Array.from({ length: 101 }, (_, i) => i / 5050);
    const { geometry } = await draw(tiles, { model: EMBEDDER, output: 'attention', values });
    expect(geometry.range.of).toBe('p1-p99');
    expect(geometry.range.min).toBeCloseTo(1 / 5050, 6);
    expect(geometry.range.max).toBeCloseTo(99 / 5050, 6);
  });

  it('has a legend below the slide that differs with what it says', async () => {
    const tiles = [{ minx: 0, miny: 0, side: 256, values: [0.5] }];
    const one = await draw(tiles);
    const other = await draw(tiles, { model: { ...MODEL, version: '9.9.9' } });
    const from = one.geometry.area.height * one.image.width * 4;
    const same = (part: (bytes: Uint8Array) => Uint8Array) =>
      Buffer.compare(part(one.image.data as Uint8Array), part(other.image.data as Uint8Array)) === 0;
    expect(same((bytes) => bytes.subarray(0, from))).toBe(true);
    expect(same((bytes) => bytes.subarray(from))).toBe(false);
    // The colour bar runs through the middle of the map.
    const strip = one.image.data.subarray(from);
    const middle = colourAt('inferno', 0.5);
    const near = Array.from({ length: strip.length / 4 }, (_, i) =>
      middle.every((level, channel) => Math.abs(level - (strip[i * 4 + channel] ?? 0)) <= 3),
    );
    expect(near.filter(Boolean).length).toBeGreaterThan(8);
  });

  it('is wide enough for its legend on a tiny slide, whose own area is stated', async () => {
    const { geometry, pixel } = await draw([], {
      slide: { ...SLIDE, width: 300, height: 250 },
      footprint: 64,
    });
    expect(geometry.area).toEqual({ width: 300, height: 250 });
    expect(geometry.picture.width).toBe(460);
    expect(pixel(299, 10)[3]).toBe(0);
    expect(pixel(400, 10)).toEqual([255, 255, 255, 255]);
  });

  it('is the same bytes for the same tiles, and says its pixel size', async () => {
    const tiles = [{ minx: 0, miny: 0, side: 256, values: [0.5] }];
    const { png, image } = await draw(tiles);
    expect(Buffer.compare((await draw(tiles)).png, png)).toBe(0);
    expect(image.resolution).toEqual({ x: 500_000, y: 500_000, unit: 1 });
  });
});

describe('in a Lambda’s bundle, with nothing beside it,', () => {
  it('the heatmap is the same bytes', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'slideway-bundle-'));
    try {
      const outfile = join(folder, 'heatmap.mjs');
      await build({
        entryPoints: ['core/heatmap.ts'],
        outfile,
        bundle: true,
        platform: 'node',
        target: 'node24',
        format: 'esm',
        conditions: ['module', 'bundle'],
        loader: { '.wasm': 'binary', '.woff2': 'binary' },
      });
      const bundled = (await import(pathToFileURL(outfile).href)) as { drawHeatmap: typeof drawHeatmap };
      const input: HeatmapInput = {
        tiles: await readTiles(tilesParquet(MODEL, [], {}), MODEL),
        output: 'haematoxylin_area',
        values: new Float32Array(0),
        colormap: 'viridis',
        model: MODEL,
        slide: SLIDE,
        footprint: 256,
      };
      const [ours, theirs] = await Promise.all([drawHeatmap(input), bundled.drawHeatmap(input)]);
      expect(Buffer.compare(ours.png, theirs.png)).toBe(0);
    } finally {
      await rm(folder, { recursive: true });
    }
  });
});

describe('the scale bar', () => {
  it.each([
    [0.25, 100, '20 µm'],
    [2, 222, '200 µm'],
    [18.5, 400, '5 mm'],
  ])('at %s µm a pixel and at most %s pixels is a round length', (microns, pixels, label) => {
    const bar = scaleBar(microns, pixels);
    expect(bar.label).toBe(label);
    expect(bar.pixels).toBeLessThanOrEqual(pixels);
    expect(bar.pixels).toBeGreaterThan(pixels / 5);
  });
});
