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

/** Lines of the table; the last column is wrapped so that no line is wider than `width`. */
export function table(columns: Column[], rows: string[][], paint: Paint, width = 100): string[] {
  const widths = columns.map(({ title }, index) =>
    Math.max(widthOf(title), ...rows.map((row) => widthOf(row[index] ?? ''))),
  );
  const last = columns.length - 1;
  const before = widths.slice(0, last).reduce((sum, each) => sum + each + GAP.length, 0);
  widths[last] = Math.min(widths[last] ?? 0, Math.max(width - before, NARROWEST));

  const line = (cells: string[]): string =>
    cells
      .map((cell, index) => {
        const space = ' '.repeat(Math.max((widths[index] ?? 0) - widthOf(cell), 0));
        if (columns[index]?.align === 'right') return `${space}${cell}`;
        return index === last ? cell : `${cell}${space}`;
      })
      .join(GAP)
      .trimEnd();

  const body = rows.flatMap((row) => {
    const [first = '', ...more] = wrap(row[last] ?? '', widths[last] ?? NARROWEST);
    const head = row.slice(0, last);
    return [line([...head, first]), ...more.map((text) => line([...head.map(() => ''), text]))];
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
