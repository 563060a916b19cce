/** Example results, made in code: tiles of a slide, the files the container leaves, the plan of a run. */
import { parquetWriteBuffer } from 'hyparquet-writer';

import {
  type Completion,
  type InferenceSlide,
  type Model,
  modelSchema,
  outputNames,
  type Plan,
  type PlannedSlide,
  type RunContext,
} from '../../core/contracts.ts';
import { planKey, resultPrefix, slidesKey } from '../../core/keys.ts';
import { sha256, writeJson, writeLines, writeObject } from '../../core/store.ts';
import { tileColumn } from '../../core/tiles.ts';
import type { Services } from './services.ts';

export const RUN: RunContext = {
  runId: 'colon-2026-0123456789ab',
  study: 'Colon 2026',
  manifest: { bucket: 'landing', key: 'Colon 2026/repo.csv', versionId: 'v1', etag: 'e1' },
  defaultModel: 'haematoxylin-area',
  parameters: { tissueMinFraction: 0.5, mppTolerance: 0.02 },
  startedAt: '2026-11-12T08:00:00.000Z',
};

export const MODEL: Model = modelSchema.parse({
  name: 'haematoxylin-area',
  version: '1.0.0',
  license: 'Apache-2.0',
  task: 'regression',
  outputs: ['haematoxylin_area'],
  tile: { px: 256, mpp: 0.5 },
  input: { mean: [0, 0, 0], std: [1, 1, 1] },
  mode: 'processing',
  aggregate: ['mean', 'p90', 'top_k_mean'],
  heatmap: { output: 'haematoxylin_area' },
});

export const CLASSIFIER: Model = modelSchema.parse({
  ...MODEL,
  name: 'three-tissues',
  version: '2.1.0',
  task: 'classification',
  outputs: ['stroma', 'epithelium', 'fat'],
  aggregate: ['mean'],
  heatmap: { output: 'epithelium', colormap: 'viridis' },
});

/** Features of which a head with attention makes an answer for the slide. */
export const EMBEDDER: Model = modelSchema.parse({
  ...MODEL,
  name: 'features',
  task: 'embedding',
  outputs: [],
  dimensions: 3,
  aggregate: ['mean'],
  heatmap: undefined,
  head: { task: 'classification', outputs: ['benign', 'malignant'], attention: true },
});

export const planned = (model: Model): Plan['models'][number] => ({
  bucket: 'models',
  key: `models/${model.name}/${model.version}/model.tar.gz`,
  name: model.name,
  version: model.version,
  digest: `sha256:${'ab'.repeat(32)}`,
  model,
});

export interface ExampleTile {
  minx: number;
  miny: number;
  side: number;
  /** Values in the order of the model's outputs; none for a tile that could not be read. */
  values?: number[];
  attention?: number;
}

/** Tiles in rows from (0, 0), valued by `value(x, y)` in shares of the grid. */
export function tileGrid(
  across: number,
  down: number,
  side: number,
  value: (x: number, y: number) => number[] | undefined,
): ExampleTile[] {
  return Array.from({ length: across * down }, (_, i) => {
    const [column, row] = [i % across, Math.floor(i / across)];
    const values = value(column / across, row / down);
    return { minx: column * side, miny: row * side, side, ...(values && { values }) };
  });
}

