import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { NameTemplateInvalid } from '../../core/errors.ts';
import { canonicalName, markedName, parseNameTemplate } from '../../core/names.ts';

const DEFAULT = '{case_id}_{stain}_{slide_id}';
const name = (template: string, fields: Record<string, string>, slide = 'a/scan.svs', slideId = 'S1') =>
  canonicalName(parseNameTemplate(template), fields, slide, slideId);

describe('the canonical name', () => {
  it.each([
    ['all fields', { case_id: 'C7', stain: 'HE', slide_id: 'S1' }, 'a/scan.svs', 'C7_HE_S1.svs'],
    ['the middle one missing', { case_id: 'C7', slide_id: 'S1' }, 'x.svs', 'C7_S1.svs'],
    ['the first one missing', { stain: 'HE', slide_id: 'S1' }, 'x.svs', 'HE_S1.svs'],
    ['the id alone', { slide_id: 'S1' }, 'x.ndpi', 'S1.ndpi'],
    ['a blank one', { case_id: '  ', slide_id: 'S1' }, 'x.svs', 'S1.svs'],
    ['both extensions of OME-TIFF', { slide_id: 'S1' }, 'x.ome.tiff', 'S1.ome.tiff'],
    ['no extension', { slide_id: 'S1' }, '', 'S1'],
    ['what S3 and shells dislike', { stain: 'H&E / 10 %', slide_id: 'S:1?*' }, 'x.svs', 'H-E-10_S-1.svs'],
    ['a way out', { case_id: '../../etc', slide_id: 'S1' }, 'x.svs', 'etc_S1.svs'],
    [
      'other scripts',
      { case_id: '東京-7', stain: 'Färbung', slide_id: 'S1' },
      'x.svs',
      '東京-7_Färbung_S1.svs',
    ],
    ['accents in pieces', { stain: 'Fa\u0308rbung', slide_id: 'S1' }, 'x.svs', 'F\u00e4rbung_S1.svs'],
    ['control characters', { case_id: 'C\u0000\u00077', slide_id: 'S1' }, 'x.svs', 'C-7_S1.svs'],
    ['emoji', { case_id: 'C🧬7', slide_id: 'S1' }, 'x.svs', 'C-7_S1.svs'],
  ])('of %s', (_, fields: Record<string, string>, slide, expected) => {
    expect(name(DEFAULT, fields, slide)).toEqual({ name: expected, fallback: expect.any(String) });
  });

  it('keeps what stands before and behind the fields', () => {
    expect(name('wsi-{case_id}_{slide_id}.scan', { slide_id: 'S1' }).name).toBe('wsi-S1.scan.svs');
  });

  it('is the slide id where no field is known, or it is too long, with the reason', () => {
    expect(name('{case_id}_{stain}', {})).toEqual({
      name: 'S1.svs',
      fallback: 'S1.svs',
      reason: { error: 'NameEmpty', message: expect.stringContaining('case_id, stain') },
    });
    const long = name(DEFAULT, { case_id: 'x'.repeat(200), slide_id: 'S1' });
    expect(long).toMatchObject({ name: 'S1.svs', reason: { error: 'NameTooLong' } });
  });

  it.each(['', 'name', '{case_id', 'case_id}', 'a/{case_id}', '{}', '{a{b}}'])(
    'is not made from `%s`',
    (text) => {
      expect(() => parseNameTemplate(text)).toThrow(NameTemplateInvalid);
    },
  );

  it('whatever the fields hold, is a name that S3 and file systems take', () => {
    fc.assert(
      fc.property(
        fc.string({ unit: 'binary' }),
        fc.string({ unit: 'binary', minLength: 1 }),
        (caseId, slideId) => {
          const { name: made, fallback } = canonicalName(
            parseNameTemplate(DEFAULT),
            { case_id: caseId, slide_id: slideId },
            'x.svs',
            slideId,
          );
          for (const each of [made, fallback, markedName(slideId, 'x.svs', 'content')]) {
            expect(each).toMatch(/^[\p{L}\p{M}\p{N}._()+=,@-]+\.svs$/u);
            expect(each).not.toMatch(/^\.|\.\./);
            expect(Buffer.byteLength(each)).toBeLessThanOrEqual(200);
            expect(each.isWellFormed()).toBe(true);
          }
        },
      ),
    );
  });

  it('two ids never share the safe name', () => {
    const safe = (slideId: string) => name(DEFAULT, {}, 'x.svs', slideId).fallback;
    expect(new Set(['S 1', 'S-1', 'S:1', `${'x'.repeat(300)}1`, `${'x'.repeat(300)}2`].map(safe)).size).toBe(
      5,
    );
  });
});
