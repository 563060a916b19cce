/**
 * The picture of a slide result: the tiles' values as colours where they lie on the slide, transparent where there is
 * no tile, hatched where a tile could not be read, and below it a legend that says what the colours mean. The same
 * tiles give the same bytes.
 */
import { crc32 } from 'node:zlib';
import { initWasm, Resvg } from '@resvg/resvg-wasm';
import { encode } from 'fast-png';
import { fonts, resvgWasm } from '#legend-assets';

import { quantile, readableOf } from './aggregate.ts';
import { COLORMAPS, type Colormap, colourAt, toHex } from './colormaps.ts';
import { ATTENTION, type HeatmapGeometry, type Model } from './contracts.ts';
import type { TileTable } from './tiles.ts';

export interface HeatmapInput {
  tiles: Pick<TileTable, 'rows' | 'minx' | 'miny' | 'width' | 'height' | 'readable'>;
  /** What is drawn, and its value for each tile. */
  output: string;
  values: Float32Array;
  colormap: Colormap;
  model: Pick<Model, 'name' | 'version' | 'task' | 'heatmap' | 'head'>;
  /** Level-0 pixels, and µm per level-0 pixel. */
  slide: { width: number; height: number; mppX: number; mppY: number };
  /** A tile's side in level-0 pixels. */
  footprint: number;
}

/** The longest side of the slide's area. Larger slides get more level-0 pixels per heatmap pixel. */
const MAX_SIDE = 2048;
/** Heatmap pixels a tile's side is drawn with, where {@link MAX_SIDE} allows. */
const PIXELS_PER_TILE = 64;
/** The legend needs this much; a smaller slide's area gets white beside it. */
const MIN_LEGEND_WIDTH = 460;

/** The line between slide and legend. */
const RULE = [213, 216, 222] as const;
const HATCH = { period: 6, stroke: 2, light: [196, 198, 202], dark: [122, 126, 134] } as const;

export async function drawHeatmap(
  input: HeatmapInput,
): Promise<{ png: Uint8Array; geometry: HeatmapGeometry }> {
  const { slide, output, colormap } = input;
  const level0PerPixel = Math.max(
    Math.ceil(Math.max(slide.width, slide.height) / MAX_SIDE),
    Math.round(input.footprint / PIXELS_PER_TILE),
    1,
  );
  const area = {
    width: Math.ceil(slide.width / level0PerPixel),
    height: Math.ceil(slide.height / level0PerPixel),
  };
  const range = rangeOf(input);
  const micronsPerPixel = { x: level0PerPixel * slide.mppX, y: level0PerPixel * slide.mppY };

  const legend = await drawLegend({
    width: Math.max(area.width, MIN_LEGEND_WIDTH),
    areaWidth: area.width,
    range,
    micronsPerPixel: micronsPerPixel.x,
    unreadable: input.tiles.readable.includes(0),
    input,
  });
  const picture = { width: legend.width, height: area.height + legend.height };
  const pixels = new Uint8Array(picture.width * picture.height * 4);
  paintTiles(pixels, picture.width, area, level0PerPixel, range, input);
  // What lies beside a small slide belongs to the legend, so that it does not look like slide.
  for (let y = 0; y < area.height && area.width < picture.width; y++) {
    const beside = (y * picture.width + area.width) * 4;
    pixels.fill(255, beside, (y + 1) * picture.width * 4);
    pixels.set(RULE, beside);
  }
  pixels.set(legend.pixels, area.height * picture.width * 4);

  const geometry: HeatmapGeometry = {
    output,
    colormap,
    range,
    origin: { x: 0, y: 0 },
    level0PerPixel,
    micronsPerPixel,
    area,
    picture,
  };
  const png = encode({ ...picture, data: pixels, channels: 4, depth: 8 });
  return { png: withPixelSize(png, micronsPerPixel), geometry };
}

/**
 * The model's own range; 0–1 where that is what the values are; else the 1st to 99th percentile, so that one odd tile
 * does not flatten the rest. Attention is always a matter of the slide: its weights say which tiles count, not how much.
 */
function rangeOf({ tiles, output, values, model }: HeatmapInput): HeatmapGeometry['range'] {
  if (model.heatmap?.range && model.heatmap.output === output) {
    const [min, max] = model.heatmap.range;
    return { min, max, of: 'model' };
  }
  const known = readableOf(values, tiles.readable).sort();
  const unit = { min: 0, max: 1, of: 'unit' } as const;
  if (known.length === 0) return unit;
  const attention = model.head?.attention === true && output === ATTENTION;
  const shares = model.task === 'classification' || ((known[0] ?? 0) >= 0 && (known.at(-1) ?? 0) <= 1);
  if (shares && !attention) return unit;
  return { min: quantile(known, 0.01), max: quantile(known, 0.99), of: 'p1-p99' };
}

