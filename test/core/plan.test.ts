import { describe, expect, it } from 'vitest';
import { modelSchema, type RunContext } from '../../core/contracts.ts';
import { ModelNotFound, TooManyModels } from '../../core/errors.ts';
import { LandingListing } from '../../core/landing.ts';
import { parseManifest } from '../../core/manifest.ts';
import { planSlides, resolveModels, slideIdOf } from '../../core/plan.ts';
import { MODEL, RUN } from '../support/results.ts';

const run: RunContext = { ...RUN, study: 'study', defaultModel: MODEL.name };
const resolved = {
  bucket: 'models',
  key: 'k',
  name: MODEL.name,
  version: MODEL.version,
  digest: 'sha256:0',
  model: MODEL,
};

async function plan(manifest: string, files: Record<string, number>, resolve = async () => resolved) {
  const rows = parseManifest(Buffer.from(manifest));
  const listing = new LandingListing(
    'landing',
    'study',
    Object.entries(files).map(([path, size]) => ({ path, size, etag: `"${path}"` })),
  );
  return planSlides(rows, run, listing, await resolveModels(rows, run, resolve));
}

const states = (slides: Awaited<ReturnType<typeof plan>>) =>
  slides.map(({ state, reason }) => (reason ? `${state} ${reason.error}` : state));

describe('the plan of a run', () => {
  it('pins the source and names the target of a slide that is there', async () => {
    const [slide] = await plan('slide,slide_id,mpp\na/x.svs,S1,0.25\n', { 'a/x.svs': 7 });
    expect(slide).toEqual({
      line: 2,
      slideId: 'S1',
      slide: 'a/x.svs',
      state: 'EXPECTED',
      mpp: 0.25,
      mppSource: 'manifest',
      source: { bucket: 'landing', kind: 'file', key: 'study/a/x.svs', files: 1, size: 7, etag: '"a/x.svs"' },
      target: { prefix: 'slides/study/S1/', name: 'S1.svs', fallback: 'S1.svs' },
      models: [MODEL.name],
      metadata: {},
    });
  });

  it('decides every row for itself', async () => {
    const slides = await plan(
      'slide,slide_id\nx.svs,\nx.svs,\ngone.svs,\n../y.svs,\nempty.svs,\nX.SVS,\nb/x.svs,\np.svs,one\nq.svs,one\nfolder,\n',
      { 'x.svs': 1, 'b/x.svs': 1, 'empty.svs': 0, 'p.svs': 1, 'q.svs': 1, 'folder/readme.txt': 1 },
    );
    expect(states(slides)).toEqual([
      'EXPECTED',
      'DUPLICATE SlideDuplicate',
      'MISSING SlideMissing',
      'QUARANTINED PathOutsideStudy',
      'QUARANTINED SlideEmpty',
      'MISSING SlideMissing',
      'EXPECTED',
      'QUARANTINED SlideIdAmbiguous',
      'QUARANTINED SlideIdAmbiguous',
      'QUARANTINED SlideNotRecognised',
    ]);
    expect(slides[5]?.reason?.message).toContain('x.svs is');
  });

  it('never takes the base name alone for a slide id', () => {
    const a = slideIdOf('study', { slide: 'a/x.svs' });
    const b = slideIdOf('study', { slide: 'b/x.svs' });
    expect(a).toMatch(/^a-x-[0-9a-f]{8}$/);
    expect(a).not.toBe(b);
    expect(slideIdOf('other', { slide: 'a/x.svs' })).not.toBe(a);
  });

  it('takes a slide of several files as one', async () => {
    const slides = await plan('slide\nx.mrxs\nseries\ny.vsi\nalone.mrxs\n', {
      'x.mrxs': 1,
      'x/Data0001.dat': 10,
      'x/sub/Index.dat': 10,
      'series/1.dcm': 5,
      'series/2.dcm': 6,
      'y.vsi': 1,
      '_y_/stack1/frame.ets': 3,
      'alone.mrxs': 1,
    });
    expect(
      slides.map(
        ({ source }) => source && [source.kind, source.key, source.folder, source.files, source.size],
      ),
    ).toEqual([
      ['mrxs', 'study/x.mrxs', 'study/x/', 3, 21],
      ['dicom', 'study/series/', 'study/series/', 2, 11],
      ['vsi', 'study/y.vsi', 'study/_y_/', 2, 4],
      undefined,
    ]);
    expect(slides[3]?.reason?.error).toBe('SlideIncomplete');
  });
});

describe('the models of a run', () => {
  const manifest = 'slide,model\nx.svs,\ny.svs,other\nz.svs,stain@1.0.0|stain@2.0.0\n';
  const files = { 'x.svs': 1, 'y.svs': 1, 'z.svs': 1 };

  it('a model that is not there costs its own slides only', async () => {
    const slides = await plan(manifest, files, (async (wanted: string) => {
      if (wanted === 'other') throw new ModelNotFound('No model `other`');
      const [name = '', version = '1.0.0'] = wanted.split('@');
      return { ...resolved, name, version, model: modelSchema.parse({ ...MODEL, name, version }) };
    }) as never);
    expect(states(slides)).toEqual(['EXPECTED', 'FAILED ModelNotFound', 'FAILED ModelVersionConflict']);
  });

  it('an error of S3 is not taken for a missing model', async () => {
    await expect(plan(manifest, files, () => Promise.reject(new TypeError('socket')))).rejects.toThrow(
      'socket',
    );
  });

  it('are at most 20', async () => {
    const many = Array.from({ length: 21 }, (_, i) => `m${i}`).join('|');
    await expect(plan(`slide,model\nx.svs,${many}\n`, files)).rejects.toThrow(TooManyModels);
  });
});
