/** PlanRun: what the manifest asks for, held against what lies in Landing and in the model register. */
import { createHash } from 'node:crypto';
import { paginateListObjectsV2, type S3Client } from '@aws-sdk/client-s3';
import type {
  Model,
  ModelRef,
  Plan,
  PlannedSlide,
  Reason,
  RunContext,
  SlideSource,
  SlideState,
} from './contracts.ts';
import { classify, ManifestGone, reasonOf, SlidewayError, TooManyModels } from './errors.ts';
import { bronzePrefix, planKey, slidesKey } from './keys.ts';
import { contentId, type Lineage } from './lineage.ts';
import { type ManifestRow, parseManifest, splitModels } from './manifest.ts';
import { resolveModel } from './models.ts';
import type { StateTable } from './state.ts';
import { readBytes, sha256, type Written, writeJson, writeLines } from './store.ts';

/** A run has a job for every model, and the state machine carries the list of jobs. */
export const MAX_MODELS = 20;

export interface PlanDependencies {
  s3: S3Client;
  state: StateTable;
  lineage: Lineage;
  silverBucket: string;
  modelsBucket: string;
  codeVersion: string;
}

export async function planRun(
  run: RunContext,
  { s3, state, lineage, silverBucket, modelsBucket, codeVersion }: PlanDependencies,
): Promise<{ slides: Written; total: number; expected: number }> {
  const bytes = await readBytes(s3, run.manifest);
  if (!bytes)
    throw new ManifestGone(`${run.manifest.key} is no longer in Landing as it was when the run began.`);
  const rows = parseManifest(bytes);
  const landing = await LandingListing.read(s3, run.manifest.bucket, run.study);
  const models = await resolveModels(rows, run, (wanted) => resolveModel(s3, modelsBucket, wanted));
  const slides = planSlides(rows, run, landing, models);

  const counts: Plan['counts'] = {};
  for (const slide of slides) counts[slide.state] = (counts[slide.state] ?? 0) + 1;
  const used = new Set(slides.flatMap((slide) => (slide.state === 'EXPECTED' ? slide.models : [])));
  const plan: Plan = {
    run,
    codeVersion,
    models: [...models.values()].filter((found) => 'model' in found).filter(({ name }) => used.has(name)),
    counts,
  };
  const head = await writeJson(s3, { bucket: silverBucket, key: planKey(run.runId) }, plan);
  const written = await writeLines(s3, { bucket: silverBucket, key: slidesKey(run.runId) }, slides);
  await state.updateRun(run.runId, { counts });
  await lineage.append(
    { runId: run.runId },
    {
      id: `${run.runId}/planned/${contentId([head, written])}`,
      runId: run.runId,
      action: 'RUN_PLANNED',
      inputs: [
        {
          bucket: run.manifest.bucket,
          key: run.manifest.key,
          versionId: run.manifest.versionId,
          checksum: sha256(bytes),
        },
        ...plan.models.map(({ bucket, key, versionId, digest }) => ({
          bucket,
          key,
          versionId,
          checksum: digest,
        })),
      ],
      outputs: [head, written],
      parameters: { ...run.parameters, defaultModel: run.defaultModel, counts },
    },
  );
  return { slides: written, total: slides.length, expected: counts.EXPECTED ?? 0 };
}

// --- models -------------------------------------------------------------------------------------------------

type ResolvedModel = (ModelRef & { model: Model }) | { reason: Reason };

/** Every model that the rows ask for, by the text that asks, found or with the reason why not. */
export async function resolveModels(
  rows: ManifestRow[],
  run: RunContext,
  resolve: (wanted: string) => Promise<ModelRef & { model: Model }>,
): Promise<Map<string, ResolvedModel>> {
  const wanted = new Set(rows.flatMap((row) => row.models ?? splitModels(run.defaultModel)));
  if (wanted.size > MAX_MODELS) {
    throw new TooManyModels(`The manifest asks for ${wanted.size} models; a run may have ${MAX_MODELS}.`);
  }
  const models = new Map<string, ResolvedModel>();
  const versions = new Map<string, string>();
  for (const text of wanted) {
    try {
      const found = await resolve(text);
      const version = versions.get(found.name) ?? found.version;
      versions.set(found.name, version);
      models.set(
        text,
        version === found.version
          ? found
          : {
              reason: {
                error: 'ModelVersionConflict',
                message: `\`${text}\` is version ${found.version}, but this run already uses ${found.name} ${version}; use one version in a run.`,
              },
            },
      );
    } catch (error) {
      // A bad package costs its own slides only; S3 not answering is a matter for a retry.
      if (!(error instanceof SlidewayError)) throw classify(error);
      models.set(text, { reason: reasonOf(error) });
    }
  }
  return models;
}

