/** Where everything lies: the keys of Bronze, Silver and Models. The only place that spells them. */

export const bronzePrefix = (study: string, slideId: string) => `slides/${study}/${slideId}/`;

export const runPrefix = (runId: string) => `runs/${runId}/`;
export const planKey = (runId: string) => `${runPrefix(runId)}plan/plan.json`;
export const slidesKey = (runId: string) => `${runPrefix(runId)}plan/slides.jsonl`;
export const inferenceKey = (runId: string) => `${runPrefix(runId)}plan/inference.jsonl`;

export const jobPrefix = (runId: string, model: string) => `${runPrefix(runId)}jobs/${model}/`;
export const shardKey = (runId: string, model: string, shard: number) =>
  `${jobPrefix(runId, model)}shard-${String(shard).padStart(4, '0')}.json`;

/** Tilesets, shared by all runs; they expire. */
export const TILES_PREFIX = 'tiles/';
/** What goes into and comes out of a model's Transform jobs; it expires. */
const transformPrefix = (runId: string, model: string) => `transform/${runId}/${model}/`;
/** What tiling made of each slide of a run. */
export const tiledPrefix = (runId: string, model: string) => `${transformPrefix(runId, model)}tiled/`;
export const tiledKey = (runId: string, model: string, slideId: string) =>
  `${tiledPrefix(runId, model)}${slideId}.json`;
export const packsKey = (runId: string, model: string, attempt: number) =>
  `${transformPrefix(runId, model)}attempt-${attempt}/manifest.json`;
export const transformedPrefix = (runId: string, model: string) => `${transformPrefix(runId, model)}out/`;

export const slidesPrefix = (runId: string) => `${runPrefix(runId)}slides/`;
/** Folder of one model's answer for one slide: complete.json, tiles.parquet, tissue.geojson, thumbnail.jpg, result.json, heatmap.png. */
export const resultPrefix = (runId: string, slideId: string, model: string) =>
  `${slidesPrefix(runId)}${slideId}/${model}/`;

export const resultsCsvKey = (runId: string) => `${runPrefix(runId)}results.csv`;
export const runJsonKey = (runId: string) => `${runPrefix(runId)}run.json`;
export const reportPrefix = (runId: string) => `${runPrefix(runId)}report/`;
export const reportKey = (runId: string) => `${reportPrefix(runId)}index.html`;
/** The message that went out when the run ended; written once it is sent. */
export const messageKey = (runId: string) => `${runPrefix(runId)}message.json`;

/** How far the pushing of heatmaps to the catalogue has come. */
export const overlaysKey = (runId: string) => `${runPrefix(runId)}overlays.json`;

/** The manifest of a run that follows another; lies with the run that is followed. */
export const followUpKey = (of: string, kind: 'late' | 'replay', id: string) =>
  `${runPrefix(of)}follow-ups/${kind}-${id}/repo.csv`;

/** What a day's sweeps found. */
export const sweepKey = (date: string) => `sweeps/${date}.json`;

export const modelKey = (name: string, version: string) => `models/${name}/${version}/model.tar.gz`;
