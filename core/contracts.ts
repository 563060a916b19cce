/**
 * The documents that pass between the parts: what is written to S3 and to the state table, and the small
 * payloads of the state machine. One definition each, named as in the docs (docs/contracts.md).
 *
 * Documents that come from outside the TypeScript code (model packages, the container's completion markers)
 * have a schema that checks them; those that Slideway itself writes and reads have a type.
 */
import { z } from 'zod';

/** The states of a slide within a run, in the order in which they may follow, then those aside. */
export const SLIDE_STATES = [
  'EXPECTED',
  'COPYING',
  'INGESTED',
  'INFERRING',
  'INFERRED',
  'AGGREGATED',
  'MISSING',
  'DUPLICATE',
  'QUARANTINED',
  'FAILED',
] as const;
export const slideStateSchema = z.enum(SLIDE_STATES);
export type SlideState = z.infer<typeof slideStateSchema>;

export type RunState = 'RUNNING' | 'SUCCEEDED' | 'PARTIAL' | 'FAILED';

/** Why something did not succeed: `error` is a name the state machine and tests match, `message` says what to do. */
export const reasonSchema = z.object({ error: z.string(), message: z.string() });
export type Reason = z.infer<typeof reasonSchema>;

export interface ObjectRef {
  bucket: string;
  key: string;
  versionId?: string | undefined;
}

/** Parameters of the pipeline that shape results; recorded with every result. */
export const parametersSchema = z.object({
  /** A tile is kept when at least this share of it is tissue. */
  tissueMinFraction: z.number().min(0).max(1),
  /** A level whose µm/px is within this share of the model's is taken as it is, without resampling. */
  mppTolerance: z.number().min(0).max(0.5),
});
export type Parameters = z.infer<typeof parametersSchema>;

/** A manifest as it was: this version of it, these bytes. */
export const manifestRefSchema = z.object({
  bucket: z.string(),
  key: z.string(),
  versionId: z.string().optional(),
  etag: z.string(),
});

/** Why a run follows another: its slides came late, or somebody asked for it again. */
export const followUpKindSchema = z.enum(['late', 'replay']);
export type FollowUpKind = z.infer<typeof followUpKindSchema>;

/** What the state machine carries from state to state about the run. */
export const runContextSchema = z.object({
  runId: z.string(),
  study: z.string(),
  manifest: manifestRefSchema,
  /** Bucket in which the slides arrive, where that is not the manifest's. */
  landing: z.string().optional(),
  /** The run that this one follows. */
  followUp: z.object({ kind: followUpKindSchema, of: z.string() }).optional(),
  /** Models of slides whose row names none, separated by `|`. */
  defaultModel: z.string(),
  parameters: parametersSchema,
  /** ISO 8601, UTC. */
  startedAt: z.string(),
});
export type RunContext = z.infer<typeof runContextSchema>;

// --- model package -------------------------------------------------------------------------------------------

const name = z
  .string()
  .regex(/^[a-z0-9][a-z0-9-]{0,62}$/, 'lower-case letters, digits and hyphens, at most 63');
const version = z
  .string()
  .regex(/^[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}$/, 'letters, digits and . + _ -, at most 64');
const MAX_OUTPUTS = 8192;
const outputName = z.string().regex(/^[a-z][a-z0-9_]{0,62}$/, 'lower-case letters, digits and underscores');

/** What tiles come to; `p1` … `p99` are percentiles. */
export type Aggregate = 'mean' | 'median' | 'max' | 'top_k_mean' | `p${number}`;

/** Those that a slide result always has of a classification or regression. */
export const ALWAYS_AGGREGATED: readonly Aggregate[] = ['mean', 'median', 'p10', 'p90', 'max', 'top_k_mean'];

const AGGREGATE = /^(mean|median|max|top_k_mean|p[1-9][0-9]?)$/;
const aggregate = z.custom<Aggregate>(
  (value) => typeof value === 'string' && AGGREGATE.test(value),
  'mean, median, max, top_k_mean or a percentile from p1 to p99',
);

/** Both run the same package: whole slides in a Processing job, or tiles made beforehand in a Transform job. */
export const modeSchema = z.enum(['processing', 'transform']);
export type Mode = z.infer<typeof modeSchema>;

