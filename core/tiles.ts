/**
 * Tile predictions as the container writes them, `tiles.parquet`, read into typed columns. A file that is not
 * exactly what the contract says is {@link ResultCorrupt}: no number of it enters a result.
 */
import { type AsyncBuffer, type FileMetaData, parquetMetadataAsync, parquetRead } from 'hyparquet';
import { compressors } from 'hyparquet-compressors';

import type { Model } from './contracts.ts';
import { SlidewayError } from './errors.ts';

/** What the container left for a slide contradicts its own marker or the contract. */
export class ResultCorrupt extends SlidewayError {}

/** One value per tile in each column, in the file's order. Boxes are in level-0 pixels. */
export interface TileTable {
  rows: number;
  minx: Int32Array;
  miny: Int32Array;
  width: Int32Array;
  height: Int32Array;
  /** 1 where the tile's pixels could be read, else 0. */
  readable: Uint8Array;
  /** Output name to its values; NaN where the tile is unreadable. */
  outputs: Map<string, Float32Array>;
  /** The file's own key-value metadata. */
  metadata: Map<string, string>;
}

const BOX = ['minx', 'miny', 'width', 'height'] as const;

/** The column that holds an output: `prob_<name>` per class, else `value_<name>`. */
export const tileColumn = (task: Model['task'], output: string) =>
  `${task === 'classification' ? 'prob' : 'value'}_${output}`;

/** Reads the tiles of one slide and model. Throws {@link ResultCorrupt}. */
export async function readTiles(
  bytes: Uint8Array,
  { task, outputs }: Pick<Model, 'task' | 'outputs'>,
): Promise<TileTable> {
  // A copy: a Buffer is often a view on a larger one, and its own slice would be a view again.
  const whole = Uint8Array.from(bytes).buffer;
  const file: AsyncBuffer = {
    byteLength: whole.byteLength,
    slice: (start, end) => whole.slice(start, end),
  };
  let metadata: FileMetaData;
  try {
    metadata = await parquetMetadataAsync(file);
  } catch (error) {
    throw new ResultCorrupt(`tiles.parquet is not a Parquet file: ${(error as Error).message}`);
  }

  const rows = Number(metadata.num_rows);
  const present = new Set(metadata.schema.map(({ name }) => name));
  const columns = [...BOX, 'status', ...outputs.map((output) => tileColumn(task, output))];
  const missing = columns.filter((column) => !present.has(column));
  if (missing.length > 0) throw new ResultCorrupt(`tiles.parquet lacks the column ${missing.join(', ')}`);

  const boxes = new Map<string, Int32Array>(BOX.map((column) => [column, new Int32Array(rows)]));
  const values = new Map<string, Float32Array>(
    outputs.map((output) => [tileColumn(task, output), new Float32Array(rows).fill(Number.NaN)]),
  );
  const readable = new Uint8Array(rows);

  // One column at a time, so that only one of them is ever held decoded twice.
  for (const columnName of columns) {
    const target = boxes.get(columnName) ?? values.get(columnName);
    try {
      await parquetRead({
        file,
        metadata,
        columns: [columnName],
        compressors,
        onChunk: ({ columnData, rowStart }) => {
          if (target && ArrayBuffer.isView(columnData)) target.set(columnData as Float32Array, rowStart);
          else if (target) copyNumbers(columnData, target, rowStart);
          else copyStatus(columnData, readable, rowStart);
        },
      });
    } catch (error) {
      if (error instanceof ResultCorrupt) throw error;
      throw new ResultCorrupt(`tiles.parquet, column ${columnName}: ${(error as Error).message}`);
    }
  }

  const box = (column: (typeof BOX)[number]) => boxes.get(column) ?? new Int32Array(0);
  const table: TileTable = {
    rows,
    minx: box('minx'),
    miny: box('miny'),
    width: box('width'),
    height: box('height'),
    readable,
    outputs: new Map(
      outputs.map((output) => [output, values.get(tileColumn(task, output)) ?? new Float32Array(0)]),
    ),
    metadata: new Map((metadata.key_value_metadata ?? []).map(({ key, value }) => [key, value ?? ''])),
  };
  refuseMissingValues(table);
  return table;
}

/** A nullable column comes as an array with holes; a hole stays NaN. */
function copyNumbers(source: ArrayLike<unknown>, target: Int32Array | Float32Array, from: number): void {
  for (let i = 0; i < source.length; i++) {
    const value = source[i];
    if (typeof value === 'number') target[from + i] = value;
    else if (target instanceof Int32Array) throw new ResultCorrupt(`tile ${from + i} has no box`);
  }
}

function copyStatus(source: ArrayLike<unknown>, target: Uint8Array, from: number): void {
  for (let i = 0; i < source.length; i++) {
    const status = source[i];
    if (status !== 'ok' && status !== 'unreadable') {
      throw new ResultCorrupt(`tile ${from + i} has the unknown status ${JSON.stringify(status)}`);
    }
    target[from + i] = status === 'ok' ? 1 : 0;
  }
}

/** A readable tile without a number would make every aggregate NaN; an unreadable one with a number must not count. */
function refuseMissingValues({ rows, readable, outputs, minx, miny }: TileTable): void {
  for (const [output, values] of outputs) {
    for (let i = 0; i < rows; i++) {
      if (readable[i] === 0) values[i] = Number.NaN;
      else if (!Number.isFinite(values[i])) {
        throw new ResultCorrupt(`the tile at ${minx[i]}, ${miny[i]} is ok but has no ${output}`);
      }
    }
  }
}
