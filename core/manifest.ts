/**
 * `repo.csv`, as researchers and their spreadsheets write it: any usual delimiter, line ends, byte-order mark and
 * quoting. A bad row is set aside with its line and reason and the others go on; only what is not a manifest at all
 * fails.
 */
import { type Info, parse } from 'csv-parse/sync';
import type { Reason } from './contracts.ts';
import { ManifestInvalid } from './errors.ts';

/** A row that names a slide, or one that cannot be used, with the reason. */
export interface ManifestRow {
  /** Line in the file on which the row starts, the header being 1. */
  line: number;
  /** Path of the slide relative to the manifest's folder, with forward slashes; as written where it is refused. */
  slide: string;
  slideId?: string;
  /** µm per pixel. */
  mpp?: number;
  /** `name` or `name@version`, as the row gives them. */
  models?: string[];
  /** Every other column. */
  metadata: Record<string, string>;
  /** Why the row cannot be used. */
  reason?: Reason;
}

const SLIDE_COLUMNS = ['slide', 'file', 'filename', 'image'];
/** A slide_id becomes part of keys and file names. */
const SLIDE_ID = /^[\p{L}\p{N}][\p{L}\p{N} ._()+=,@-]{0,127}$/u;

/** Splits the cell or default that names models: `a | b@1.0.0`. */
export const splitModels = (text: string): string[] => [
  ...new Set(
    text
      .split('|')
      .map((name) => name.trim())
      .filter((name) => name !== ''),
  ),
];

/**
 * Reads a manifest.
 * @throws {ManifestInvalid} when the bytes are not a manifest: empty, binary, not UTF-8, no `slide` column.
 */
export function parseManifest(bytes: Uint8Array): ManifestRow[] {
  const text = decode(bytes);
  const delimiter = delimiterOf(text);
  const [header, ...records] = readRecords(text, delimiter);
  if (!header)
    throw new ManifestInvalid(
      'The manifest is empty. Its first line must name the columns, one of them `slide`.',
    );
  const columns = header.fields.map((name) => name.trim().toLowerCase());
  const slideColumn = SLIDE_COLUMNS.find((name) => columns.includes(name));
  if (!slideColumn) {
    // Nothing of the file is quoted: without a header its first line may name a patient.
    throw new ManifestInvalid(
      'The manifest has no column `slide` (nor file, filename or image). Its first line must name the columns.',
    );
  }
  const twice = columns.find((name, index) => name !== '' && columns.indexOf(name) !== index);
  if (twice) throw new ManifestInvalid(`The manifest has two columns named \`${twice}\`; rename one.`);
  if (records.length === 0) throw new ManifestInvalid('The manifest names columns but has no row.');
  return records.map((record) => toRow(record, columns, slideColumn));
}

function decode(bytes: Uint8Array): string {
  if ((bytes[0] === 0xff && bytes[1] === 0xfe) || (bytes[0] === 0xfe && bytes[1] === 0xff)) {
    throw new ManifestInvalid('The manifest is UTF-16. Save it as "CSV UTF-8".');
  }
  if (bytes.includes(0)) throw new ManifestInvalid('The manifest is a binary file, not CSV.');
  try {
    // TextDecoder drops the byte-order mark.
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch {
    throw new ManifestInvalid('The manifest is not UTF-8. Save it as "CSV UTF-8".');
  }
}

/** The delimiter that the first line with text uses most, outside quotes. */
function delimiterOf(text: string): string {
  const first = text.split(/\r?\n/).find((line) => line.trim() !== '') ?? '';
  const bare = first.replace(/"[^"]*"/g, '');
  const count = (delimiter: string) => bare.split(delimiter).length;
  return [',', ';', '\t'].reduce((best, next) => (count(next) > count(best) ? next : best));
}

interface Row {
  fields: string[];
  line: number;
}

function readRecords(text: string, delimiter: string): Row[] {
  try {
    const records = parse(text, {
      delimiter,
      info: true,
      relax_column_count: true,
      skip_empty_lines: true,
      skip_records_with_empty_values: true,
      record_delimiter: ['\r\n', '\n', '\r'],
    }) as unknown as { record: string[]; info: Info }[];
    // csv-parse tells the line on which a record ends; quoted fields may hold line breaks.
    return records.map(({ record, info }) => ({
      fields: record,
      line: info.lines - record.join('').split('\n').length + 1,
    }));
  } catch (error) {
    throw new ManifestInvalid(`The manifest is not CSV: ${(error as Error).message}`);
  }
}

function toRow({ fields, line }: Row, columns: string[], slideColumn: string): ManifestRow {
  const cells = new Map(columns.map((name, index) => [name, (fields[index] ?? '').trim()]));
  const written = cells.get(slideColumn) ?? '';
  const slide = written
    .replaceAll('\\', '/')
    .replace(/^(\.\/+)+/, '')
    .replace(/\/+$/, '');
  const row: ManifestRow = { line, slide, metadata: {} };
  const refuse = (error: string, message: string) => {
    row.reason ??= { error, message: `Line ${line}: ${message}` };
  };

  if (fields.length !== columns.length) {
    refuse(
      'RowInvalid',
      `the row has ${fields.length} fields, the header ${columns.length}. Quote fields that hold the delimiter.`,
    );
  }
  if (slide === '') refuse('RowInvalid', `the column \`${slideColumn}\` is empty.`);
  if (/^\/|^[a-z]:|^[a-z0-9+.-]+:\/\//i.test(slide) || slide.split('/').includes('..')) {
    refuse(
      'PathOutsideStudy',
      `\`${written}\` leads out of the study's folder. Give a path relative to the manifest.`,
    );
  }
  if (/\p{Cc}/u.test(slide)) refuse('RowInvalid', 'the slide name holds control characters.');

  const slideId = cells.get('slide_id');
  if (slideId) {
    if (SLIDE_ID.test(slideId) && !slideId.includes('..')) row.slideId = slideId;
    else
      refuse(
        'SlideIdInvalid',
        `slide_id \`${slideId}\` may hold letters, digits, space and . _ - ( ) + = , @ and starts with a letter or digit, at most 128.`,
      );
  }
  const mpp = cells.get('mpp');
  if (mpp) {
    const value = Number(mpp.replace(',', '.'));
    if (value >= 0.02 && value <= 20) row.mpp = value;
    else refuse('MppInvalid', `mpp \`${mpp}\` is not a pixel size in µm between 0.02 and 20.`);
  }
  const models = splitModels(cells.get('model') ?? '');
  if (models.length > 0) row.models = models;

  const read = new Set([slideColumn, 'slide_id', 'mpp', 'model', '']);
  for (const [name, value] of cells) if (!read.has(name) && value !== '') row.metadata[name] = value;
  return row;
}
