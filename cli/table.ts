/** Tables for a terminal: columns as wide as their cells, numbers to the right, text wrapped where it must be. */
import { stripVTControlCharacters } from 'node:util';
import type { Paint } from './terminal.ts';

export interface Column {
  title: string;
  align?: 'left' | 'right';
}

const GAP = '  ';
const NARROWEST = 12;

const widthOf = (text: string): number => [...stripVTControlCharacters(text)].length;

export interface Row {
  cells: string[];
  /** Text that stands below the row, over the table's whole width. */
  note?: string | undefined;
}

/** Width that columns take side by side, their titles and cells being what they are. */
export const tableWidth = (columns: Column[], rows: Row[]): number =>
  widthsOf(columns, rows).reduce((sum, width) => sum + width + GAP.length, -GAP.length);

const widthsOf = (columns: Column[], rows: Row[]): number[] =>
  columns.map(({ title }, index) =>
    // There may be more rows than a call takes arguments.
    rows.reduce((widest, { cells }) => Math.max(widest, widthOf(cells[index] ?? '')), widthOf(title)),
  );

/** Lines of the table. Where it is wider than `width`, its last column is wrapped. */
export function table(columns: Column[], rows: Row[], paint: Paint, width: number): string[] {
  const widths = widthsOf(columns, rows);
  const last = columns.length - 1;
  const before = widths.slice(0, last).reduce((sum, each) => sum + each + GAP.length, 0);
  widths[last] = Math.min(widths[last] ?? 0, Math.max(width - before, NARROWEST));

  const line = (cells: string[]): string =>
    cells
      .map((cell, index) => {
        const space = ' '.repeat(Math.max((widths[index] ?? 0) - widthOf(cell), 0));
        return columns[index]?.align === 'right' ? `${space}${cell}` : `${cell}${space}`;
      })
      .join(GAP)
      .trimEnd();

  const body = rows.flatMap(({ cells, note }) => {
    const [first = '', ...more] = wrap(cells[last] ?? '', widths[last] ?? NARROWEST);
    const head = cells.slice(0, last);
    return [
      line([...head, first]),
      ...more.map((text) => line([...head.map(() => ''), text])),
      ...(note ? wrap(note, Math.max(width - 2, NARROWEST)).map((text) => `  ${paint('dim', text)}`) : []),
    ];
  });
  const title = line(columns.map((column) => column.title));
  const rule = widths.map((each) => '─'.repeat(each)).join(GAP);
  return [paint('bold', title), paint('dim', rule), ...body];
}

/** Breaks text at spaces into lines of at most `width`; a word that is longer is cut. */
export function wrap(text: string, width: number): string[] {
  if (widthOf(text) <= width) return [text];
  const lines: string[] = [];
  let line = '';
  for (const word of text.split(/\s+/)) {
    let rest = word;
    if (line !== '' && widthOf(line) + 1 + widthOf(rest) > width) {
      lines.push(line);
      line = '';
    }
    while (widthOf(rest) > width) {
      lines.push([...rest].slice(0, width).join(''));
      rest = [...rest].slice(width).join('');
    }
    line = line === '' ? rest : `${line} ${rest}`;
  }
  if (line !== '') lines.push(line);
  return lines;
}