// --- what lies in Landing -----------------------------------------------------------------------------------

interface Folder {
  files: number;
  size: number;
  dicom: boolean;
}

/** The objects of a study's folder, by path relative to it, and what its folders hold. */
export class LandingListing {
  readonly bucket: string;
  readonly study: string;
  readonly #objects = new Map<string, { size: number; etag: string }>();
  readonly #folders = new Map<string, Folder>();
  #folded: Map<string, string> | undefined;

  constructor(
    bucket: string,
    study: string,
    objects: Iterable<{ path: string; size: number; etag: string }>,
  ) {
    this.bucket = bucket;
    this.study = study;
    for (const { path, size, etag } of objects) {
      if (path.endsWith('/')) continue;
      this.#objects.set(path, { size, etag });
      for (let slash = path.indexOf('/'); slash !== -1; slash = path.indexOf('/', slash + 1)) {
        const name = path.slice(0, slash + 1);
        const folder = this.#folders.get(name) ?? { files: 0, size: 0, dicom: false };
        folder.files += 1;
        folder.size += size;
        folder.dicom ||= /\.dcm$/i.test(path);
        this.#folders.set(name, folder);
      }
    }
  }

  static async read(s3: S3Client, bucket: string, study: string): Promise<LandingListing> {
    const prefix = `${study}/`;
    const objects: { path: string; size: number; etag: string }[] = [];
    for await (const page of paginateListObjectsV2({ client: s3 }, { Bucket: bucket, Prefix: prefix })) {
      for (const { Key = '', Size = 0, ETag = '' } of page.Contents ?? []) {
        objects.push({ path: Key.slice(prefix.length), size: Size, etag: ETag });
      }
    }
    return new LandingListing(bucket, study, objects);
  }

  /** The slide at a path: its source, or the reason why it is not one. */
  find(path: string): SlideSource | { state: 'MISSING' | 'QUARANTINED'; reason: Reason } {
    const object = this.#objects.get(path);
    if (!object) return this.#findFolder(path);
    const { bucket } = this;
    const key = `${this.study}/${path}`;
    if (object.size === 0) {
      return quarantine('SlideEmpty', `${path} has no bytes. Copy it again from the scanner's drive.`);
    }
    const companion = companionFolder(path);
    if (!companion) return { bucket, kind: 'file', key, files: 1, ...object };
    const folder = this.#folders.get(companion.folder);
    if (!folder) {
      return quarantine(
        'SlideIncomplete',
        `${path} needs its folder ${companion.folder} beside it, which is not in Landing.`,
      );
    }
    return {
      bucket,
      kind: companion.kind,
      key,
      folder: `${this.study}/${companion.folder}`,
      files: folder.files + 1,
      size: folder.size + object.size,
      etag: object.etag,
    };
  }

  #findFolder(path: string): ReturnType<LandingListing['find']> {
    const folder = this.#folders.get(`${path}/`);
    if (folder?.dicom) {
      const key = `${this.study}/${path}/`;
      return { bucket: this.bucket, kind: 'dicom', key, folder: key, files: folder.files, size: folder.size };
    }
    if (folder)
      return quarantine(
        'SlideNotRecognised',
        `${path} is a folder, but not of DICOM files (.dcm). Name the slide's file.`,
      );
    const like = this.#likeNamed(path);
    return {
      state: 'MISSING',
      reason: {
        error: 'SlideMissing',
        message: like
          ? `${path} is not in Landing, but ${like} is. Correct the name in the manifest.`
          : `${path} is not in Landing under ${this.study}/. Check the name, or copy the slide there.`,
      },
    };
  }

  /** A path that differs in letter case or in the way its accents are encoded only. */
  #likeNamed(path: string): string | undefined {
    const fold = (text: string) => text.normalize('NFC').toLowerCase();
    this.#folded ??= new Map([...this.#objects.keys()].map((name) => [fold(name), name]));
    return this.#folded.get(fold(path));
  }
}

