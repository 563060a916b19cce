/** What legend-assets.ts reads from node_modules, as esbuild's `binary` loader puts it into a bundle. */
import regular from '@fontsource/inter/files/inter-latin-400-normal.woff2';
import semiBold from '@fontsource/inter/files/inter-latin-600-normal.woff2';
import wasm from '@resvg/resvg-wasm/index_bg.wasm';

export const resvgWasm = async (): Promise<Uint8Array> => wasm;

export const fonts = async (): Promise<Uint8Array[]> => [regular, semiBold];
