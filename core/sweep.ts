/**
 * The sweep: looks for what an event alone never tells. A manifest without a run, a slide in Landing that no manifest
 * names, a slide stuck in one state, a run without an end. Of these it changes nothing; a SageMaker model that a run
 * left behind, which nobody would ever use, it deletes. Landing and the names of all plans are held against each other
 * as sorted streams, so that a million keys take no more memory than a thousand.
 */
import { HeadObjectCommand, paginateListObjectsV2, type S3Client } from '@aws-sdk/client-s3';
import type { PlannedSlide, RunItem, SlideState } from './contracts.ts';
import { isNotFound } from './errors.ts';
import { slidesKey, sweepKey } from './keys.ts';
import { compareKeys, Spool } from './spool.ts';
import { isFinal, type StateTable } from './state.ts';
import { readLines, writeJson } from './store.ts';

export interface SweepLimits {
  /** A manifest may lie in Landing so long before its run has begun. */
  manifestMinutes: number;
  /** A slide may lie in Landing so long before a manifest names it. */
  unnamedHours: number;
  /** A slide of a run under way may stay in one state so long: longer than a job may take. */
  stuckHours: number;
  /** A run may take so long. */
  runHours: number;
}

interface ServedModel {
  name: string;
  arn: string;
  since: Date;
}

/** SageMaker's models of this deployment. */
export interface ServedModels {
  list(): AsyncIterable<ServedModel>;
  /** The run that it was made for; undefined when it does not say, or is gone. */
  runOf(model: ServedModel): Promise<string | undefined>;
  remove(model: ServedModel): Promise<void>;
}

export interface SweepDependencies {
  s3: S3Client;
  state: StateTable;
  landing: string;
  silver: string;
  limits: SweepLimits;
  /** Whether an execution still runs; false also when it is no longer known. */
  isRunning(executionArn: string): Promise<boolean>;
  models: ServedModels;
  /** A folder for what does not fit into memory. */
  folder: string;
  now(): Date;
}

/** How many there are, and the first of them. */
export interface Findings<T> {
  count: number;
  first: T[];
}

/** `sweeps/<date>.json`: what the day's last sweep found. */
export interface Sweep {
  /** ISO 8601, UTC. */
  at: string;
  limits: SweepLimits;
  /** Objects in Landing and runs that were looked at. */
  looked: { landing: number; runs: number; running: number };
  staleManifests: Findings<{ key: string; versionId?: string; since: string }>;
  unnamedSlides: Findings<{ key: string; since: string }>;
  stuckSlides: Findings<{ runId: string; slideId: string; state: SlideState; since: string }> & {
    byState: Partial<Record<SlideState, number>>;
  };
  endlessRuns: Findings<{ runId: string; since: string; why: 'execution ended' | 'too long' }>;
  /** Deleted by this sweep. */
  leftModels: Findings<{ name: string; runId: string; since: string }>;
}

/** As many of each kind as the summary names. */
const LISTED = 1000;
const MINUTE = 60_000;
const HOUR = 60 * MINUTE;

/** Files that are a slide, or the one of its files that is opened. */
const SLIDE_FILE = /\.(svs|tiff?|ndpi|mrxs|scn|bif|svslide|vms|vmu|vsi)$/i;
const DICOM_FILE = /\.dcm$/i;
const isManifest = (key: string) => key === 'repo.csv' || key.endsWith('/repo.csv');
const isHidden = (key: string) => /(^|\/)\./.test(key);

interface LandingObject {
  key: string;
  modified: Date;
}

/** Looks through everything once, writes the summary and returns it. */
export async function sweep(dependencies: SweepDependencies): Promise<Sweep> {
  const { s3, state, landing, silver, limits, folder, now } = dependencies;
  const at = now();
  const older = (since: Date, milliseconds: number) => at.getTime() - since.getTime() > milliseconds;
  const found: Sweep = {
    at: at.toISOString(),
    limits,
    looked: { landing: 0, runs: 0, running: 0 },
    staleManifests: { count: 0, first: [] },
    unnamedSlides: { count: 0, first: [] },
    stuckSlides: { count: 0, first: [], byState: {} },
    endlessRuns: { count: 0, first: [] },
    leftModels: { count: 0, first: [] },
  };

  const claimed = new Map<string, Set<string>>();
  const runsOf = new Map<string, string[]>();
  for await (const run of state.runs()) {
    found.looked.runs += 1;
    const { runId, study, manifest } = run;
    runsOf.set(study, [...(runsOf.get(study) ?? []), runId]);
    if (manifest.bucket === landing) {
      const versions = claimed.get(manifest.key) ?? new Set();
      claimed.set(manifest.key, versions.add(manifest.versionId ?? manifest.etag));
    }
    if (!run.publishedAt) await sweepRun(run, found, older, dependencies);
  }

  const names = new Spool<null>(folder);
  try {
    for (const [study, runs] of runsOf) {
      if (!(await holdsAnything(s3, landing, `${study}/`))) continue;
      for (const runId of runs) await addNames(names, s3, silver, study, runId);
    }
    const manifests: LandingObject[] = [];
    const objects = countInto(found, landingObjects(s3, landing), (object) => manifests.push(object));
    for await (const { key, modified } of unnamedSlides(objects, names.read())) {
      if (older(modified, limits.unnamedHours * HOUR)) {
        add(found.unnamedSlides, { key, since: modified.toISOString() });
      }
    }
    for (const { key, modified } of manifests) {
      if (!older(modified, limits.manifestMinutes * MINUTE)) continue;
      const version = await currentVersion(s3, landing, key);
      if (version === undefined || claimed.get(key)?.has(version.versionId ?? version.etag)) continue;
      const { versionId } = version;
      add(found.staleManifests, { key, ...(versionId && { versionId }), since: modified.toISOString() });
    }
  } finally {
    await names.remove();
  }
  await sweepModels(found, dependencies);
  await writeJson(s3, { bucket: silver, key: sweepKey(found.at.slice(0, 10)) }, found);
  return found;
}

