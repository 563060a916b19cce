/**
 * The manifest as the command line handles it: made for a folder that has none, and with the models that `--model`
 * names written into its `model` column, because a manifest alone says what a run is.
 */
import { type Info, parse } from 'csv-parse/sync';

/** Endings of files that are a slide, or its main file. */
const SLIDE_FILE = /\.(svs|tiff?|ndpi|mrxs|scn|bif|svslide|vms|vmu|vsi)$/i;
const DICOM_FILE = /\.dcm$/i;

/**
 * What looks like a slide among files, as paths relative to the folder: slide files, and folders of DICOM files. What
 * lies in a slide's own companion folder (MRXS, VSI) is part of that slide.
 */
export function findSlides(files: string[]): string[] {
  const companions = new Set(
    files.flatMap((path) => {
      const [, parent = '', name = '', extension = ''] = /^(.*\/)?([^/]*)\.(mrxs|vsi)$/i.exec(path) ?? [];
      if (extension === '') return [];
      return [extension.toLowerCase() === 'mrxs' ? `${parent}${name}/` : `${parent}_${name}_/`];
    }),
  );
  const isPart = (path: string) => {
    for (let slash = path.indexOf('/'); slash !== -1; slash = path.indexOf('/', slash + 1)) {
      if (companions.has(path.slice(0, slash + 1))) return true;
    }
    return false;
  };
  const slides = new Set<string>();
  for (const path of files) {
    if (isPart(path) || path.split('/').some((part) => part.startsWith('.'))) continue;
    if (SLIDE_FILE.test(path)) slides.add(path);
    else if (DICOM_FILE.test(path) && path.includes('/')) slides.add(path.slice(0, path.lastIndexOf('/')));
  }
  return [...slides].sort();
}

/** A manifest that lists `slides`. */
export const makeManifest = (slides: string[]): string =>
  ['slide', ...slides.map((slide) => quoted(slide, ','))].map((line) => `${line}\n`).join('');

export interface WithModel {
  bytes: Buffer;
  /** Rows that the model was written to. */
  set: number;
  /** Rows that name models of their own and keep them. */
  kept: number;
}

/**
 * Writes `model` to the rows that name none; everything else stays as it is, line for line.
 * The bytes must be those of a manifest (core's parseManifest takes them).
 */
export function withModel(bytes: Uint8Array, model: string): WithModel {
  const text = Buffer.from(bytes).toString('utf8');
  const mark = text.startsWith('\uFEFF') ? '\uFEFF' : '';
  const body = text.slice(mark.length);
  const delimiter = delimiterOf(body);
  const records = parse(body, {
    delimiter,
    info: true,
    relax_column_count: true,
    record_delimiter: ['\r\n', '\n', '\r'],
  }) as unknown as { record: string[]; info: Info }[];

  let column: number | undefined;
  let columns = 0;
  let set = 0;
  let kept = 0;
  const source = Buffer.from(body);
  const lines = records.map(({ record, info }, index) => {
    const raw = source.subarray(records[index - 1]?.info.bytes ?? 0, info.bytes).toString('utf8');
    if (record.every((field) => field.trim() === '')) return raw;
    const [, content = '', end = ''] = /^([\s\S]*?)(\r\n|\n|\r|)$/.exec(raw) ?? [];
    if (columns === 0) {
      columns = record.length;
      const found = record.findIndex((name) => name.trim().toLowerCase() === 'model');
      column = found === -1 ? undefined : found;
      return column === undefined ? `${content}${delimiter}model${end}` : raw;
    }
    if (column === undefined) {
      set++;
      return `${content}${delimiter}${quoted(model, delimiter)}${end}`;
    }
    if ((record[column] ?? '').trim() !== '') {
      kept++;
      return raw;
    }
    // A row of the wrong length is refused for that; filling it could make it look right.
    if (record.length !== columns) return raw;
    set++;
    const fields = record.map((field, index) => quoted(index === column ? model : field, delimiter));
    return `${fields.join(delimiter)}${end}`;
  });
  return { bytes: Buffer.from(`${mark}${lines.join('')}`), set, kept };
}

/** The delimiter that the first line with text uses most, outside quotes. */
function delimiterOf(text: string): string {
  const first = text.split(/\r?\n|\r/).find((line) => line.trim() !== '') ?? '';
  const bare = first.replace(/"[^"]*"/g, '');
  const count = (delimiter: string) => bare.split(delimiter).length;
  return [',', ';', '\t'].reduce((best, next) => (count(next) > count(best) ? next : best));
}

function quoted(field: string, delimiter: string): string {
  const needed = field.includes(delimiter) || /["\r\n]|^\s|\s$/.test(field);
  return needed ? `"${field.replaceAll('"', '""')}"` : field;
}
