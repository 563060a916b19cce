/**
 * PushOverlays: a run's heatmaps onto the images of the catalogue, after the run is published. It works through the
 * plan a few slides at a time, keeps how far it has come in Silver, and stops in time for the state machine to call
 * it again: so a hundred thousand slides take as many calls as they need, and a call that was cut off goes on.
 * Nothing that goes wrong here fails the run; it is put on record.
 */
import type { S3Client } from '@aws-sdk/client-s3';
import { decode, encode } from 'fast-png';
import { type Catalogue, isCatalogueFailure } from './catalogue.ts';
import { forEachConcurrently } from './concurrency.ts';
import type {
  HeatmapGeometry,
  OverlayItem,
  OverlayProgress,
  PlannedSlide,
  Reason,
  ResultSummary,
  RunContext,
} from './contracts.ts';
import { CatalogueRefused, classify, reasonOf, SlidewayError } from './errors.ts';
import { overlaysKey, resultPrefix, slidesKey } from './keys.ts';
import { contentId, type Lineage } from './lineage.ts';
import type { StateTable } from './state.ts';
import { readJson, readLines, readVersion, sha256, writeJson } from './store.ts';

export interface OverlayDependencies {
  s3: S3Client;
  state: StateTable;
  lineage: Lineage;
  silver: string;
  catalogue: Catalogue;
  /** Milliseconds that are left for this call. */
  remaining(): number;
  now(): Date;
}

/** Slides worked on at a time, between two looks at the clock. */
const CHUNK = 8;
/** Slides are begun only with this much left, ms: every request may take its whole time, and a slide a few of them. */
const RESERVE = 300_000;
/** After so many failures of the catalogue itself in a row, the rest is not tried. */
const GIVE_UP = 8;
const MAX_FAILURES = 50;

/** Pushes as much as there is time for; `done` says whether anything is left. */
export async function pushOverlays(run: RunContext, deps: OverlayDependencies): Promise<{ done: boolean }> {
  const { s3, silver } = deps;
  const { runId } = run;
  const document = { bucket: silver, key: overlaysKey(runId) };
  const progress = ((await readJson(s3, document)) as OverlayProgress | undefined) ?? {
    runId,
    done: false,
    line: 0,
    counts: { pushed: 0, present: 0, failed: 0 },
    failures: [],
  };
  if (progress.done) return { done: true };
  const pusher = new Pusher(run, progress, deps);
  const lines = readLines<PlannedSlide>(s3, { bucket: silver, key: slidesKey(runId) });
  for await (const chunk of chunksOf(lines, progress)) {
    if (deps.remaining() < RESERVE) return { done: false };
    await forEachConcurrently(chunk, CHUNK, (slide) => pusher.push(slide));
    progress.line = chunk.at(-1)?.line ?? progress.line;
    await writeJson(s3, document, progress);
    if (progress.reason) break;
  }
  progress.done = true;
  const written = await writeJson(s3, document, progress);
  const { counts, reason } = progress;
  await deps.lineage.append(
    { runId },
    {
      id: `${runId}/overlays/${contentId([written])}`,
      runId,
      action: 'OVERLAYS_PUSHED',
      ...(reason && { reason: `${reason.error}: ${reason.message}` }),
      outputs: [written],
      parameters: { catalogue: deps.catalogue.host, ...counts },
    },
  );
  return { done: true };
}

/** The slides that have an image in the catalogue, from where the last call ended. */
async function* chunksOf(
  lines: AsyncIterable<PlannedSlide>,
  { line }: OverlayProgress,
): AsyncGenerator<PlannedSlide[]> {
  let chunk: PlannedSlide[] = [];
  for await (const slide of lines) {
    if (slide.line <= line || slide.state !== 'EXPECTED' || !slide.catalogue?.imageId) continue;
    chunk.push(slide);
    if (chunk.length < CHUNK) continue;
    yield chunk;
    chunk = [];
  }
  if (chunk.length > 0) yield chunk;
}

class Pusher {
  readonly #run: RunContext;
  readonly #progress: OverlayProgress;
  readonly #deps: OverlayDependencies;
  #failuresInARow = 0;

  constructor(run: RunContext, progress: OverlayProgress, deps: OverlayDependencies) {
    this.#run = run;
    this.#progress = progress;
    this.#deps = deps;
  }

