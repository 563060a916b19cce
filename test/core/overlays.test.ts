/** Heatmaps onto the images of a Concentriq on loopback. */
import { QueryCommand } from '@aws-sdk/lib-dynamodb';
import { decode, encode } from 'fast-png';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { Concentriq } from '../../core/concentriq.ts';
import type {
  HeatmapGeometry,
  OverlayProgress,
  PlannedSlide,
  ResultSummary,
  RunContext,
} from '../../core/contracts.ts';
import { overlaysKey, resultPrefix, slidesKey } from '../../core/keys.ts';
import { pushOverlays, slideOnly } from '../../core/overlays.ts';
import { readJson, writeLines, writeObject } from '../../core/store.ts';
import { type LocalConcentriq, startConcentriq } from '../../local/concentriq/server.ts';
import { MODEL, plannedSlide, RUN } from '../support/results.ts';
import { type Services, startServices } from '../support/services.ts';

const GEOMETRY: HeatmapGeometry = {
  output: 'haematoxylin_area',
  colormap: 'inferno',
  range: { min: 0, max: 1, of: 'unit' },
  origin: { x: 0, y: 0 },
  level0PerPixel: 32,
  micronsPerPixel: { x: 16, y: 16 },
  area: { width: 3, height: 2 },
  picture: { width: 5, height: 4 },
};
/** Red where the slide is, white in the legend around it. */
function heatmap(shade = 255): Uint8Array {
  const data = new Uint8Array(5 * 4 * 4).fill(255);
  for (const [x, y] of [0, 1, 2].flatMap((x) => [0, 1].map((y) => [x, y] as const))) {
    data.set([shade, 0, 0, 128], (y * 5 + x) * 4);
  }
  return encode({ width: 5, height: 4, data, channels: 4, depth: 8 });
}

let services: Services;
let server: LocalConcentriq;
beforeEach(async () => {
  services = await startServices();
  const images = Array.from({ length: 40 }, (_, i) => ({ id: i + 1, name: `s${i + 1}` }));
  server = await startConcentriq({ apiKeys: ['key'], repositories: [{ id: 7, name: 'R', images }] });
});
afterEach(async () => {
  await server.close();
  await services.close();
});

const push = (run: RunContext = RUN, remaining = () => 900_000) =>
  pushOverlays(run, {
    ...services,
    remaining,
    now: () => new Date(),
    catalogue: new Concentriq({
      url: server.url,
      credentials: async () => ({ apiKey: 'key' }),
      keep: [],
      limits: { backOffSeconds: 0.001 },
    }),
  });
const progress = async (run = RUN) =>
  (await readJson(services.s3, { bucket: services.silver, key: overlaysKey(run.runId) })) as OverlayProgress;

/** A run whose slides `s1`, `s2`, … are images 1, 2, … of the catalogue, all aggregated. */
async function aggregated(
  count: number,
  run: RunContext = RUN,
  change: Partial<PlannedSlide> = {},
): Promise<void> {
  const slides = Array.from({ length: count }, (_, i) =>
    plannedSlide(`s${i + 1}`, {
      line: i + 2,
      catalogue: { known: true, repositoryId: '7', imageId: String(i + 1) },
      ...change,
    }),
  );
  await writeLines(services.s3, { bucket: services.silver, key: slidesKey(run.runId) }, slides);
  for (const { slideId } of slides) await finish(slideId, run);
}

async function finish(slideId: string, run: RunContext): Promise<void> {
  const prefix = resultPrefix(run.runId, slideId, MODEL.name);
  const result: ResultSummary = {
    model: MODEL.name,
    version: MODEL.version,
    key: `${prefix}result.json`,
    tiles: { kept: 1, ok: 1, unreadable: 0 },
    tissueMm2: 1,
    outputs: {},
    heatmap: GEOMETRY,
  };
  await writeObject(
    services.s3,
    { bucket: services.silver, key: `${prefix}heatmap.png` },
    heatmap(),
    'image/png',
  );
  await services.state.transition(run.runId, slideId, 'AGGREGATED', { slide: slideId, results: [result] });
}

async function actions(pk: string): Promise<unknown[]> {
  const { Items = [] } = await services.documents.send(
    new QueryCommand({
      TableName: 'lineage',
      KeyConditionExpression: 'pk = :pk',
      ExpressionAttributeValues: { ':pk': pk },
    }),
  );
  return Items.map(({ action }) => action);
}

