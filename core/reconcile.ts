/**
 * What a study ought to be held against what is there: the manifests' rows, the state table, and the objects in
 * Landing, Bronze and Silver, each a sorted stream, merged. Memory does not grow with the study; what has to be
 * brought into another order goes through files.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { PlannedSlide, Reason, RunItem, SlideItem, SlideSource, SlideState } from './contracts.ts';
import { slidesPrefix } from './keys.ts';
import { align, compareKeys, NotSorted, Spool } from './spool.ts';
import { isFinal } from './state.ts';

export const STATUSES = ['in order', 'missing', 'extra', 'changed', 'stuck'] as const;
export type Status = (typeof STATUSES)[number];

/** What was found of one slide, or of one object that no manifest knows. */
export interface Reconciled {
  status: Status;
  slideId?: string;
  /** Path as the manifest has it. */
  slide?: string;
  runId?: string;
  state?: SlideState;
  /** `s3://…` of an object that is extra, or of a manifest. */
  object?: string;
  /** In words, the first explaining the status. */
  notes: string[];
}

export interface StoredObject {
  key: string;
  size: number;
  /** As S3 lists it, with quotes. */
  etag?: string;
  versionId?: string;
}

/** A run of the study, its streams in any order. */
export interface RunSources {
  run: RunItem;
  planned: AsyncIterable<PlannedSlide>;
  items: AsyncIterable<SlideItem>;
  /** Keys below `runs/<runId>/slides/`, as S3 lists them. */
  silver: AsyncIterable<{ key: string }>;
}

export interface Sources {
  study: string;
  landingBucket: string;
  bronzeBucket: string;
  silverBucket: string;
  /** The oldest first. */
  runs: AsyncIterable<RunSources>;
  /** Objects below `<study>/`, as S3 lists them. */
  landing: AsyncIterable<StoredObject>;
  /** Newest versions below `slides/<study>/`, as S3 lists them. */
  bronze: AsyncIterable<StoredObject>;
  /** Folders below the study's that are studies of their own, each ending in `/`. */
  nested?: string[];
}

export interface ReconcileOptions {
  now: Date;
  /** A slide that has not moved for so long is stuck. */
  stuckAfterMs: number;
  /** Folder for what is sorted on disk; default: the system's. */
  folder?: string;
  signal?: AbortSignal | undefined;
}

/** What one run knows of a slide. */
interface Known {
  slideId: string;
  slide: string;
  runId: string;
  startedAt: string;
  running: boolean;
  state: SlideState;
  reason?: Reason;
  updatedAt?: string;
  source?: SlideSource;
  bronze?: { key: string; versionId?: string; size: number }[];
  /** result.json keys that are on record and are not in Silver. */
  lost: string[];
}

/** What is expected under a key, or in a folder. */
interface Claim {
  slideId: string;
  etag?: string;
  size?: number;
  versionId?: string;
  /** Objects in the folder, where the key is one. */
  files?: number;
}

interface Outcome {
  area: 'Landing' | 'Bronze';
  key: string;
  found: 'same' | 'changed' | 'absent';
}