  /** Every heatmap of a slide. */
  async push({ slideId, catalogue }: PlannedSlide): Promise<void> {
    const imageId = catalogue?.imageId;
    const item = await this.#deps.state.slide(this.#run.runId, slideId);
    if (imageId === undefined || item?.state !== 'AGGREGATED') return;
    for (const result of item.results ?? []) {
      // What the catalogue failed for the others it would fail for this one.
      if (!result.heatmap || this.#progress.reason) continue;
      const { counts, failures } = this.#progress;
      try {
        counts[await this.#pushHeatmap(slideId, imageId, result, result.heatmap)] += 1;
        this.#failuresInARow = 0;
      } catch (error) {
        // S3 or DynamoDB not answering is a matter for a retry of the whole call.
        if (!(error instanceof SlidewayError)) throw classify(error);
        const reason = reasonOf(error);
        counts.failed += 1;
        if (failures.length < MAX_FAILURES) failures.push({ slideId, model: result.model, reason });
        this.#failuresInARow = isCatalogueFailure(error) ? this.#failuresInARow + 1 : 0;
        if (this.#failuresInARow >= GIVE_UP) this.#progress.reason ??= reason;
      }
    }
  }

  async #pushHeatmap(
    slideId: string,
    imageId: string,
    { model, version }: ResultSummary,
    geometry: HeatmapGeometry,
  ): Promise<'pushed' | 'present'> {
    const { s3, state, lineage, silver, catalogue, now } = this.#deps;
    const { runId } = this.#run;
    const key = `${resultPrefix(runId, slideId, model)}heatmap.png`;
    const heatmap = await readVersion(s3, { bucket: silver, key });
    if (!heatmap) throw new HeatmapMissing(`${key} is not in Silver.`);
    const checksum = sha256(heatmap.bytes);
    const image = `${catalogue.host}/${imageId}`;
    const picture = `${model}#${version}#${checksum}`;
    const before = await state.overlay(image, picture);
    if (before?.state === 'PUSHED') return 'present';

    const record = (end: Pick<OverlayItem, 'state' | 'overlayId' | 'reason'>) =>
      state.putOverlay(image, picture, { ...end, runId, slideId, updatedAt: now().toISOString() });
    let overlayId = before?.overlayId;
    try {
      if (overlayId === undefined) {
        overlayId = await catalogue.createOverlay(imageId, overlayName(model, version, geometry, runId));
        await record({ state: 'CREATED', overlayId });
      }
      await this.#upload(overlayId, slideOnly(heatmap.bytes, geometry));
    } catch (error) {
      const reason: Reason = reasonOf(error);
      await record({ state: 'FAILED', ...(overlayId !== undefined && { overlayId }), reason });
      throw error;
    }
    await lineage.append(
      { slideId },
      {
        id: `${runId}/overlay/${model}/${overlayId}`,
        runId,
        action: 'OVERLAY_PUSHED',
        inputs: [{ bucket: silver, key, versionId: heatmap.versionId, checksum }],
        parameters: { catalogue: catalogue.host, imageId, overlayId, model, version },
      },
    );
    await record({ state: 'PUSHED', overlayId });
    return 'pushed';
  }

  /** A signed address may have expired before it was used; the next one is fresh. */
  async #upload(overlayId: string, png: Uint8Array): Promise<void> {
    const { catalogue } = this.#deps;
    try {
      await catalogue.uploadOverlay(overlayId, png);
    } catch (error) {
      if (!(error instanceof CatalogueRefused)) throw error;
      await catalogue.uploadOverlay(overlayId, png);
    }
  }
}

/** The result is on record, but its heatmap is not in Silver. */
class HeatmapMissing extends SlidewayError {}

/** As people see it in the catalogue's list of overlays. */
const overlayName = (model: string, version: string, { output }: HeatmapGeometry, runId: string) =>
  `${output} (${model} ${version}, ${runId})`;

/** The catalogue stretches an overlay over the whole image, so that only the slide's part may be in it. */
export function slideOnly(png: Uint8Array, { area, picture }: HeatmapGeometry): Uint8Array {
  if (area.width === picture.width && area.height === picture.height) return png;
  const { data, width, channels } = decode(png);
  const cut = new Uint8Array(area.width * area.height * channels);
  for (let y = 0; y < area.height; y++) {
    const start = y * width * channels;
    cut.set(data.subarray(start, start + area.width * channels), y * area.width * channels);
  }
  return encode({ ...area, data: cut, channels, depth: 8 });
}
