/**
 * The colours of a heatmap: inferno and viridis, perceptually even and readable with colour blindness, given by 33
 * anchors each and interpolated between (within two of 255 levels of the published tables, which are CC0).
 */

const anchors = (hex: string): readonly Rgb[] =>
  hex.split(' ').map((colour) => {
    const value = Number.parseInt(colour, 16);
    return [value >> 16, (value >> 8) & 255, value & 255];
  });

/** Red, green, blue, 0–255. */
export type Rgb = readonly [number, number, number];

/** Evenly spaced colours from the lowest value to the highest. */
export const COLORMAPS = {
  inferno: anchors(
    '000004 040312 0b0724 150b37 210c4a 2e0a5a 3c0965 4a0c6b 57106d 63146e 70196e 7d1e6d 89226a 962766 ' +
      'a32b61 af315c bb3755 c63e4d d14644 db4f3b e35932 eb6528 f1711e f67f14 f98d0a fb9c06 fcab0f fbba1f ' +
      'f9ca32 f5d949 f2e865 f3f586 fcffa4',
  ),
  viridis: anchors(
    '440154 470d60 48186a 482374 472d7b 453681 424086 3f4989 3b528b 375a8d 33638d 2f6a8e 2c728e 297a8e ' +
      '26818e 23898e 21908c 1f988b 1f9f88 21a685 28ae80 31b57b 3ebc74 4cc26c 5dc963 6ece58 82d34c 96d83f ' +
      'abdc32 c0df24 d5e21a eae51a fde725',
  ),
} as const;

export type Colormap = keyof typeof COLORMAPS;

/** The colour of `value` in 0–1; values outside are drawn as the nearer end. */
export function colourAt(colormap: Colormap, value: number): Rgb {
  const table = COLORMAPS[colormap];
  const at = Math.min(Math.max(value, 0), 1) * (table.length - 1);
  const low = table[Math.floor(at)] ?? [0, 0, 0];
  const high = table[Math.ceil(at)] ?? low;
  const share = at - Math.floor(at);
  const mix = (a: number, b: number) => Math.round(a + (b - a) * share);
  return [mix(low[0], high[0]), mix(low[1], high[1]), mix(low[2], high[2])];
}

export const toHex = (colour: Rgb) =>
  `#${colour.map((level) => level.toString(16).padStart(2, '0')).join('')}`;