/** How tiles are stored for a Transform job. */
export const TILE_FORMATS = ['jpeg', 'png', 'raw'] as const;
const tileFormat = z.enum(TILE_FORMATS);
const quality = z.number().int().min(1).max(100);

/** What a batch may take, in seconds; a model that takes longer is stuck. An hour is the most that a request may. */
export const modelSecondsSchema = z.number().int().min(1).max(3590);

/** What a slide-level head brings into a package. */
const headSchema = z.object({
  /** TorchScript within the package. */
  file: z
    .string()
    .regex(/^[A-Za-z0-9][A-Za-z0-9_-]{0,62}\.pt$/, 'a file name that ends in .pt')
    .refine((file) => file !== 'model.pt', 'another file than the tile model')
    .default('head.pt'),
  task: z.enum(['classification', 'regression']),
  outputs: z.array(outputName).min(1).max(1024),
  /** It also answers with a weight for each tile. */
  attention: z.boolean().default(false),
});

/** `model.json` of a model package. What one field says of another is checked in core/models.ts. */
export const modelSchema = z.object({
  name,
  version,
  license: z.string().min(1),
  description: z.string().optional(),
  task: z.enum(['classification', 'regression', 'embedding']),
  /** Names of what the model answers; none where an embedding gives `dimensions`: see `outputNames`. */
  outputs: z.array(outputName).max(MAX_OUTPUTS).default([]),
  /** Of an embedding: how many numbers a tile becomes. */
  dimensions: z.number().int().min(1).max(MAX_OUTPUTS).optional(),
  tile: z.object({
    px: z.number().int().min(16).max(4096),
    mpp: z.number().positive().max(100),
    overlap: z.number().int().min(0).default(0),
    /** Default: the stage's. */
    encoding: z.object({ format: tileFormat.optional(), quality: quality.optional() }).optional(),
  }),
  input: z.object({
    mean: z.array(z.number()).length(3),
    std: z.array(z.number().positive()).length(3),
    layout: z.enum(['NCHW', 'NHWC']).default('NCHW'),
    range: z.tuple([z.number(), z.number()]).default([0, 1]),
  }),
  mode: modeSchema,
  batch: z.number().int().min(1).max(65536).default(64),
  /** Default: the stage's. */
  modelSeconds: modelSecondsSchema.optional(),
  aggregate: z.array(aggregate).min(1).default(['mean']),
  top_k: z.number().int().min(1).default(10),
  heatmap: z
    .object({
      output: outputName,
      colormap: z.enum(['inferno', 'viridis']).default('inferno'),
      /** Values of the lowest and the highest colour, so that slides can be compared by eye. */
      range: z
        .tuple([z.number(), z.number()])
        .refine(([min, max]) => min < max, 'the first must be below the second')
        .optional(),
    })
    .optional(),
  head: headSchema.optional(),
  /** Where the model asks for other Transform jobs than the stage's. */
  transform: z
    .object({
      instanceType: z
        .string()
        .regex(/^ml\.[a-z0-9-]+\.[a-z0-9]+$/, 'an instance type such as ml.g5.xlarge')
        .optional(),
      maxInstances: z.number().int().min(1).max(100).optional(),
      packsPerInstance: z.number().int().min(1).max(100_000).optional(),
      maxConcurrentTransforms: z.number().int().min(1).max(100).optional(),
      maxPayloadInMB: z.number().int().min(1).max(100).optional(),
      invocationTimeoutSeconds: z.number().int().min(1).max(3600).optional(),
    })
    .optional(),
});
export type Model = z.infer<typeof modelSchema>;

/** The names of what a model answers for a tile, in order: its `outputs`, or `f0000`, `f0001`, … of an embedding. */
export const outputNames = ({ outputs, dimensions = 0 }: Pick<Model, 'outputs' | 'dimensions'>): string[] =>
  outputs.length > 0
    ? outputs
    : Array.from({ length: dimensions }, (_, i) => `f${String(i).padStart(4, '0')}`);

/** The output of a head that says how much each tile weighs in its answer. */
export const ATTENTION = 'attention';