function add<T>(findings: Findings<T>, finding: T): void {
  findings.count += 1;
  if (findings.first.length < LISTED) findings.first.push(finding);
}

// --- runs ------------------------------------------------------------------------------------------------------

async function sweepRun(
  seen: RunItem,
  found: Sweep,
  older: (since: Date, milliseconds: number) => boolean,
  { state, limits, isRunning }: SweepDependencies,
): Promise<void> {
  const { runId, startedAt: since } = seen;
  found.looked.running += 1;
  if (!(await isRunning(seen.executionArn))) {
    // It may have come to its end since it was listed.
    if (!(await state.run(runId))?.publishedAt) {
      add(found.endlessRuns, { runId, since, why: 'execution ended' });
    }
    return;
  }
  if (older(new Date(since), limits.runHours * HOUR))
    add(found.endlessRuns, { runId, since, why: 'too long' });
  for await (const { slideId, state: at, updatedAt } of state.slides(runId)) {
    if (isFinal(at) || at === 'MISSING' || !older(new Date(updatedAt), limits.stuckHours * HOUR)) continue;
    add(found.stuckSlides, { runId, slideId, state: at, since: updatedAt });
    found.stuckSlides.byState[at] = (found.stuckSlides.byState[at] ?? 0) + 1;
  }
}

/** Deletes the models of runs whose execution has ended, however that came about. */
async function sweepModels(found: Sweep, { state, models, isRunning }: SweepDependencies): Promise<void> {
  for await (const model of models.list()) {
    const runId = await models.runOf(model);
    if (runId === undefined) continue;
    const run = await state.run(runId);
    if (run && (await isRunning(run.executionArn))) continue;
    await models.remove(model);
    add(found.leftModels, { name: model.name, runId, since: model.since.toISOString() });
  }
}

// --- Landing -----------------------------------------------------------------------------------------------------

async function* landingObjects(s3: S3Client, bucket: string): AsyncGenerator<LandingObject> {
  for await (const page of paginateListObjectsV2({ client: s3 }, { Bucket: bucket })) {
    for (const { Key: key = '', LastModified: modified = new Date(0) } of page.Contents ?? []) {
      yield { key, modified };
    }
  }
}

/** The objects as they pass, counted; manifests go to `manifest` too. */
async function* countInto(
  found: Sweep,
  objects: AsyncIterable<LandingObject>,
  manifest: (object: LandingObject) => void,
): AsyncGenerator<LandingObject> {
  for await (const object of objects) {
    found.looked.landing += 1;
    if (isManifest(object.key)) manifest(object);
    yield object;
  }
}

async function holdsAnything(s3: S3Client, bucket: string, prefix: string): Promise<boolean> {
  const page = await paginateListObjectsV2(
    { client: s3, pageSize: 1 },
    { Bucket: bucket, Prefix: prefix },
  ).next();
  return (page.value?.Contents ?? []).length > 0;
}

async function currentVersion(
  s3: S3Client,
  bucket: string,
  key: string,
): Promise<{ versionId?: string; etag: string } | undefined> {
  try {
    const { VersionId, ETag = '' } = await s3.send(new HeadObjectCommand({ Bucket: bucket, Key: key }));
    return { ...(VersionId && { versionId: VersionId }), etag: ETag.replaceAll('"', '') };
  } catch (error) {
    if (isNotFound(error)) return undefined;
    throw error;
  }
}

/** What the lines of a run's plan name, whatever became of them: a file's key, or a folder's, ending in `/`. */
async function addNames(
  names: Spool<null>,
  s3: S3Client,
  silver: string,
  study: string,
  runId: string,
): Promise<void> {
  for await (const { slide } of readLines<PlannedSlide>(s3, { bucket: silver, key: slidesKey(runId) })) {
    const key = `${study}/${slide}`;
    await names.add(SLIDE_FILE.test(key) || DICOM_FILE.test(key) ? key : `${key}/`, null);
  }
}

/**
 * The slides among `objects` that no name is of, a folder of DICOM files once, by its key with `/`. Both streams are
 * sorted as S3 lists; a name that ends in `/` is of everything below it.
 */
export async function* unnamedSlides(
  objects: AsyncIterable<LandingObject>,
  names: AsyncIterable<{ key: string }>,
): AsyncGenerator<LandingObject> {
  const named = names[Symbol.asyncIterator]();
  let name = await named.next();
  let inside: string | undefined;
  let told: string | undefined;
  for await (const object of objects) {
    const { key } = object;
    let isNamed = false;
    while (!name.done && compareKeys(name.value.key, key) <= 0) {
      if (name.value.key === key) isNamed = true;
      // Within an outer folder that is named, an inner one adds nothing.
      else if (name.value.key.endsWith('/') && !(inside && key.startsWith(inside))) inside = name.value.key;
      name = await named.next();
    }
    if (isNamed || (inside && key.startsWith(inside)) || isHidden(key)) continue;
    if (SLIDE_FILE.test(key)) yield object;
    else if (DICOM_FILE.test(key)) {
      const folder = key.slice(0, key.lastIndexOf('/') + 1);
      if (folder !== told) yield { key: folder, modified: object.modified };
      told = folder;
    }
  }
  await named.return?.();
}
