/** PlanRun: what the manifest asks for, held against what lies in Landing and in the model register. */
import { createHash } from 'node:crypto';
import type { S3Client } from '@aws-sdk/client-s3';
import { askCatalogue, type CatalogueSource, entryOf, type FoundSlide, squareMpp } from './catalogue.ts';
import type {
  BronzeSlide,
  Model,
  ModelRef,
  Plan,
  PlannedSlide,
  Reason,
  RunContext,
  SlideState,
} from './contracts.ts';
import { classify, ManifestGone, reasonOf, SlidewayError, TooManyModels } from './errors.ts';
import { landingOf, type TakenIn, takenIn } from './follow-up.ts';
import { bronzePrefix, planKey, slidesKey } from './keys.ts';
import { LandingListing } from './landing.ts';
import { awaitMissing, type Late } from './late.ts';
import { contentId, type Lineage } from './lineage.ts';
import { type ManifestRow, parseManifest, splitModels } from './manifest.ts';
import { resolveModel } from './models.ts';
import { canonicalName, type NameTemplate, parseNameTemplate } from './names.ts';
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
  /** Packages may bring code of their own. */
  allowModelCode: boolean;
  codeVersion: string;
  /** Absent where the stage has none. */
  catalogue?: CatalogueSource;
  names?: NameTemplate;
  /** Where MISSING slides wait to come. */
  late: Late;
  /** How long nothing must have come of a slide of several files, for it to be whole. */
  quietMs?: number;
}

const DEFAULT_NAMES = parseNameTemplate('{case_id}_{stain}_{slide_id}');

export async function planRun(
  run: RunContext,
  deps: PlanDependencies,
): Promise<{ slides: Written; total: number; expected: number }> {
  const { s3, state, lineage, silverBucket, modelsBucket, codeVersion, catalogue, names } = deps;
  const resolve = (wanted: string) =>
    resolveModel(s3, modelsBucket, wanted, { allowCode: deps.allowModelCode });
  const bytes = await readBytes(s3, run.manifest);
  if (!bytes)
    throw new ManifestGone(`${run.manifest.key} is no longer in Landing as it was when the run began.`);
  const rows = parseManifest(bytes);
  const landing = await LandingListing.read(s3, landingOf(run), run.study, deps.quietMs);
  const models = await resolveModels(rows, run, resolve);
  const asked = await askCatalogue(rows, catalogue);
  const before = run.followUp && (await takenIn(s3, state, silverBucket, run.followUp.of));
  const slides = planSlides(rows, run, landing, models, asked.found, before, names);

  const counts: Plan['counts'] = {};
  for (const slide of slides) counts[slide.state] = (counts[slide.state] ?? 0) + 1;
  const used = new Set(slides.flatMap((slide) => (slide.state === 'EXPECTED' ? slide.models : [])));
  const plan: Plan = {
    run,
    codeVersion,
    models: [...models.values()].filter((found) => 'model' in found).filter(({ name }) => used.has(name)),
    versions: Object.fromEntries(
      [...models].flatMap(([text, found]) =>
        'model' in found ? [[text, `${found.name}@${found.version}`]] : [],
      ),
    ),
    counts,
    ...(asked.summary && { catalogue: asked.summary }),
  };
  const head = await writeJson(s3, { bucket: silverBucket, key: planKey(run.runId) }, plan);
  const written = await writeLines(s3, { bucket: silverBucket, key: slidesKey(run.runId) }, slides);
  await awaitMissing(run, slides, deps);
  await state.updateRun(run.runId, { counts, plannedAt: new Date().toISOString() });
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
      parameters: {
        ...run.parameters,
        defaultModel: run.defaultModel,
        counts,
        ...(asked.summary && { catalogue: asked.summary }),
      },
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

/**
 * The plan's lines, one for each row, in the manifest's order. `catalogue` has its entries by line, `before` what the
 * run that this one follows has in Bronze, by slide id.
 */
export function planSlides(
  rows: ManifestRow[],
  run: RunContext,
  landing: Pick<LandingListing, 'find'>,
  models: Map<string, ResolvedModel>,
  catalogue: ReadonlyMap<number, FoundSlide> = new Map(),
  before: ReadonlyMap<string, TakenIn> = new Map(),
  names: NameTemplate = DEFAULT_NAMES,
): PlannedSlide[] {
  const firstLine = new Map<string, number>();
  const linesOfId = new Map<string, Set<string>>();
  const withIds = rows.map((row) => ({ row, slideId: slideIdOf(run.study, row) }));
  for (const { row, slideId } of withIds) {
    if (!row.reason) linesOfId.set(slideId, (linesOfId.get(slideId) ?? new Set()).add(row.slide));
  }

  return withIds.map(({ row, slideId }) => {
    const known = catalogue.get(row.line);
    const mpp = mppOf(row, known);
    const base: PlannedSlide = {
      line: row.line,
      slideId,
      slide: row.slide,
      state: 'EXPECTED',
      models: [],
      ...(row.models && { wantedModels: row.models }),
      metadata: { ...(known?.known && known.metadata), ...row.metadata },
      ...(mpp && 'mpp' in mpp && mpp),
      ...(known && { catalogue: entryOf(known) }),
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
    const bronze = stillTaken(before.get(slideId), row.slide, found);
    if (bronze) base.bronze = bronze;
    else if ('state' in found) return end(found.state, found.reason);
    if (mpp && 'reason' in mpp) return end('QUARANTINED', mpp.reason);
    const resolved = (row.models ?? splitModels(run.defaultModel)).map((text) => models.get(text));
    for (const model of resolved) if (model && 'reason' in model) return end('FAILED', model.reason);
    return {
      ...base,
      ...(!('state' in found) && { source: found }),
      target: {
        prefix: bronzePrefix(run.study, slideId),
        ...canonicalName(
          names,
          { ...base.metadata, slide_id: slideId, study: run.study },
          // The dots of a folder's name are no extension.
          'kind' in found && found.kind === 'dicom' ? '' : row.slide,
          slideId,
        ),
      },
      models: [...new Set(resolved.flatMap((model) => (model && 'model' in model ? [model.name] : [])))],
    };
  });
}

/** What an earlier run took in of the slide; nothing where other files lie in Landing by now. */
function stillTaken(
  taken: TakenIn | undefined,
  slide: string,
  found: ReturnType<LandingListing['find']>,
): BronzeSlide | undefined {
  if (taken?.slide !== slide) return undefined;
  if ('state' in found) return found.state === 'MISSING' ? taken.bronze : undefined;
  const { etag, files, size } = found;
  const same =
    taken.source?.etag === etag && taken.bronze.files.length === files && taken.bronze.size === size;
  return same ? taken.bronze : undefined;
}

/** The manifest's pixel size, else the catalogue's; the reason where that one cannot be used. */
function mppOf(
  row: ManifestRow,
  known: FoundSlide | undefined,
): Required<Pick<PlannedSlide, 'mpp' | 'mppSource'>> | { reason: Reason } | undefined {
  if (row.mpp !== undefined) return { mpp: row.mpp, mppSource: 'manifest' };
  if (!known?.known || !known.mpp) return undefined;
  const square = squareMpp(known.mpp);
  return 'mpp' in square ? { mpp: square.mpp, mppSource: 'catalogue' } : square;
}
