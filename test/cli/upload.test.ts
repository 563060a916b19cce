import { mkdirSync, mkdtempSync, rmSync, symlinkSync, utimesSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { changed, filesOf, type LocalFile, listFiles } from '../../cli/upload.ts';

const file = (path: string, size = 10, mtimeMs = 1000): LocalFile => ({ path, size, mtimeMs });
const paths = (files: LocalFile[]) => files.map(({ path }) => path);

describe('Files of a study', () => {
  let folder: string;
  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), 'slideway-upload-'));
  });
  afterEach(() => rmSync(folder, { recursive: true, force: true }));

  const write = (path: string, text = 'x') => {
    mkdirSync(dirname(join(folder, path)), { recursive: true });
    writeFileSync(join(folder, path), text);
  };

  it('are listed with size and time, hidden ones left out', async () => {
    write('a.svs', 'four');
    write('deep/b.svs');
    write('.DS_Store');
    utimesSync(join(folder, 'a.svs'), 1, 1);
    const files = await listFiles(folder);
    expect(paths(files)).toEqual(['a.svs', 'deep/b.svs']);
    expect(files[0]).toEqual({ path: 'a.svs', size: 4, mtimeMs: 1000 });
  });

  it('are found behind a link, and a link to a folder above ends', async () => {
    write('real/a.svs');
    symlinkSync(join(folder, 'real'), join(folder, 'linked'));
    symlinkSync(folder, join(folder, 'real', 'up'));
    symlinkSync(join(folder, 'gone'), join(folder, 'dangling'));
    expect(paths(await listFiles(folder))).toEqual(['linked/a.svs', 'real/a.svs']);
  });
});

describe('Of a study are uploaded', () => {
  const manifest = (...slides: string[]) => Buffer.from(`slide\n${slides.join('\n')}\n`);

  it('the files that the manifest names, and no others', () => {
    const files = [file('a.svs'), file('b.svs'), file('other/c.svs')];
    expect(paths(filesOf(manifest('a.svs', 'other/c.svs', 'gone.svs'), files))).toEqual([
      'a.svs',
      'other/c.svs',
    ]);
  });

  it('the folders that belong to a slide: MRXS, VSI and DICOM', () => {
    const files = [
      ...['a.mrxs', 'a/Data.dat', 'ab/Data.dat'].map((path) => file(path)),
      ...['x/b.vsi', 'x/_b_/s/1.ets', 'dicom/1.dcm', 'dicom/sub/2.dcm'].map((path) => file(path)),
    ];
    expect(paths(filesOf(manifest('a.mrxs', 'x/b.vsi', 'dicom'), files))).toEqual([
      'a.mrxs',
      'a/Data.dat',
      'x/b.vsi',
      'x/_b_/s/1.ets',
      'dicom/1.dcm',
      'dicom/sub/2.dcm',
    ]);
  });

  it('files whose name differs in case only, so that the plan can say so', () => {
    expect(paths(filesOf(manifest('A.SVS'), [file('a.svs')]))).toEqual(['a.svs']);
  });

  it('nothing for a row that leads out of the folder', () => {
    expect(filesOf(manifest('../a.svs'), [file('a.svs')])).toEqual([]);
  });

  it('only files that are new, or differ in size or time', () => {
    const files = [file('same'), file('new'), file('longer', 11), file('later', 10, 2000)];
    const there = { size: 10, mtime: '1000ms' };
    const landed = new Map([
      ['same', there],
      ['longer', there],
      ['later', there],
    ]);
    expect(paths(changed(files, landed))).toEqual(['new', 'longer', 'later']);
  });

  it('files that somebody else brought, whose time is not known', () => {
    expect(changed([file('a')], new Map([['a', { size: 10, mtime: undefined }]]))).toHaveLength(1);
  });
});
