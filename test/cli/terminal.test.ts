import { describe, expect, it } from 'vitest';
import { table, wrap } from '../../cli/table.ts';
import { bytes, cut, duration, type Output, paintFor, plain, plural, Screen } from '../../cli/terminal.ts';

class Memory implements Output {
  readonly isTTY: boolean;
  readonly columns = 40;
  readonly rows = 10;
  text = '';
  constructor(isTTY: boolean) {
    this.isTTY = isTTY;
  }
  write(text: string): void {
    this.text += text;
  }
}

/** What a terminal shows after the text: only the movements that Screen makes. */
function shown(text: string): string[] {
  const lines = [''];
  // biome-ignore lint/suspicious/noControlCharactersInRegex: terminal codes are what is looked for
  for (const part of text.split(/(\u001b\[[0-9?]*[A-Za-z]|\n)/)) {
    // biome-ignore lint/suspicious/noControlCharactersInRegex: as above
    const up = /^\u001b\[(\d+)A$/.exec(part)?.[1];
    if (up) lines.splice(lines.length - 1 - Number(up), Number(up));
    else if (part === '\n') lines.push('');
    else if (!part.startsWith('\u001b')) lines[lines.length - 1] += part;
  }
  return lines.filter((line) => line !== '');
}

describe('Colour', () => {
  it('is used on a terminal only', () => {
    expect(paintFor({ isTTY: true, write: () => {} }, {})('red', 'x')).toBe('\u001b[31mx\u001b[39m');
    expect(paintFor({ write: () => {} }, {})('red', 'x')).toBe('x');
  });

  it('is not used where NO_COLOR is set', () => {
    expect(paintFor({ isTTY: true, write: () => {} }, { NO_COLOR: '1' })('red', 'x')).toBe('x');
  });
});

describe('The screen', () => {
  it('redraws its block in place, below the lines that stay', () => {
    const output = new Memory(true);
    const screen = new Screen(output, { env: { NO_COLOR: '1' } });
    screen.show(['one', 'two']);
    screen.print('stays');
    screen.show(['three']);
    expect(shown(output.text)).toEqual(['stays', 'three']);
    screen.clear();
    expect(shown(output.text)).toEqual(['stays']);
  });

  it('cuts lines and blocks that would not fit the window', () => {
    const output = new Memory(true);
    const screen = new Screen(output, { env: { NO_COLOR: '1' } });
    screen.show(Array.from({ length: 30 }, () => 'x'.repeat(100)));
    const lines = shown(output.text);
    expect(lines).toHaveLength(8);
    expect(lines[0]).toHaveLength(39);
  });

  it('writes no terminal codes where it cannot redraw', async () => {
    const output = new Memory(false);
    const screen = new Screen(output);
    screen.show(['block']);
    await screen.task('Working', async () => {});
    expect(output.text).toMatch(/^Working …\n✓ Working 0\.0 s\n$/);
  });

  it('says that a task failed, and passes the error on', async () => {
    const output = new Memory(false);
    const failing = new Screen(output).task('Working', () => Promise.reject(new Error('no disk')));
    await expect(failing).rejects.toThrow('no disk');
    expect(output.text).toContain('✗ Working');
  });

  it('shows only warnings when quiet', () => {
    const output = new Memory(false);
    const screen = new Screen(output, { quiet: true });
    screen.print('progress');
    screen.warn('trouble');
    expect(output.text).toBe('trouble\n');
  });
});

describe('Numbers for people', () => {
  it.each([
    [0.04, '0.0 s'],
    [9.9, '9.9 s'],
    [9.97, '10 s'],
    [59.4, '59 s'],
    [59.6, '1 min 00 s'],
    [185, '3 min 05 s'],
    [7620, '2 h 07 min'],
  ])('%d seconds are %s', (seconds, text) => expect(duration(seconds)).toBe(text));

  it.each([
    [0, '0 B'],
    [999, '999 B'],
    [1000, '1.0 kB'],
    [3_400_000, '3.4 MB'],
    [999_600, '1.0 MB'],
    [12_000_000_000, '12 GB'],
  ])('%d bytes are %s', (count, text) => expect(bytes(count)).toBe(text));

  it('count in singular and plural', () => {
    expect([plural(1, 'slide'), plural(0, 'slide'), plural(1200, 'slide')]).toEqual([
      '1 slide',
      '0 slides',
      '1,200 slides',
    ]);
  });
});

describe('A table', () => {
  const columns = [{ title: 'slide' }, { title: 'tiles', align: 'right' as const }];

  it('aligns its columns, numbers to the right', () => {
    const rows = [{ cells: ['a.svs', '1,204'] }, { cells: ['longer.svs', '7'] }];
    expect(table(columns, rows, plain, 80)).toEqual([
      'slide       tiles',
      '──────────  ─────',
      'a.svs       1,204',
      'longer.svs      7',
    ]);
  });

  it('has as many rows as there are', () => {
    const rows = Array.from({ length: 200_000 }, () => ({ cells: ['a.svs', '1'] }));
    expect(table(columns, rows, plain, 80)).toHaveLength(200_002);
  });

  it('puts a note below its row, wrapped to the width', () => {
    const rows = [{ cells: ['a.svs', ''], note: 'its pixels cannot be read at all' }];
    expect(table(columns, rows, plain, 20).slice(2)).toEqual([
      'a.svs',
      '  its pixels cannot',
      '  be read at all',
    ]);
  });

  it('is not put out by colour', () => {
    const rows = [{ cells: ['\u001b[32ma\u001b[39m', '1'] }];
    expect(table(columns, rows, plain, 80)[2]).toBe('\u001b[32ma\u001b[39m          1');
  });

  it('wraps at spaces, and cuts what is longer than a line', () => {
    expect(wrap('one two three', 7)).toEqual(['one two', 'three']);
    expect(wrap('abcdefghij', 4)).toEqual(['abcd', 'efgh', 'ij']);
    expect(cut('abcdefghij', 4)).toBe('abc…');
  });
});