/** One model package, pinned: what a run says it used. `digest` is `sha256:<hex>` of model.tar.gz. */
export interface ModelRef extends ObjectRef {
  name: string;
  version: string;
  digest: string;
}

// --- ingestion --------------------------------------------------------------------------------------------------

/** One object in Bronze. `checksum` is S3's full-object `crc64nvme:<base64>`. */
export const bronzeFileSchema = z.object({
  key: z.string(),
  versionId: z.string().optional(),
  size: z.number().int(),
  checksum: z.string(),
});
export type BronzeFile = z.infer<typeof bronzeFileSchema>;

/** What ingestion leaves on record for a slide. */
export const bronzeSlideSchema = z.object({
  bucket: z.string(),
  /** The file that is opened, one of `files`. */
  key: z.string(),
  files: z.array(bronzeFileSchema),
  size: z.number().int(),
  /** The slide's checksum: that of its one file, or `sha256:<hex>` over `<name> <checksum>\n` of all, sorted. */
  checksum: z.string(),
});
export type BronzeSlide = z.infer<typeof bronzeSlideSchema>;

/** What happens to a slide whose content, or whose name with other content, is in Bronze already. */
export const duplicatePolicySchema = z.enum(['skip', 'replace', 'error']);
export type DuplicatePolicy = z.infer<typeof duplicatePolicySchema>;

/** A copy that one invocation had no time to finish: what the next one needs of it. */
export const continuationSchema = z.object({
  /** Invocations so far. */
  round: z.number().int(),
  /** The slide's files as the copy began, as one checksum. */
  content: z.string().optional(),
  /** Uploads under way, by key in Landing. */
  uploads: z.record(
    z.string(),
    z.object({ uploadId: z.string(), etag: z.string(), versionId: z.string().optional() }),
  ),
  requests: z.record(z.string(), z.number()),
});
export type Continuation = z.infer<typeof continuationSchema>;

/** How a slide came to its name in Bronze. */
export interface SlideName {
  name: string;
  /** The canonical name, where it has another. */
  wanted?: string;
  reason?: Reason;
}

// --- plan -----------------------------------------------------------------------------------------------------

/** How a slide's files belong together. */
export const SLIDE_KINDS = ['file', 'mrxs', 'dicom', 'vsi'] as const;

export const slideSourceSchema = z.object({
  bucket: z.string(),
  kind: z.enum(SLIDE_KINDS),
  /** The file that is opened; for `dicom` the folder, ending in `/`. */
  key: z.string(),
  /** The folder that belongs to the slide, ending in `/`; absent for `file`. */
  folder: z.string().optional(),
  /** Number of objects and their bytes. */
  files: z.number().int(),
  size: z.number().int(),
  /** ETag of `key` when planned; absent for `dicom`. */
  etag: z.string().optional(),
});
export type SlideSource = z.infer<typeof slideSourceSchema>;

/** What the catalogue was found to know of a slide. Ids are digits, as the catalogue's own. */
export const catalogueEntrySchema = z.object({
  known: z.boolean(),
  repositoryId: z.string().optional(),
  imageId: z.string().optional(),
  /** Why it is not known, or what of its entry could not be used; no names, no values. */
  reason: reasonSchema.optional(),
});
export type CatalogueEntry = z.infer<typeof catalogueEntrySchema>;

/** A line of `runs/<runId>/plan/slides.jsonl`: one per row of the manifest. */
export const plannedSlideSchema = z.object({
  /** Line of the manifest, the header being 1. */
  line: z.number().int(),
  slideId: z.string(),
  /** Path as the manifest has it, with forward slashes. */
  slide: z.string(),
  /** EXPECTED goes on; MISSING, DUPLICATE, QUARANTINED and FAILED are already decided. */
  state: slideStateSchema,
  reason: reasonSchema.optional(),
  source: slideSourceSchema.optional(),
  /** Where it goes in Bronze: `slides/<study>/<slideId>/` and the canonical name. */
  target: z
    .object({
      prefix: z.string(),
      name: z.string(),
      /** The safe name, where the canonical one cannot be had. */
      fallback: z.string().optional(),
      /** Why `name` is the safe name already. */
      reason: reasonSchema.optional(),
    })
    .optional(),
  /** µm per pixel from the manifest or the catalogue. */
  mpp: z.number().optional(),
  mppSource: z.enum(['manifest', 'catalogue']).optional(),
  /** Names of the models to run. */
  models: z.array(z.string()),
  /** The models as the row asks for them, `name` or `name@version`; absent where it names none. */
  wantedModels: z.array(z.string()).optional(),
  /** What an earlier run took in of the slide, where this run is to use that. */
  bronze: bronzeSlideSchema.optional(),
  /** Every further column of the manifest, and the fields kept from the catalogue; the manifest's own win. */
  metadata: z.record(z.string(), z.string()),
  /** Absent where the stage has no catalogue, or the row was not looked up. */
  catalogue: catalogueEntrySchema.optional(),
});
export type PlannedSlide = z.infer<typeof plannedSlideSchema>;

