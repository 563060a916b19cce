/**
 * The program and the letters that draw a heatmap's legend: resvg and Inter (OFL). Read from node_modules here; in
 * a Lambda's bundle `legend-assets.bundle.ts` stands in its place (package.json, imports), with the bytes inside.
 */
import { readFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';

const load = async (specifier: string): Promise<Uint8Array> =>
  readFile(fileURLToPath(import.meta.resolve(specifier)));

export const resvgWasm = () => load('@resvg/resvg-wasm/index_bg.wasm');

/** Inter regular and semi-bold. */
export const fonts = () =>
  Promise.all([
    load('@fontsource/inter/files/inter-latin-400-normal.woff2'),
    load('@fontsource/inter/files/inter-latin-600-normal.woff2'),
  ]);