/** Heatmap pixels whose centres lie in `[start, start + length)`; at least the one that holds its middle. */
function span(start: number, length: number, level0PerPixel: number, limit: number): [number, number] {
  let from = Math.ceil(start / level0PerPixel - 0.5);
  let to = Math.ceil((start + length) / level0PerPixel - 0.5);
  if (to <= from) {
    from = Math.floor((start + length / 2) / level0PerPixel);
    to = from + 1;
  }
  return [Math.max(from, 0), Math.min(to, limit)];
}

function paintTiles(
  pixels: Uint8Array,
  stride: number,
  area: HeatmapGeometry['area'],
  level0PerPixel: number,
  range: HeatmapGeometry['range'],
  { tiles, values, colormap }: HeatmapInput,
): void {
  const sums = new Float64Array(area.width * area.height);
  const counts = new Uint16Array(area.width * area.height);
  const unreadable = new Uint8Array(area.width * area.height);
  for (let i = 0; i < tiles.rows; i++) {
    const [left, right] = span(tiles.minx[i] ?? 0, tiles.width[i] ?? 0, level0PerPixel, area.width);
    const [top, bottom] = span(tiles.miny[i] ?? 0, tiles.height[i] ?? 0, level0PerPixel, area.height);
    const ok = tiles.readable[i] === 1;
    const value = values[i] ?? 0;
    for (let y = top; y < bottom; y++) {
      const row = y * area.width;
      if (!ok) unreadable.fill(1, row + left, row + right);
      else {
        for (let at = row + left; at < row + right; at++) {
          sums[at] = (sums[at] ?? 0) + value;
          counts[at] = (counts[at] ?? 0) + 1;
        }
      }
    }
  }

  const colours = Array.from({ length: 256 }, (_, level) => colourAt(colormap, level / 255));
  const width = range.max - range.min || 1;
  for (let y = 0; y < area.height; y++) {
    for (let x = 0; x < area.width; x++) {
      const at = y * area.width + x;
      const count = counts[at] ?? 0;
      if (count === 0 && unreadable[at] === 0) continue;
      const share = ((sums[at] ?? 0) / count - range.min) / width;
      const colour = count === 0 ? hatch(x, y) : colours[Math.round(Math.min(Math.max(share, 0), 1) * 255)];
      pixels.set(colour ?? HATCH.light, (y * stride + x) * 4);
      pixels[(y * stride + x) * 4 + 3] = 255;
    }
  }
}

const hatch = (x: number, y: number) => ((x + y) % HATCH.period < HATCH.stroke ? HATCH.dark : HATCH.light);

// --- legend -----------------------------------------------------------------------------------------------------

interface Legend {
  width: number;
  areaWidth: number;
  range: HeatmapGeometry['range'];
  micronsPerPixel: number;
  unreadable: boolean;
  input: HeatmapInput;
}

/** The strip below the slide: colours with their numbers, a scale bar, and whose answer it is. */
async function drawLegend(legend: Legend): Promise<{ width: number; height: number; pixels: Uint8Array }> {
  const font = await letters();
  const drawing = new Resvg(legendSvg(legend), {
    font: { fontBuffers: font, defaultFontFamily: 'Inter', sansSerifFamily: 'Inter' },
  });
  const image = drawing.render();
  try {
    return { width: image.width, height: image.height, pixels: image.pixels };
  } finally {
    image.free();
    drawing.free();
  }
}

let ready: Promise<Uint8Array[]> | undefined;

/** resvg can be started once in a process; the fonts come with it. */
function letters(): Promise<Uint8Array[]> {
  ready ??= (async () => {
    await initWasm(Uint8Array.from(await resvgWasm()).buffer);
    return fonts();
  })();
  return ready;
}