describe('the heatmaps of a run', () => {
  it('lie on their images as overlays, without the legend, and it is on record', async () => {
    await aggregated(2);
    expect(await push()).toEqual({ done: true });
    expect(server.overlays.map(({ imageId }) => imageId).sort()).toEqual([1, 2]);
    const [overlay] = server.overlays;
    expect(overlay?.name).toBe(`haematoxylin_area (${MODEL.name} 1.0.0, ${RUN.runId})`);
    const picture = decode(overlay?.png ?? Buffer.alloc(0));
    expect([picture.width, picture.height]).toEqual([3, 2]);
    expect(new Set(Array.from({ length: 6 }, (_, i) => picture.data.slice(i * 4, i * 4 + 4).join()))).toEqual(
      new Set(['255,0,0,128']),
    );
    expect(await progress()).toMatchObject({ done: true, counts: { pushed: 2, present: 0, failed: 0 } });
    expect(await actions('SLIDE#s1')).toEqual(['OVERLAY_PUSHED']);
    expect(await actions(`RUN#${RUN.runId}`)).toEqual(['OVERLAYS_PUSHED']);
  });

  it('are not put there twice: not by a repeated call, not by another run with the same result', async () => {
    await aggregated(2);
    await push();
    const requests = { ...server.counts };
    await push();
    expect(server.counts).toEqual(requests);
    const again = { ...RUN, runId: 'colon-2026-again' };
    await aggregated(2, again);
    await push(again);
    expect(await progress(again)).toMatchObject({ counts: { pushed: 0, present: 2, failed: 0 } });
    expect(server.overlays).toHaveLength(2);
    expect(await actions('SLIDE#s1')).toEqual(['OVERLAY_PUSHED']);
  });

  it('are left out for slides that the catalogue does not know, or that have no result', async () => {
    await aggregated(1, RUN, { catalogue: { known: false } });
    await push();
    expect(server.counts).toEqual({});
    expect(await progress()).toMatchObject({ done: true, counts: { pushed: 0 } });
  });

  it('go on where the time of a call was over', async () => {
    await aggregated(20);
    const times = [900_000, 900_000, 200_000];
    expect(await push(RUN, () => times.shift() ?? 0)).toEqual({ done: false });
    expect(await progress()).toMatchObject({ done: false, counts: { pushed: 16 }, line: 17 });
    expect(await push()).toEqual({ done: true });
    expect(server.overlays).toHaveLength(20);
    expect(await progress()).toMatchObject({ done: true, counts: { pushed: 20, present: 0 } });
  });

  it('that were broken off after the overlay was made use the one that is there', async () => {
    await aggregated(1);
    server.fault = ({ path }) => (path.startsWith('/storage/') ? { status: 500 } : undefined);
    await push();
    expect(await progress()).toMatchObject({ counts: { failed: 1 }, failures: [{ slideId: 's1' }] });
    server.fault = undefined;
    const again = { ...RUN, runId: 'colon-2026-again' };
    await aggregated(1, again);
    await push(again);
    expect(server.overlays).toHaveLength(1);
    expect(server.overlays[0]?.png).toBeDefined();
  });

  it('fail for their own slide alone, with the reason on record', async () => {
    await aggregated(3);
    server.fault = ({ path }) => (path === '/api/images/2/overlays' ? { status: 400 } : undefined);
    expect(await push()).toEqual({ done: true });
    expect(await progress()).toMatchObject({
      counts: { pushed: 2, failed: 1 },
      failures: [{ slideId: 's2', model: MODEL.name, reason: { error: 'CatalogueInvalid' } }],
    });
    expect(await actions('SLIDE#s2')).toEqual([]);
  });

  it('are given up when the catalogue fails again and again, and the call still ends well', async () => {
    await aggregated(40);
    server.fault = () => 'cut';
    expect(await push()).toEqual({ done: true });
    expect(await progress()).toMatchObject({ done: true, counts: { failed: 8 }, line: 9 });
    expect((await progress()).reason?.error).toBe('CatalogueUnavailable');
    expect(await actions(`RUN#${RUN.runId}`)).toEqual(['OVERLAYS_PUSHED']);
  });

  it('get another signed address when the first has expired', async () => {
    await aggregated(1);
    let once = true;
    server.fault = ({ path }) => {
      if (!path.startsWith('/storage/') || !once) return undefined;
      once = false;
      return { status: 403, body: '<Error><Code>AccessDenied</Code></Error>' };
    };
    await push();
    expect(await progress()).toMatchObject({ counts: { pushed: 1, failed: 0 } });
    expect(server.counts['GET /api/sign_s3_overlay/<id>']).toBe(2);
  });
});

it('a picture that is all slide stays as it is', () => {
  const png = heatmap();
  expect(slideOnly(png, { ...GEOMETRY, area: GEOMETRY.picture })).toBe(png);
});
