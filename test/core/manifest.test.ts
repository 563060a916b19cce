import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { ManifestInvalid } from '../../core/errors.ts';
import { parseManifest } from '../../core/manifest.ts';

const parse = (text: string) => parseManifest(Buffer.from(text));

describe('a manifest as spreadsheets write it', () => {
  it.each([
    ['commas', 'slide,slide_id,mpp\na/x.svs,S1,0.25\n'],
    ['semicolons and decimal commas', 'slide;slide_id;mpp\na/x.svs;S1;0,25\n'],
    ['tabs', 'slide\tslide_id\tmpp\na/x.svs\tS1\t0.25\n'],
    ['a byte-order mark', '\ufeffslide,slide_id,mpp\na/x.svs,S1,0.25\n'],
    ['CRLF', 'slide,slide_id,mpp\r\na/x.svs,S1,0.25\r\n'],
    ['quotes', '"slide","slide_id","mpp"\n"a/x.svs","S1","0.25"\n'],
    ['other letter case and spaces', ' Slide , SLIDE_ID ,Mpp\n a/x.svs , S1 , 0.25 \n'],
    ['no line end at the end', 'slide,slide_id,mpp\na/x.svs,S1,0.25'],
    ['backslashes and a leading dot', 'slide,slide_id,mpp\n.\\a\\x.svs,S1,0.25\n'],
    ['the name `file`', 'file,slide_id,mpp\na/x.svs,S1,0.25\n'],
    ['the name `filename`', 'filename,slide_id,mpp\na/x.svs,S1,0.25\n'],
    ['the name `image`', 'image,slide_id,mpp\na/x.svs,S1,0.25\n'],
  ])('is read with %s', (_, text) => {
    expect(parse(text)).toEqual([{ line: 2, slide: 'a/x.svs', slideId: 'S1', mpp: 0.25, metadata: {} }]);
  });

  it('keeps further columns as metadata and splits models', () => {
    const [row] = parse('slide,case_id,model,note\nx.svs,C7,stain | focus@1.2.0|stain,"a, b"\n');
    expect(row).toEqual({
      line: 2,
      slide: 'x.svs',
      models: ['stain', 'focus@1.2.0'],
      metadata: { case_id: 'C7', note: 'a, b' },
    });
  });

  it('counts lines through empty ones and line breaks inside quotes', () => {
    const rows = parse('slide,note\n\nx.svs,"two\nlines"\n,,\ny.svs,\n');
    expect(rows.map(({ line, slide }) => [line, slide])).toEqual([
      [3, 'x.svs'],
      [6, 'y.svs'],
    ]);
  });

  it('reads 10,000 rows', () => {
    const rows = parse(`slide\n${Array.from({ length: 10_000 }, (_, i) => `s${i}.svs`).join('\n')}\n`);
    expect(rows).toHaveLength(10_000);
    expect(rows.at(-1)).toMatchObject({ line: 10_001, slide: 's9999.svs' });
  });

  it('gives back any text that was quoted by the rules', () => {
    const field = fc.string({ unit: 'grapheme' }).filter((s) => !/[\p{Cc}\ufeff]/u.test(s));
    fc.assert(
      fc.property(field, (note) => {
        const [row] = parse(`slide,note\nx.svs,"${note.replaceAll('"', '""')}"\n`);
        expect(row?.metadata.note ?? '').toBe(note.trim());
      }),
    );
  });
});

describe('a file that is no manifest fails with its reason', () => {
  it.each([
    ['empty', Buffer.alloc(0), /empty/],
    ['only white space', Buffer.from('\n \n'), /empty|no column/],
    ['binary', Buffer.from([0x89, 0x50, 0x4e, 0x47, 0x00, 0x01]), /binary/],
    ['UTF-16', Buffer.from('\ufeffslide\nx.svs', 'utf16le'), /UTF-16/],
    ['Latin-1', Buffer.from('slide\nÖl.svs', 'latin1'), /not UTF-8/],
    ['no slide column', Buffer.from('name,mpp\nx.svs,1\n'), /no column `slide`/],
    ['two columns of one name', Buffer.from('slide,note,note\nx,1,2\n'), /two columns named `note`/],
    ['a header only', Buffer.from('slide,mpp\n'), /no row/],
    ['an open quote', Buffer.from('slide\n"x.svs\ny.svs\n'), /not CSV/],
  ])('%s', (_, bytes, message) => {
    expect(() => parseManifest(bytes)).toThrow(ManifestInvalid);
    expect(() => parseManifest(bytes)).toThrow(message);
  });
});

it('what a file without a header holds is never quoted: it may be a patient', () => {
  expect(() => parse('Jane Doe,1951-01-01\n')).toThrow(/^(?!.*Jane)/);
});

describe('a bad row is set aside with line and reason, and the others go on', () => {
  it.each([
    ['../x.svs', 'PathOutsideStudy'],
    ['a/../../x.svs', 'PathOutsideStudy'],
    ['..\\x.svs', 'PathOutsideStudy'],
    ['/data/x.svs', 'PathOutsideStudy'],
    ['C:\\slides\\x.svs', 'PathOutsideStudy'],
    ['s3://bucket/x.svs', 'PathOutsideStudy'],
    ['', 'RowInvalid'],
    ['a\tb.svs', 'RowInvalid'],
  ])('slide %j: %s', (slide, error) => {
    const rows = parse(`slide,note\n"${slide}",n\ny.svs,n\n`);
    expect(rows[0]?.reason).toMatchObject({ error, message: expect.stringMatching(/^Line 2: /) });
    expect(rows[1]).not.toHaveProperty('reason');
  });

  it.each(['0', '-1', '40', 'abc', '0.25 um'])('mpp %s', (mpp) => {
    expect(parse(`slide;mpp\nx.svs;${mpp}\n`)[0]?.reason?.error).toBe('MppInvalid');
  });

  it.each(['a/b', '../x', '-x', 'x'.repeat(129), 'a..b'])('slide_id %s', (id) => {
    expect(parse(`slide,slide_id\nx.svs,${id}\n`)[0]?.reason?.error).toBe('SlideIdInvalid');
  });

  it('a row with too many or too few fields', () => {
    const rows = parse('slide,note\nx.svs,1,2\ny.svs\nz.svs,1\n');
    expect(rows.map(({ reason }) => reason?.error)).toEqual(['RowInvalid', 'RowInvalid', undefined]);
  });
});