/** Laid out in units that grow with the picture, so that it reads the same on a large slide shown small. */
function legendSvg({ width, areaWidth, range, micronsPerPixel, unreadable, input }: Legend): string {
  const unit = Math.min(Math.max(width / 640, 1), 2.5);
  const right = width / unit - 16;
  const height = Math.round(88 * unit);
  const bar = { x: 16, y: 32, width: Math.min(220, right * 0.45), height: 10 };
  const ticks = [
    { at: bar.x, anchor: 'start', value: range.min },
    { at: bar.x + bar.width / 2, anchor: 'middle', value: (range.min + range.max) / 2 },
    { at: bar.x + bar.width, anchor: 'end', value: range.max },
  ];
  const stops = COLORMAPS[input.colormap].map(
    (colour, i, all) => `<stop offset="${i / (all.length - 1)}" stop-color="${toHex(colour)}"/>`,
  );
  const scale = scaleBar(micronsPerPixel, Math.min(Math.max(areaWidth * 0.4, 32), 200 * unit));
  const scaleLeft = right - scale.pixels / unit;
  const percentile = range.of === 'p1-p99' ? '1st to 99th percentile' : '';
  const title = fontSize(input.output + percentile, 13, right - 24);
  const model = `${input.model.name} ${input.model.version}`;
  const modelWidth = unreadable ? right - 136 : right - 16;

  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" font-family="Inter">
<defs>
<linearGradient id="colours">${stops.join('')}</linearGradient>
<pattern id="hatch" width="${HATCH.period}" height="${HATCH.period}" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<rect width="${HATCH.period}" height="${HATCH.period}" fill="${toHex(HATCH.light)}"/><rect width="${HATCH.stroke}" height="${HATCH.period}" fill="${toHex(HATCH.dark)}"/>
</pattern>
</defs>
<rect width="${width}" height="${height}" fill="#ffffff"/>
<rect width="${width}" height="1" fill="${toHex(RULE)}"/>
<g transform="scale(${unit})" fill="#1c2430">
<text x="16" y="22" font-size="${title}"><tspan font-weight="600">${escapeXml(input.output)}</tspan><tspan dx="8" fill="#5b6574">${percentile}</tspan></text>
<rect x="${bar.x}" y="${bar.y}" width="${bar.width}" height="${bar.height}" fill="url(#colours)"/>
${ticks
  .map(
    ({ at, anchor, value }) =>
      `<text x="${at}" y="57" font-size="11" text-anchor="${anchor}">${escapeXml(tickLabel(value))}</text>`,
  )
  .join('\n')}
<path d="M${scaleLeft} 32v10M${right} 32v10M${scaleLeft} 37H${right}" stroke="#1c2430" stroke-width="1.5" fill="none" stroke-linecap="square"/>
<text x="${right}" y="57" font-size="11" text-anchor="end">${scale.label}</text>
<text x="16" y="77" font-size="${fontSize(model, 11, modelWidth)}" fill="#5b6574">${escapeXml(model)}</text>
${
  unreadable
    ? `<rect x="${right - 102}" y="68" width="14" height="11" fill="url(#hatch)"/>
<text x="${right}" y="77" font-size="11" text-anchor="end" fill="#5b6574">unreadable tile</text>`
    : ''
}
</g>
</svg>`;
}

/** The longest round length (1, 2 or 5 × 10ⁿ µm) of at most `maxPixels`. */
export function scaleBar(micronsPerPixel: number, maxPixels: number): { pixels: number; label: string } {
  const longest = maxPixels * micronsPerPixel;
  const power = 10 ** Math.floor(Math.log10(longest));
  const microns = ([5, 2].find((factor) => factor * power <= longest) ?? 1) * power;
  const label = microns >= 1000 ? `${tickLabel(microns / 1000)} mm` : `${tickLabel(microns)} µm`;
  return { pixels: microns / micronsPerPixel, label };
}

const tickLabel = (value: number) => String(Number(value.toPrecision(3))).replace('-', '−');

/** Font size at which `text` is not wider than `width`; Inter's letters are at most about 0.62 em on average. */
const fontSize = (text: string, size: number, width: number) =>
  Math.min(size, width / Math.max(text.length * 0.62, 1));

const escapeXml = (text: string) => text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);

/** Adds the PNG's pHYs chunk after the header: pixels per metre, so that other programs know the scale. */
function withPixelSize(png: Uint8Array, micronsPerPixel: { x: number; y: number }): Uint8Array {
  const header = 33;
  const chunk = Buffer.alloc(21);
  chunk.writeUInt32BE(9, 0);
  chunk.write('pHYs', 4, 'latin1');
  chunk.writeUInt32BE(Math.round(1e6 / micronsPerPixel.x), 8);
  chunk.writeUInt32BE(Math.round(1e6 / micronsPerPixel.y), 12);
  chunk.writeUInt8(1, 16);
  chunk.writeUInt32BE(crc32(chunk.subarray(4, 17)), 17);
  return Buffer.concat([png.subarray(0, header), chunk, png.subarray(header)]);
}
