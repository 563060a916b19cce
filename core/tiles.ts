/**
 * Tile predictions as the container writes them, `tiles.parquet`, read into typed columns. A file that is not
 * exactly what the contract says is {@link ResultCorrupt}: no number of it enters a result.
 *
 * The boxes are read at once, the values output by output as they are asked for: an embedding has thousands, and
 * together they would take as much memory as the file again.
 */
import { type AsyncBuffer, type FileMetaData, parquetMetadataAsync, parquetRead } from 'hyparquet';
import { compressors } from 'hyparquet-compressors';

import { ATTENTION, type Model, outputNames } from './contracts.ts';
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
  /** The file's own key-value metadata. */
  metadata: Map<string, string>;
  /**
   * Reads the values of an output, or of `attention`; NaN where the tile is unreadable.
   * @throws {ResultCorrupt}
   */
  values(output: string): Promise<Float32Array>;
}

const BOX = ['minx', 'miny', 'width', 'height'] as const;

/** The column that holds an output: `prob_<name>` per class, else `value_<name>`. */
export const tileColumn = (task: Model['task'], output: string) =>
  `${task === 'classification' ? 'prob' : 'value'}_${output}`;

/**
 * Opens the tiles of one slide and model.
 * @throws {ResultCorrupt}
 */
export async function readTiles(
  bytes: Uint8Array,
  { task, head, ...names }: Pick<Model, 'task' | 'outputs' | 'dimensions' | 'head'>,
): Promise<TileTable> {
  const columnOf = (output: string) =>
    head?.attention && output === ATTENTION ? ATTENTION : tileColumn(task, output);
  const file = await TileFile.open(bytes);
  file.expect([
    ...BOX,
    'status',
    ...outputNames(names).map(columnOf),
    ...(head?.attention ? [ATTENTION] : []),
  ]);
  const [minx, miny, width, height] = [
    await file.integers('minx'),
    await file.integers('miny'),
    await file.integers('width'),
    await file.integers('height'),
  ];
  const readable = await file.statuses();

  /** A readable tile without a number would make every aggregate NaN; an unreadable one with a number must not count. */
  async function values(output: string): Promise<Float32Array> {
    const column = await file.floats(columnOf(output));
    for (let i = 0; i < column.length; i++) {
      if (readable[i] === 0) column[i] = Number.NaN;
      else if (!Number.isFinite(column[i])) {
        throw new ResultCorrupt(`the tile at ${minx[i]}, ${miny[i]} is ok but has no ${output}`);
      }
    }
    return column;
  }
  return { rows: file.rows, minx, miny, width, height, readable, metadata: file.metadata, values };
}

/** A flat Parquet table in memory, of which columns are read one by one. */
class TileFile {
  readonly rows: number;
  readonly metadata: Map<string, string>;
  readonly #buffer: AsyncBuffer;
  readonly #about: FileMetaData;
  readonly #places: Map<string, number>;

  private constructor(buffer: AsyncBuffer, about: FileMetaData) {
    this.#buffer = buffer;
    this.#about = about;
    this.rows = Number(about.num_rows);
    this.metadata = new Map((about.key_value_metadata ?? []).map(({ key, value }) => [key, value ?? '']));
    this.#places = new Map(about.schema.slice(1).map(({ name }, place) => [name, place]));
  }

  static async open({ buffer, byteOffset, byteLength }: Uint8Array): Promise<TileFile> {
    // A Buffer is often a view on a larger one; only the part that is asked for is copied.
    const file: AsyncBuffer = {
      byteLength,
      slice: (start, end = byteLength) => {
        const part = new Uint8Array(buffer, byteOffset + start, Math.min(end, byteLength) - start);
        return Uint8Array.from(part).buffer;
      },
    };
    try {
      return new TileFile(file, await parquetMetadataAsync(file));
    } catch (error) {
      throw new ResultCorrupt(`tiles.parquet is not a Parquet file: ${(error as Error).message}`);
    }
  }

  expect(columns: string[]): void {
    const missing = columns.filter((column) => !this.#places.has(column));
    if (missing.length === 0) return;
    const more = missing.length > 10 ? ` and ${missing.length - 10} more` : '';
    throw new ResultCorrupt(`tiles.parquet lacks the column ${missing.slice(0, 10).join(', ')}${more}`);
  }

  integers(column: string): Promise<Int32Array> {
    return this.#numbers(column, new Int32Array(this.rows));
  }

  /** A nullable column comes with holes; a hole is NaN. */
  floats(column: string): Promise<Float32Array> {
    return this.#numbers(column, new Float32Array(this.rows).fill(Number.NaN));
  }

  async #numbers<T extends Int32Array | Float32Array>(column: string, target: T): Promise<T> {
    await this.#read(column, (part, from) => {
      if (ArrayBuffer.isView(part)) target.set(part as unknown as T, from);
      else copyNumbers(part, target, from);
    });
    return target;
  }

  async statuses(): Promise<Uint8Array> {
    const readable = new Uint8Array(this.rows);
    await this.#read('status', (part, from) => copyStatus(part, readable, from));
    return readable;
  }

  async #read(column: string, take: (part: ArrayLike<unknown>, from: number) => void): Promise<void> {
    try {
      await parquetRead({
        file: this.#buffer,
        metadata: this.#aboutOne(column),
        compressors,
        onChunk: ({ columnData, rowStart }) => take(columnData, rowStart),
      });
    } catch (error) {
      if (error instanceof ResultCorrupt) throw error;
      throw new ResultCorrupt(`tiles.parquet, column ${column}: ${(error as Error).message}`);
    }
  }

  /** What the reader needs to know of one column: to go through thousands for each of them would take minutes. */
  #aboutOne(column: string): FileMetaData {
    const place = this.#places.get(column) ?? -1;
    const [root, element] = [this.#about.schema[0], this.#about.schema[place + 1]];
    const groups = this.#about.row_groups.map((group) => ({ group, chunk: group.columns[place] }));
    if (!root || !element || groups.some(({ chunk }) => chunk?.meta_data?.path_in_schema[0] !== column)) {
      throw new ResultCorrupt(`tiles.parquet is no flat table at ${column}`);
    }
    return {
      ...this.#about,
      schema: [{ ...root, num_children: 1 }, element],
      row_groups: groups.map(({ group, chunk }) => ({ ...group, columns: chunk ? [chunk] : [] })),
    };
  }
}

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