/** `runs/<runId>/plan/plan.json`: the head of the plan. */
export interface Plan {
  run: RunContext;
  codeVersion: string;
  models: (ModelRef & { model: Model })[];
  /** The version that each model asked for was found to be, by the text that asks: `name` → `name@version`. */
  versions?: Record<string, string>;
  counts: Partial<Record<SlideState, number>>;
  /** Absent where the stage has no catalogue. */
  catalogue?: CatalogueSummary;
}

/** What came of asking the catalogue for a run's slides. */
export interface CatalogueSummary {
  kind: 'concentriq';
  /** Slides asked for, and those of them it knows. */
  asked: number;
  known: number;
  /** How often each reason was given, by its error. */
  reasons: Record<string, number>;
  /** Why the run goes on without the catalogue. */
  warning?: Reason;
}

// --- jobs -----------------------------------------------------------------------------------------------------

/** `runs/<runId>/jobs/<model>/shard-0000.json`: what one instance works through. */
export interface Shard {
  runId: string;
  shard: number;
  shards: number;
  model: ModelRef;
  parameters: Parameters;
  codeVersion: string;
  /** The model's tiles, known before its package is opened. */
  tile: { px: number; mpp: number; overlap: number };
  /** Results go to `<prefix><slideId>/<model>/`. */
  output: { bucket: string; prefix: string };
  /** In transform mode: how tiles are stored, what became of each slide's, and where predictions for them come. */
  tiling?: Tiling;
  tiled?: { bucket: string; prefix: string };
  transformed?: { bucket: string; prefix: string };
  slides: ShardSlide[];
}

/** How the tiler stores tiles. A tileset of the same parameters and slide is made once, whatever the model. */
export interface Tiling {
  bucket: string;
  prefix: string;
  format: (typeof TILE_FORMATS)[number];
  quality: number;
  /** A pack's size at most. */
  packBytes: number;
  /** Each tile is also an object of its own. */
  objects: boolean;
  /** Days after which the bucket deletes tilesets. */
  keepDays: number;
}

export interface ShardSlide {
  slideId: string;
  slide: string;
  bronze: BronzeSlide;
  /** µm per pixel given by manifest or catalogue; overrides the file's. */
  mpp?: number;
  mppSource?: 'manifest' | 'catalogue';
}

/** What SageMaker jobs a run has: `process` alone in processing mode; the others follow each other in transform mode. */
export const JOB_KINDS = ['process', 'tile', 'transform', 'join'] as const;
export const jobKindSchema = z.enum(JOB_KINDS);
export type JobKind = z.infer<typeof jobKindSchema>;

/** The machines of a job. */
const instancesSchema = z.object({
  instanceCount: z.number().int(),
  instanceType: z.string(),
  volumeSizeInGB: z.number().int(),
});

/** How a model's Transform jobs are to be run; counts follow from the packs. */
export const transformSettingsSchema = z.object({
  instanceType: z.string(),
  maxInstances: z.number().int().min(1),
  /** An instance is added for every so many packs. */
  packsPerInstance: z.number().int().min(1),
  /** Requests at once; absent: by the instance's processors. */
  maxConcurrentTransforms: z.number().int().min(1).max(100).optional(),
  /** At least; a pack that is larger raises it. */
  maxPayloadInMB: z.number().int().min(1).max(100),
  /** At least; a model whose batches may take longer raises it. */
  invocationTimeoutSeconds: z.number().int().min(1).max(3600),
});
export type TransformSettings = z.infer<typeof transformSettingsSchema>;