export function tilesParquet(
  model: Pick<Model, 'task' | 'outputs' | 'dimensions' | 'head'>,
  tiles: ExampleTile[],
  metadata: Record<string, string>,
): Uint8Array {
  const int32 = (name: string, of: (tile: ExampleTile) => number) => ({
    name,
    data: Int32Array.from(tiles, of),
    type: 'INT32' as const,
    nullable: false,
  });
  const float = (name: string, of: (tile: ExampleTile) => number) => ({
    name,
    data: Float32Array.from(tiles, of),
    type: 'FLOAT' as const,
    nullable: false,
  });
  return new Uint8Array(
    parquetWriteBuffer({
      columnData: [
        int32('minx', ({ minx }) => minx),
        int32('miny', ({ miny }) => miny),
        int32('width', ({ side }) => side),
        int32('height', ({ side }) => side),
        float('mpp', () => 0.5),
        float('tissue_fraction', () => 1),
        {
          name: 'status',
          data: tiles.map(({ values }) => (values ? 'ok' : 'unreadable')),
          type: 'STRING',
          nullable: false,
        },
        ...outputNames(model).map((output, o) =>
          float(tileColumn(model.task, output), ({ values }) => values?.[o] ?? Number.NaN),
        ),
        ...(model.head?.attention ? [float('attention', ({ attention = Number.NaN }) => attention)] : []),
      ],
      rowGroupSize: 1000,
      kvMetadata: Object.entries(metadata).map(([key, value]) => ({ key, value })),
    }),
  );
}

export const inferenceSlide = (slideId: string, models = [MODEL.name]): InferenceSlide => ({
  slideId,
  slide: `scans/${slideId}.svs`,
  line: 2,
  checksum: `crc64nvme:${slideId}`,
  models,
});

/** Leaves in Silver what the container leaves for a slide that went well; `change` spoils the marker. */
export async function writeAnswer(
  { s3, silver }: Pick<Services, 's3' | 'silver'>,
  slideId: string,
  model: Model,
  tiles: ExampleTile[],
  change: Partial<Completion> = {},
): Promise<void> {
  const { digest } = planned(model);
  const prefix = resultPrefix(RUN.runId, slideId, model.name);
  const parquet = tilesParquet(model, tiles, {
    slideId,
    slideChecksum: `crc64nvme:${slideId}`,
    modelDigest: digest,
  });
  const ok = tiles.filter(({ values }) => values).length;
  const marker: Completion = {
    runId: RUN.runId,
    slideId,
    state: 'INFERRED',
    checksum: `crc64nvme:${slideId}`,
    model: { name: model.name, version: model.version, digest },
    parameters: RUN.parameters,
    codeVersion: '0.1.0',
    jobName: 'job-1',
    completedAt: '2026-11-12T08:30:00Z',
    slide: {
      width: 2220,
      height: 2967,
      mppX: 0.499,
      mppY: 0.499,
      mppSource: 'file',
      levels: 1,
      vendor: 'aperio',
      reader: 'openslide',
    },
    tile: { px: 256, mpp: 0.5, overlap: 0, footprintX: 256.5, footprintY: 256.5, level: 0 },
    tiles: { grid: tiles.length, kept: tiles.length, ok, unreadable: tiles.length - ok },
    tissue: { areaMm2: 1.25, mpp: 8 },
    outputs: { 'tiles.parquet': { sha256: sha256(parquet), bytes: parquet.byteLength } },
    timings: { open: 0.1, infer: 2.5 },
    requests: { get: 10, put: 4 },
    device: 'cpu',
    ...change,
  };
  await writeObject(
    s3,
    { bucket: silver, key: `${prefix}tiles.parquet` },
    parquet,
    'application/octet-stream',
  );
  await writeJson(s3, { bucket: silver, key: `${prefix}complete.json` }, marker);
}

export const plannedSlide = (slideId: string, change: Partial<PlannedSlide> = {}): PlannedSlide => ({
  line: 2,
  slideId,
  slide: `scans/${slideId}.svs`,
  state: 'EXPECTED',
  models: [MODEL.name],
  metadata: {},
  ...change,
});

export async function writePlan(
  { s3, silver }: Pick<Services, 's3' | 'silver'>,
  slides: PlannedSlide[],
  models = [MODEL],
): Promise<void> {
  const plan: Plan = { run: RUN, codeVersion: '0.1.0', models: models.map(planned), counts: {} };
  await writeJson(s3, { bucket: silver, key: planKey(RUN.runId) }, plan);
  await writeLines(s3, { bucket: silver, key: slidesKey(RUN.runId) }, slides);
}
