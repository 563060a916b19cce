/** What the catalogue says, and does not say, in the plan of a run. */
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { askCatalogue, type CatalogueSource, squareMpp } from '../../core/catalogue.ts';
import { Concentriq } from '../../core/concentriq.ts';
import type { CatalogueSummary, PlannedSlide } from '../../core/contracts.ts';
import { CatalogueMisconfigured } from '../../core/errors.ts';
import { LandingListing } from '../../core/landing.ts';
import { parseManifest } from '../../core/manifest.ts';
import { planSlides, resolveModels } from '../../core/plan.ts';
import { type LocalConcentriq, startConcentriq } from '../../local/concentriq/server.ts';
import { MODEL, planned, RUN } from '../support/results.ts';

const MANIFEST = `slide,repository_id,image_id,mpp,stain
a.svs,7,,,
b.svs,,2,0.9,p53
flat.svs,7,,,
flat-but-told.svs,7,,0.5,
nothing.svs,7,,,
alone.svs,,,,
../outside.svs,7,,,
`;

let server: LocalConcentriq;
beforeEach(async () => {
  server = await startConcentriq({
    apiKeys: ['key'],
    repositories: [
      {
        id: 7,
        name: 'Colon',
        images: [
          { id: 1, name: 'a.svs', mppx: 0.25, mppy: 0.2501 },
          { id: 2, name: 'b.svs', mppx: 0.25, mppy: 0.25 },
          { id: 3, name: 'flat.svs', mppx: 0.25, mppy: 0.5 },
          { id: 4, name: 'flat-but-told.svs', mppx: 0.25, mppy: 0.5 },
        ],
        metadata: [
          ['Image ID', 'Patient', 'Stain'],
          ['1', 'Meier', 'H&E'],
          ['2', 'Huber', 'Ki-67'],
        ],
      },
    ],
  });
});
afterEach(() => server.close());

const source = (required = false, credentials = async () => ({ apiKey: 'key' })): CatalogueSource => ({
  catalogue: new Concentriq({
    url: server.url,
    credentials,
    keep: ['stain'],
    limits: { backOffSeconds: 0.001 },
  }),
  required,
});

async function plan(
  catalogue: CatalogueSource | undefined,
): Promise<{ slides: PlannedSlide[]; summary: CatalogueSummary | undefined }> {
  const rows = parseManifest(Buffer.from(MANIFEST));
  const objects = rows.map(({ slide }) => ({ path: slide, size: 1, etag: '"e"' }));
  const models = await resolveModels(rows, RUN, async () => planned(MODEL));
  const { found, summary } = await askCatalogue(rows, catalogue);
  return {
    slides: planSlides(rows, RUN, new LandingListing('landing', 'study', objects), models, found),
    summary,
  };
}

describe('a plan with a catalogue', () => {
  it('takes the pixel size, the ids and the fields kept from it; the manifest wins', async () => {
    const { slides } = await plan(source());
    expect(slides[0]).toMatchObject({
      state: 'EXPECTED',
      mpp: 0.25,
      mppSource: 'catalogue',
      metadata: { stain: 'H&E', repository_id: '7' },
      catalogue: { known: true, repositoryId: '7', imageId: '1' },
    });
    expect(slides[1]).toMatchObject({
      mpp: 0.9,
      mppSource: 'manifest',
      metadata: { stain: 'p53' },
      catalogue: { known: true, repositoryId: '7', imageId: '2' },
    });
    expect(JSON.stringify(slides)).not.toMatch(/Meier|Huber/);
  });

  it('quarantines a slide whose pixels it says are not square, unless the manifest knows better', async () => {
    const { slides } = await plan(source());
    expect(slides[2]).toMatchObject({ state: 'QUARANTINED', reason: { error: 'MppNotSquare' } });
    expect(slides[2]?.reason?.message).toContain('0.25 × 0.5');
    expect(slides[3]).toMatchObject({ state: 'EXPECTED', mpp: 0.5, mppSource: 'manifest' });
    expect(squareMpp({ x: 0.25, y: 0.2525 })).toEqual({ mpp: 0.25 });
    expect(squareMpp({ x: 0.25, y: 0.2526 })).toHaveProperty('reason');
  });

  it('goes on with what the manifest says where the catalogue does not know a slide, and records it', async () => {
    const { slides, summary } = await plan(source(true));
    expect(
      slides.slice(4).map(({ state, catalogue }) => [state, catalogue?.known, catalogue?.reason?.error]),
    ).toEqual([
      ['EXPECTED', false, 'CatalogueImageUnknown'],
      ['EXPECTED', false, 'CatalogueNotAsked'],
      ['QUARANTINED', undefined, undefined],
    ]);
    expect(slides[4]).not.toHaveProperty('mpp');
    expect(summary).toEqual({
      kind: 'concentriq',
      asked: 5,
      known: 4,
      reasons: { CatalogueImageUnknown: 1, CatalogueNotAsked: 1 },
    });
  });

  it('goes on without one that cannot be reached, with a warning on every slide it was asked for', async () => {
    server.fault = () => ({ status: 502 });
    const { slides, summary } = await plan(source());
    expect(slides.filter(({ state }) => state === 'EXPECTED')).toHaveLength(6);
    expect(slides[0]?.catalogue).toEqual({
      known: false,
      reason: { error: 'CatalogueUnavailable', message: 'GET /api/images: answered 502, 6 times.' },
    });
    expect(slides[0]).not.toHaveProperty('mppSource');
    expect(summary).toMatchObject({ known: 0, warning: { error: 'CatalogueUnavailable' } });
  });

  it('fails where the stage demands one that cannot be reached', async () => {
    server.fault = () => ({ status: 502 });
    await expect(plan(source(true))).rejects.toThrow('GET /api/images: answered 502');
    const noSecret = () => Promise.reject(new CatalogueMisconfigured('no secret'));
    await expect(plan(source(true, noSecret))).rejects.toThrow(CatalogueMisconfigured);
    expect((await plan(source(false, noSecret))).summary?.warning?.error).toBe('CatalogueMisconfigured');
  });
});

it('a plan without a catalogue has no word of it', async () => {
  const { slides, summary } = await plan(undefined);
  expect(summary).toBeUndefined();
  for (const slide of slides) expect(slide).not.toHaveProperty('catalogue');
});