/** One model's inference as the state machine carries it; small, because there is one per model. */
export const inferenceJobSchema = instancesSchema.extend({
  model: z.string(),
  version: z.string(),
  mode: modeSchema,
  /** The kind of job that comes first. */
  begin: jobKindSchema,
  /** Unique base of the jobs' names; kind and attempt are appended. */
  jobName: z.string(),
  shardsUri: z.string(),
  modelUri: z.string(),
  /** The package's version in its bucket. SageMaker takes no version of a model's data, so it is held against this. */
  modelVersionId: z.string().optional(),
  /** `sha256:<hex>` of the package at `modelUri`, for the record. */
  modelDigest: z.string().optional(),
  slides: z.number().int(),
  maxRuntimeInSeconds: z.number().int(),
  /** Absent in runs before there was such a setting. */
  modelSeconds: modelSecondsSchema.optional(),
  /** In transform mode; the jobs themselves are the tiling's. */
  join: instancesSchema.optional(),
  transform: transformSettingsSchema.optional(),
});
export type InferenceJob = z.infer<typeof inferenceJobSchema>;

/** A line of `runs/<runId>/plan/inference.jsonl`: one per slide that went into inference. */
export const inferenceSlideSchema = z.object({
  slideId: z.string(),
  slide: z.string(),
  line: z.number().int(),
  checksum: z.string(),
  models: z.array(z.string()),
});
export type InferenceSlide = z.infer<typeof inferenceSlideSchema>;

/** `complete.json`, written last by the container for each slide and model. */
export const completionSchema = z.object({
  runId: z.string(),
  slideId: z.string(),
  state: z.enum(['INFERRED', 'QUARANTINED', 'FAILED']),
  error: z.string().optional(),
  message: z.string().optional(),
  checksum: z.string(),
  model: z.object({ name: z.string(), version: z.string(), digest: z.string() }),
  parameters: z.record(z.string(), z.number()),
  codeVersion: z.string(),
  jobName: z.string(),
  completedAt: z.string(),
  /** How the tiles came to the model. */
  mode: modeSchema.optional(),
  /** In transform mode: what the tiles were read from. */
  tileset: z
    .object({
      id: z.string(),
      /** It was there before this run. */
      reused: z.boolean(),
      format: tileFormat,
      quality: quality.optional(),
    })
    .optional(),
  /** Present when the package brings a head and it had a tile to look at. */
  head: z
    .object({
      task: z.enum(['classification', 'regression']),
      outputs: z.record(z.string(), z.number()),
      /** Tiles that it looked at. */
      tiles: z.number().int(),
    })
    .optional(),
  /** Present when the slide could be opened. */
  slide: z
    .object({
      width: z.number().int(),
      height: z.number().int(),
      mppX: z.number(),
      mppY: z.number(),
      mppSource: z.enum(['manifest', 'catalogue', 'file']),
      levels: z.number().int(),
      vendor: z.string(),
      reader: z.string(),
    })
    .optional(),
  /** Present when INFERRED: the tile grid. Footprint in level-0 pixels; `mpp` is the true one. */
  tile: z
    .object({
      px: z.number().int(),
      mpp: z.number(),
      overlap: z.number().int(),
      footprintX: z.number(),
      footprintY: z.number(),
      level: z.number().int(),
    })
    .optional(),
  tiles: z
    .object({
      grid: z.number().int(),
      kept: z.number().int(),
      ok: z.number().int(),
      unreadable: z.number().int(),
    })
    .optional(),
  tissue: z
    .object({
      areaMm2: z.number(),
      mpp: z.number(),
      /** Of all that is dense on the slide, the share that was taken for pen marks and black borders. */
      inkFraction: z.number().optional(),
    })
    .optional(),
  /** File name to checksum and size of what stands beside this marker. */
  outputs: z.record(z.string(), z.object({ sha256: z.string(), bytes: z.number().int() })),
  /** Seconds, by stage. */
  timings: z.record(z.string(), z.number()),
  /** Shares of what each part of the pipeline needed by itself; they overlap, and the largest bounds. */
  bound: z.record(z.string(), z.number()).optional(),
  requests: z.object({ get: z.number().int(), put: z.number().int() }),
  device: z.string(),
});
export type Completion = z.infer<typeof completionSchema>;