const quarantine = (error: string, message: string) => ({
  state: 'QUARANTINED' as const,
  reason: { error, message },
});

/** The folder that belongs to a file of a format of several files. */
function companionFolder(path: string): { kind: 'mrxs' | 'vsi'; folder: string } | undefined {
  const [, parent = '', name = '', extension = ''] = /^(.*\/)?([^/]*)\.(mrxs|vsi)$/i.exec(path) ?? [];
  if (/mrxs/i.test(extension)) return { kind: 'mrxs', folder: `${parent}${name}/` };
  if (/vsi/i.test(extension)) return { kind: 'vsi', folder: `${parent}_${name}_/` };
  return undefined;
}

// --- slides ---------------------------------------------------------------------------------------------------

/** The manifest's `slide_id`, else one made of the slide's path, never of its base name alone. */
export function slideIdOf(study: string, row: Pick<ManifestRow, 'slide' | 'slideId'>): string {
  if (row.slideId) return row.slideId;
  const slug = row.slide
    .replace(/\.[^./]+$/, '')
    .replace(/[^A-Za-z0-9._-]+/g, '-')
    .replace(/^[^A-Za-z0-9]+/, '')
    .slice(-64);
  const hash = createHash('sha256').update(`${study}/${row.slide}`).digest('hex').slice(0, 8);
  return `${slug || 'slide'}-${hash}`;
}

/** The plan's lines, one for each row, in the manifest's order. */
export function planSlides(
  rows: ManifestRow[],
  run: RunContext,
  landing: Pick<LandingListing, 'find'>,
  models: Map<string, ResolvedModel>,
): PlannedSlide[] {
  const firstLine = new Map<string, number>();
  const linesOfId = new Map<string, Set<string>>();
  const withIds = rows.map((row) => ({ row, slideId: slideIdOf(run.study, row) }));
  for (const { row, slideId } of withIds) {
    if (!row.reason) linesOfId.set(slideId, (linesOfId.get(slideId) ?? new Set()).add(row.slide));
  }

  return withIds.map(({ row, slideId }) => {
    const base: PlannedSlide = {
      line: row.line,
      slideId,
      slide: row.slide,
      state: 'EXPECTED',
      models: [],
      metadata: row.metadata,
      ...(row.mpp !== undefined && { mpp: row.mpp, mppSource: 'manifest' as const }),
    };
    const end = (state: SlideState, reason: Reason): PlannedSlide => ({ ...base, state, reason });
    if (row.reason) return end('QUARANTINED', row.reason);
    const first = firstLine.get(row.slide);
    if (first !== undefined) {
      return end('DUPLICATE', {
        error: 'SlideDuplicate',
        message: `The same slide as on line ${first}; it is done once.`,
      });
    }
    firstLine.set(row.slide, row.line);
    if ((linesOfId.get(slideId)?.size ?? 0) > 1) {
      return end('QUARANTINED', {
        error: 'SlideIdAmbiguous',
        message: `Several slides claim slide_id \`${slideId}\`. Give each its own and drop the manifest again.`,
      });
    }
    const found = landing.find(row.slide);
    if ('state' in found) return end(found.state, found.reason);
    const resolved = (row.models ?? splitModels(run.defaultModel)).map((text) => models.get(text));
    for (const model of resolved) if (model && 'reason' in model) return end('FAILED', model.reason);
    return {
      ...base,
      source: found,
      target: { prefix: bronzePrefix(run.study, slideId), name: row.slide.split('/').at(-1) ?? row.slide },
      models: [...new Set(resolved.flatMap((model) => (model && 'model' in model ? [model.name] : [])))],
    };
  });
}