/** Yields what was found of every slide and of everything that belongs to none. */
export async function* reconcile(sources: Sources, options: ReconcileOptions): AsyncGenerator<Reconciled> {
  const folder = await mkdtemp(join(options.folder ?? tmpdir(), 'slideway-reconcile-'));
  try {
    yield* new Reconciler(sources, options, folder).run();
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

class Reconciler {
  readonly #sources: Sources;
  readonly #options: ReconcileOptions;
  readonly #folder: string;
  #newestRun: RunItem | undefined;
  #newestPlanned = 0;
  readonly #manifests = new Set<string>();

  constructor(sources: Sources, options: ReconcileOptions, folder: string) {
    this.#sources = sources;
    this.#options = options;
    this.#folder = folder;
  }

  async *run(): AsyncGenerator<Reconciled> {
    const { study } = this.#sources;
    const bronzePrefix = `slides/${study}/`;
    const known = new Spool<Known>(this.#folder);
    for await (const run of this.#sources.runs) yield* this.#runOf(run, known);

    const slides = new Spool<Known>(this.#folder);
    const landing = new Spool<Claim>(this.#folder);
    const bronze = new Spool<Claim>(this.#folder);
    for await (const slide of newestOf(known.read())) {
      this.#options.signal?.throwIfAborted();
      await slides.add(slide.slideId, slide);
      for (const [key, claim] of landingClaims(study, slide)) await landing.add(key, claim);
      for (const { key, versionId, size } of slide.bronze ?? []) {
        // Bytes that were known before lie under the slide that brought them, perhaps in another study. That slide
        // may have other bytes by now, over the version that this one has on record.
        if (!key.startsWith(bronzePrefix)) continue;
        const own = key.startsWith(`${bronzePrefix}${slide.slideId}/`);
        await bronze.add(key, {
          slideId: slide.slideId,
          ...(own && { size, ...(versionId && { versionId }) }),
        });
      }
    }
    await known.remove();

    const outcomes = new Spool<Outcome>(this.#folder);
    yield* this.#settle('Landing', landing, this.#sources.landing, outcomes);
    yield* this.#settle('Bronze', bronze, this.#sources.bronze, outcomes);
    await landing.remove();
    await bronze.remove();
    yield* this.#failedPlan();

    for await (const { a, b } of align(slides.sorted(), outcomes.sorted())) {
      const [slide] = a;
      if (slide)
        yield this.#judge(
          slide.item,
          b.map(({ item }) => item),
        );
    }
  }

  /** Plan, state and results of one run, merged by slide. */
  async *#runOf(
    { run, planned, items, silver }: RunSources,
    known: Spool<Known>,
  ): AsyncGenerator<Reconciled> {
    const { signal } = this.#options;
    const rows = new Spool<PlannedSlide>(this.#folder);
    const states = new Spool<SlideItem>(this.#folder);
    let count = 0;
    for await (const row of planned) {
      signal?.throwIfAborted();
      count += 1;
      await rows.add(`${row.slideId}/`, row);
    }
    for await (const item of items) {
      signal?.throwIfAborted();
      await states.add(`${item.slideId}/`, item);
    }
    this.#newestRun = run;
    this.#newestPlanned = count;
    const { bucket, key, etag } = run.manifest;
    this.#manifests.add(manifestName(run.manifest)).add(manifestName({ bucket, key, etag }));

    const root = slidesPrefix(run.runId);
    const slideOf = ({ key }: { key: string }) => key.slice(root.length, key.indexOf('/', root.length) + 1);
    const merged = align(rows.sorted(), states.sorted(), { items: silver, key: slideOf });
    for await (const { key, a, b, c } of merged) {
      const item = b[0]?.item;
      // Lines that repeat a slide say nothing of it.
      const lines = a.map(({ item: line }) => line);
      const row = lines.find(({ state }) => state !== 'DUPLICATE') ?? lines[0];
      const slideId = key.slice(0, -1);
      if (!row) {
        const what = item ? `state ${item.state}` : `${c.length} objects in Silver`;
        yield {
          status: 'extra',
          slideId,
          runId: run.runId,
          ...(c[0] && { object: `s3://${this.#sources.silverBucket}/${c[0].key}` }),
          notes: [`The run ${run.runId} has ${what} for a slide that its plan does not name.`],
        };
        continue;
      }
      const there = new Set(c.map((object) => object.key));
      const decided = row.state === 'EXPECTED' ? item : undefined;
      await known.add(slideId, {
        slideId,
        slide: row.slide,
        runId: run.runId,
        startedAt: run.startedAt,
        running: run.state === 'RUNNING',
        state: decided?.state ?? row.state,
        ...(decided?.reason && { reason: decided.reason }),
        ...(!decided && row.reason && { reason: row.reason }),
        ...(decided && { updatedAt: decided.updatedAt }),
        ...(row.source && { source: row.source }),
        ...(item?.bronze && {
          bronze: item.bronze.files.map(({ key, versionId, size }) => ({
            key,
            ...(versionId && { versionId }),
            size,
          })),
        }),
        lost: (item?.results ?? []).map((result) => result.key).filter((each) => !there.has(each)),
      });
    }
    await rows.remove();
    await states.remove();
  }

  /** Holds what is expected under keys against a listing; what nobody expects is extra. */
  async *#settle(
    area: Outcome['area'],
    claims: Spool<Claim>,
    listing: AsyncIterable<StoredObject>,
    outcomes: Spool<Outcome>,
  ): AsyncGenerator<Reconciled> {
    const settled = (claim: Claim, key: string, found: Outcome['found']) =>
      outcomes.add(claim.slideId, { area, key, found });
    const pending = claims.read();
    let next = await pending.next();
    /** Folders that the listing is in just now, the innermost last. */
    const open: { key: string; claims: Claim[]; files: number; size: number }[] = [];
    const close = async () => {
      const folder = open.pop();
      for (const claim of folder?.claims ?? []) {
        const same =
          folder?.files === claim.files && (claim.size === undefined || folder?.size === claim.size);
        await settled(claim, folder?.key ?? '', folder?.files === 0 ? 'absent' : same ? 'same' : 'changed');
      }
    };
    /** Takes the claims that stand before `key`, and those of folders around it. */
    const advance = async (key: string | undefined) => {
      while (!next.done && (key === undefined || compareKeys(next.value.key, key) < 0)) {
        const { key: at, item: claim } = next.value;
        if (!at.endsWith('/')) await settled(claim, at, 'absent');
        else {
          while (open.length > 0 && !at.startsWith(open.at(-1)?.key ?? '')) await close();
          const folder = open.at(-1);
          if (folder?.key === at) folder.claims.push(claim);
          else open.push({ key: at, claims: [claim], files: 0, size: 0 });
        }
        next = await pending.next();
      }
    };
    let last = '';
    for await (const object of listing) {
      this.#options.signal?.throwIfAborted();
      if (compareKeys(object.key, last) < 0) throw new NotSorted(`${object.key} comes after ${last}`);
      last = object.key;
      if (this.#sources.nested?.some((prefix) => object.key.startsWith(prefixIn(area, prefix)))) continue;
      await advance(object.key);
      while (open.length > 0 && !object.key.startsWith(open.at(-1)?.key ?? '')) await close();
      // A folder's own marker is no file.
      if (object.key.endsWith('/')) continue;
      let claimed = false;
      while (!next.done && next.value.key === object.key) {
        claimed = true;
        await settled(next.value.item, object.key, matches(next.value.item, object) ? 'same' : 'changed');
        next = await pending.next();
      }
      const folder = open.at(-1);
      // A file that is a slide by itself is none of the folder's it lies in.
      if (claimed) continue;
      if (folder) {
        folder.files += 1;
        folder.size += object.size;
      } else if (area === 'Landing' && object.key === `${this.#sources.study}/repo.csv`) {
        yield* this.#manifest(object);
      } else yield this.#extra(area, object);
    }
    await advance(undefined);
    while (open.length > 0) await close();
  }

  *#manifest(object: StoredObject): Generator<Reconciled> {
    const bucket = this.#sources.landingBucket;
    const { key, versionId, etag = '' } = object;
    if (this.#manifests.has(manifestName({ bucket, key, versionId, etag }))) return;
    yield {
      status: 'stuck',
      object: `s3://${bucket}/${key}`,
      notes: ['This manifest has no run. Drop it again; if that starts none, look at the failed events.'],
    };
  }

  *#failedPlan(): Generator<Reconciled> {
    const run = this.#newestRun;
    if (!run || this.#newestPlanned > 0 || run.state === 'RUNNING') return;
    yield {
      status: 'stuck',
      runId: run.runId,
      object: `s3://${run.manifest.bucket}/${run.manifest.key}`,
      notes: [`The run ${run.runId} has no plan: ${run.reason?.message ?? 'it gave no reason'}`],
    };
  }

  #extra(area: Outcome['area'], { key }: StoredObject): Reconciled {
    const bucket = area === 'Landing' ? this.#sources.landingBucket : this.#sources.bronzeBucket;
    return {
      status: 'extra',
      object: `s3://${bucket}/${key}`,
      notes: [
        area === 'Landing'
          ? 'No manifest of the study names this file.'
          : 'No slide of the study is on record with this object.',
      ],
    };
  }

  #judge(slide: Known, outcomes: Outcome[]): Reconciled {
    const notes: { status: Status; note: string }[] = [];
    const say = (status: Status, note: string) => notes.push({ status, note });
    for (const { area, key, found } of outcomes) {
      if (area === 'Bronze' && found === 'changed')
        say('changed', `${key} in Bronze is not the version on record.`);
      if (area === 'Bronze' && found === 'absent') say('missing', `${key} is not in Bronze any more.`);
      // Landing may be emptied once a slide has been taken in.
      if (area === 'Landing' && found === 'changed' && slide.source) {
        say('changed', `${key} in Landing is not what the run was planned with.`);
      }
      if (
        area === 'Landing' &&
        found === 'absent' &&
        slide.source &&
        !slide.bronze &&
        !isFinal(slide.state)
      ) {
        say('missing', `${key} is not in Landing any more.`);
      }
    }
    for (const key of slide.lost) say('missing', `${key} is not in Silver any more.`);
    const here = outcomes.some(({ area, found }) => area === 'Landing' && found !== 'absent');
    if (slide.state === 'MISSING') {
      if (here) say('stuck', 'It has come to Landing since; no run has taken it in yet.');
      else say('missing', slide.reason?.message ?? 'It is not in Landing.');
    } else if (slide.state === 'QUARANTINED' || slide.state === 'FAILED') {
      say('stuck', `${slide.state}: ${slide.reason?.message ?? 'no reason is on record'}`);
    } else if (!isFinal(slide.state)) {
      const since = slide.updatedAt ?? slide.startedAt;
      if (!slide.running) say('stuck', `It is ${slide.state}, though its run has ended.`);
      else if (this.#options.now.getTime() - Date.parse(since) > this.#options.stuckAfterMs) {
        say('stuck', `It has been ${slide.state} since ${since}.`);
      }
    }
    // The heaviest first: what is lost or altered weighs more than what waits.
    const order: Status[] = ['changed', 'missing', 'stuck'];
    notes.sort((a, b) => order.indexOf(a.status) - order.indexOf(b.status));
    const { slideId, slide: path, runId, state } = slide;
    return {
      status: notes[0]?.status ?? 'in order',
      slideId,
      slide: path,
      runId,
      state,
      notes: notes.map(({ note }) => note),
    };
  }
}

/** Of each slide what its newest run says, with the Bronze objects of the newest run that had them. */
async function* newestOf(known: AsyncIterable<{ item: Known }>): AsyncGenerator<Known> {
  let slide: Known | undefined;
  for await (const { item } of known) {
    if (slide && slide.slideId !== item.slideId) yield slide;
    const before = slide?.slideId === item.slideId ? slide : undefined;
    const bronze = item.bronze ?? before?.bronze;
    slide = { ...item, ...(bronze && { bronze }) };
  }
  if (slide) yield slide;
}

/** Where a slide's files are expected in Landing. */
function landingClaims(study: string, { slideId, slide, source }: Known): [string, Claim][] {
  if (!source) {
    const key = `${study}/${slide}`;
    return slide === ''
      ? []
      : [
          [key, { slideId }],
          [`${key}/`, { slideId }],
        ];
  }
  const { kind, key, folder, files, size, etag } = source;
  const own = kind === 'dicom' ? 0 : 1;
  return [
    ...(own ? [[key, { slideId, ...(etag && { etag }) }] as [string, Claim]] : []),
    ...(folder
      ? [[folder, { slideId, files: files - own, ...(own === 0 && { size }) }] as [string, Claim]]
      : []),
  ];
}

const matches = ({ etag, size, versionId }: Claim, object: StoredObject): boolean =>
  (etag === undefined || object.etag === undefined || bare(etag) === bare(object.etag)) &&
  (size === undefined || size === object.size) &&
  (versionId === undefined || object.versionId === undefined || versionId === object.versionId);

const bare = (etag: string) => etag.replaceAll('"', '');

const prefixIn = (area: Outcome['area'], prefix: string) =>
  area === 'Landing' ? prefix : `slides/${prefix}`;

/** A manifest's version, or where there is none its ETag. */
const manifestName = ({ bucket, key, versionId, etag }: RunItem['manifest']): string =>
  `${bucket}/${key}@${versionId ?? bare(etag)}`;