// --- results ------------------------------------------------------------------------------------------------

/** Where the heatmap lies over the slide. Level-0 position = origin + pixel × level0PerPixel. */
export interface HeatmapGeometry {
  /** The output that is drawn. */
  output: string;
  colormap: 'inferno' | 'viridis';
  /** Values of the lowest and the highest colour: the model's own, 0–1, or the 1st and 99th percentile of the readable tiles. */
  range: { min: number; max: number; of: 'model' | 'unit' | 'p1-p99' };
  /** Level-0 position of the top-left corner. */
  origin: { x: number; y: number };
  level0PerPixel: number;
  micronsPerPixel: { x: number; y: number };
  /** The slide's part of the picture, at its top-left; the rest is the legend. Pixels. */
  area: { width: number; height: number };
  /** The whole picture. Pixels. */
  picture: { width: number; height: number };
}

/** What the tiles of a slide say together, for a classification; nulls where there is no readable tile. */
export interface ClassVote {
  /** The class with the highest mean. */
  predictedByMean: string | null;
  /** The class that is the highest of the most tiles. */
  predictedByVote: string | null;
  votes: Record<string, number>;
  voteShare: Record<string, number | null>;
}

/** What the package's own head says of the whole slide. */
export interface HeadResult {
  task: 'classification' | 'regression';
  outputs: Record<string, number>;
  /** Tiles that it looked at. */
  tiles: number;
  /** The class with the highest number; only for a classification. */
  predicted?: string;
}

/** `result.json`: the answer of one model for one slide. Quantiles by linear interpolation, as numpy's default. */
export interface SlideResult {
  runId: string;
  slideId: string;
  slide: string;
  model: { name: string; version: string; digest: string; task: Model['task'] };
  mode: Mode;
  /** In transform mode: what the tiles were read from. */
  tileset?: Completion['tileset'];
  tiles: { grid: number; kept: number; ok: number; unreadable: number };
  /** The aggregates that `outputs` has, and those of them that the package asks for: the columns of results.csv. */
  aggregates: { given: Aggregate[]; asked: Aggregate[] };
  /** Each output's aggregates over the readable tiles. */
  outputs: Record<string, Partial<Record<Aggregate, number | null>>>;
  /** How many of the highest tiles `top_k_mean` is the mean of, at most. */
  topK: number;
  /** Only for a classification. */
  classes: ClassVote | null;
  /** The head's answer; null where the package has none, or there was no readable tile. */
  head: HeadResult | null;
  /** In words, what the numbers alone do not say: no tissue, unreadable tiles, much ink. */
  note: string | null;
  tissueAreaMm2: number;
  tile: Completion['tile'] | null;
  slideGeometry: Completion['slide'] | null;
  heatmap: HeatmapGeometry | null;
  /** Seconds, by stage of the container. */
  timings: Record<string, number>;
  /** Shares of the container's time, by part: what bounded it. */
  bound?: Completion['bound'];
  lineage: {
    jobName: string;
    device: string;
    completedAt: string;
    parameters: Record<string, number>;
    /** Of the container, and of the function that aggregated. */
    codeVersion: { inference: string; aggregation: string };
    input: { checksum: string; object: ObjectRef | null };
    /** Every file beside this one. */
    outputs: Record<string, { sha256: string; bytes: number }>;
  };
}

/** One model's answer for one slide, as the state table and run.json hold it. */
export interface ResultSummary {
  model: string;
  version: string;
  /** Key of result.json in Silver. */
  key: string;
  tiles: { kept: number; ok: number; unreadable: number };
  tissueMm2: number;
  /** What the numbers alone do not say. */
  note?: string;
  /**
   * `<aggregate>_<output>` → number; null where there is no tile. For classes also `predicted_mean`, `predicted_vote`;
   * of a head `head_<output>`, `predicted_head`. Of an embedding only what its head says.
   */
  outputs: Record<string, number | string | null>;
  /** Level-0 pixels, for laying the heatmap over the thumbnail. */
  size?: { width: number; height: number };
  heatmap?: HeatmapGeometry;
}

