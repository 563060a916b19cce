import { describe, expect, it } from 'vitest';
import { findSlides, makeManifest, withModel } from '../../cli/manifest.ts';
import { parseManifest } from '../../core/manifest.ts';

describe('A folder without a manifest', () => {
  it('is searched for what looks like a slide, also below it', () => {
    const files = ['notes.txt', 'a.svs', 'b.ome.tif', 'deep/c.NDPI', 'd.tiff', 'thumbs.db'];
    expect(findSlides(files)).toEqual(['a.svs', 'b.ome.tif', 'd.tiff', 'deep/c.NDPI']);
  });

  it('gives one slide for a folder of DICOM files, and none for DICOM files at the top', () => {
    expect(findSlides(['case/1.dcm', 'case/2.dcm', 'loose.dcm'])).toEqual(['case']);
  });

  it('does not take the parts of an MRXS or VSI slide for slides', () => {
    const files = ['a.mrxs', 'a/Data0001.dat', 'a/preview.tif', 'b.vsi', '_b_/stack1/frame_t.tif', 'c.tif'];
    expect(findSlides(files)).toEqual(['a.mrxs', 'b.vsi', 'c.tif']);
  });

  it('passes hidden files by, such as those that macOS leaves', () => {
    expect(findSlides(['._a.svs', '.cache/b.svs', 'a.svs'])).toEqual(['a.svs']);
  });

  it('gets a manifest that core reads, whatever the names hold', () => {
    const slides = ['a, b.svs', 'say "x".tif', 'ü.svs', 'deep/c.ndpi'];
    const rows = parseManifest(Buffer.from(makeManifest(slides)));
    expect(rows.map(({ slide }) => slide)).toEqual(slides);
    expect(rows.every(({ reason }) => reason === undefined)).toBe(true);
  });
});

describe('--model', () => {
  const conveyed = (text: string) => {
    const { bytes, set, kept } = withModel(Buffer.from(text), 'm@1.0.0');
    return { text: bytes.toString('utf8'), set, kept };
  };

  it('adds a column where there is none, line for line', () => {
    expect(conveyed('slide,stain\na.svs,HE\nb.svs,\n')).toEqual({
      text: 'slide,stain,model\na.svs,HE,m@1.0.0\nb.svs,,m@1.0.0\n',
      set: 2,
      kept: 0,
    });
  });

  it('fills rows that name no model and leaves those that do', () => {
    expect(conveyed('slide,model,stain\na.svs,,HE\nb.svs,own,HE\n')).toEqual({
      text: 'slide,model,stain\na.svs,m@1.0.0,HE\nb.svs,own,HE\n',
      set: 1,
      kept: 1,
    });
  });

  it('keeps byte-order mark, semicolons, CRLF and a missing last line end', () => {
    expect(conveyed('\uFEFFslide;mpp\r\na.svs;0,5\r\nb.svs;0,25').text).toBe(
      '\uFEFFslide;mpp;model\r\na.svs;0,5;m@1.0.0\r\nb.svs;0,25;m@1.0.0',
    );
  });

  it('keeps quoted fields with delimiters and line breaks, and blank lines', () => {
    const text = 'slide,note\n\n"a, b.svs","two\nlines"\n\nc.svs,\n';
    const { text: written, set } = conveyed(text);
    expect(written).toBe('slide,note,model\n\n"a, b.svs","two\nlines",m@1.0.0\n\nc.svs,,m@1.0.0\n');
    expect(set).toBe(2);
  });

  it('leaves every row on its line, with the model in it', () => {
    const text = 'slide,note,Model\n"a.svs","two\nlines",\n\nb.svs,,own\nc.svs,,\n';
    const before = parseManifest(Buffer.from(text));
    const after = parseManifest(withModel(Buffer.from(text), 'm').bytes);
    expect(after.map(({ line, slide, metadata }) => ({ line, slide, metadata }))).toEqual(
      before.map(({ line, slide, metadata }) => ({ line, slide, metadata })),
    );
    expect(after.map(({ models }) => models)).toEqual([['m'], ['own'], ['m']]);
  });

  it('does not make a row of the wrong length look right', () => {
    const text = 'slide,stain,model\na.svs,\nb.svs,HE,\n';
    const rows = parseManifest(withModel(Buffer.from(text), 'm').bytes);
    expect(rows.map(({ reason }) => reason?.error)).toEqual(['RowInvalid', undefined]);
  });
});