/** A slide's item in the state table: `pk = RUN#<runId>`, `sk = SLIDE#<slideId>`. */
export interface SlideItem {
  slideId: string;
  slide: string;
  state: SlideState;
  reason?: Reason;
  bronze?: BronzeSlide;
  name?: SlideName;
  /** The slide that brought the same content first; `bronze` is then what that one was taken in as. */
  duplicateOf?: { runId: string; study: string; slideId: string };
  results?: ResultSummary[];
  /** AWS requests counted for this slide, by class. */
  requests?: Record<string, number>;
  updatedAt: string;
}

/** The run's own item in the state table: `pk = RUN#<runId>`, `sk = RUN`. */
export interface RunItem extends RunContext {
  state: RunState;
  reason?: Reason;
  executionArn: string;
  /** When the plan stood, and when the last slide was taken in. */
  plannedAt?: string;
  ingestedAt?: string;
  endedAt?: string;
  /** When its end was on record and told. A run that has ended without it was broken off while it was published. */
  publishedAt?: string;
  counts?: Partial<Record<SlideState, number>>;
}

/** A job's item in the state table: `pk = RUN#<runId>`, `sk = JOB#<jobName>`. */
export interface JobItem {
  jobName: string;
  /** Absent in runs before there were several: `process`. */
  kind?: JobKind;
  model: string;
  version: string;
  state: 'SUCCEEDED' | 'FAILED';
  reason?: Reason;
  /** Of a Transform job: packs it was given, and the jobs just before it that had left no fewer of them missing. */
  packs?: number | undefined;
  fruitless?: number | undefined;
  instanceType: string;
  instanceCount: number;
  instanceSeconds: number;
  /** As SageMaker says it, or when it was given up; absent for a job that never began. */
  endedAt?: string;
}

/**
 * A heatmap on an image of the catalogue, in the state table: `pk = IMAGE#<host>/<imageId>`,
 * `sk = OVERLAY#<model>#<version>#<sha256 of heatmap.png>`. Not under a run, because a picture that lies on the image
 * is not put there again by another run.
 */
export interface OverlayItem {
  /** CREATED in the catalogue, without its picture yet. */
  state: 'CREATED' | 'PUSHED' | 'FAILED';
  /** The catalogue's id, once it has given one. */
  overlayId?: string;
  reason?: Reason;
  runId: string;
  slideId: string;
  updatedAt: string;
}

/** `runs/<runId>/overlays.json`: how far the pushing of a run's heatmaps has come. */
export interface OverlayProgress {
  runId: string;
  done: boolean;
  /** Line of the manifest up to which all slides are done. */
  line: number;
  /** `present` were there already. */
  counts: { pushed: number; present: number; failed: number };
  /** The first failures. */
  failures: { slideId: string; model: string; reason: Reason }[];
  /** Why it was given up before the end. */
  reason?: Reason;
}

/** `runs/<runId>/run.json`. */
export interface RunSummary {
  runId: string;
  study: string;
  /** The run that this one follows. */
  followUp?: RunContext['followUp'];
  manifest: ObjectRef & { etag: string };
  state: RunState;
  reason: Reason | null;
  startedAt: string;
  endedAt: string;
  models: { name: string; version: string; digest: string; license: string }[];
  parameters: Parameters | null;
  codeVersion: string;
  counts: Partial<Record<SlideState, number>>;
  slides: RunSlide[];
  jobs: JobItem[];
  cost: RunCost;
}

export interface RunSlide {
  slideId: string;
  slide: string;
  line: number;
  state: SlideState;
  reason: Reason | null;
  checksum: string | null;
  results: { model: string; version: string; key: string; outputs: ResultSummary['outputs'] }[];
}

export interface RunCost {
  requests: Record<string, number>;
  transitions: number;
  instanceSeconds: number;
  estimatedUsd: number;
  /** Date of the price table used. */
  prices: string;
  /** Instance types that the price table does not know; the estimate leaves them out. */
  unpriced: string[];
}
