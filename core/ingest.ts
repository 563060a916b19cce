/**
 * IngestSlides: one slide from Landing to Bronze, all of its files or none. A slide counts as taken in when its item
 * lists every file; what a broken attempt leaves in Bronze is used by the next one, or stays behind unlisted.
 */
import { createHash } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { paginateListObjectsV2, type S3Client } from '@aws-sdk/client-s3';
import { forEachConcurrently } from './concurrency.ts';
import type {
  BronzeFile,
  BronzeSlide,
  Continuation,
  DuplicatePolicy,
  PlannedSlide,
  Reason,
  RunContext,
  SlideItem,
  SlideName,
  SlideSource,
  SlideState,
} from './contracts.ts';
import { type CopyOptions, copyObject, lineageOfSource, type Proof, type Source, seeSource } from './copy.ts';
import {
  BronzeChanged,
  ContentSeen,
  CopyTooSlow,
  NameRefused,
  NameTaken,
  reasonOf,
  ServiceUnavailable,
  SlideChanged,
  SlidewayError,
  Throttled,
} from './errors.ts';
import { checkTaken } from './follow-up.ts';
import { askedKey, contentKey, type Holder, type Holdings, nameKey, slideKey } from './holdings.ts';
import { canonicalJson, type Lineage, type LineageObject } from './lineage.ts';
import { addCounts } from './metering.ts';
import { markedName } from './names.ts';
import { isFinal, type StateTable } from './state.ts';

const FILE_CONCURRENCY = 8;
/** Invocations that one slide may have. */
const MAX_ROUNDS = 100;
/** How long a slide that is under way keeps its claims without a sign of life: as long as an invocation may last. */
const CLAIM_MS = 15 * 60_000;
const NAME_ATTEMPTS = 3;
/** Time that is left for putting the end on record. */
const LAST_STEPS_MS = 45_000;

export interface IngestDependencies {
  s3: S3Client;
  state: StateTable;
  lineage: Lineage;
  holdings: Holdings;
  bronzeBucket: string;
  duplicates: DuplicatePolicy;
  /** Requests counted so far for this slide. */
  requests(): Record<string, number>;
  /** Milliseconds until the invocation is ended. */
  timeLeft?(): number;
  limits?: Pick<CopyOptions, 'copyObjectLimit' | 'partSize'>;
}

export interface Ingested {
  slideId: string;
  state: SlideState;
  /** Present when the time was up: the next invocation goes on with it. */
  continue?: Continuation;
}

/** What taking a slide in came to. */
interface Taken {
  bronze: BronzeSlide;
  sources: LineageObject[];
  name?: SlideName;
  proofs?: Proof[];
  duplicateOf?: NonNullable<SlideItem['duplicateOf']>;
  /** The slide's content in Bronze had another version before. */
  replaced?: boolean;
  /** Another slide of this run has the same content and is asked for the same. */
  sameAs?: string;
}

/** One invocation's work on one slide. */
interface Work {
  run: RunContext;
  slide: PlannedSlide;
  before: Continuation | undefined;
  deps: IngestDependencies;
  /** What this slide has claimed, given up when it is set aside. */
  claims: Parameters<Holdings['release']>[0][];
}

/** The time was up, with these uploads under way. */
class TimeUp extends Error {
  readonly uploads: Continuation['uploads'];
  readonly content: string | undefined;
  constructor(uploads: Continuation['uploads'] = {}, content?: string) {
    super('no time left');
    this.uploads = uploads;
    this.content = content;
  }
}

/** Another slide is under way with what this one needs. */
class Busy extends Error {
  readonly holder: Holder;
  constructor(holder: Holder) {
    super(`${holder.slideId} of ${holder.runId} is under way`);
    this.holder = holder;
  }
}

/**
 * Takes one EXPECTED slide in; every end that is not a matter for a retry is put on record and returned. `before` is
 * what an earlier invocation left.
 */
export async function ingestSlide(
  run: RunContext,
  slide: PlannedSlide,
  deps: IngestDependencies,
  before?: Continuation,
): Promise<Ingested> {
  const { state, holdings } = deps;
  const { runId } = run;
  const { slideId } = slide;
  if (!(await state.transition(runId, slideId, 'COPYING', { slide: slide.slide }))) {
    // An invocation before this one came to an end, and nobody heard of it.
    const item = await state.slide(runId, slideId);
    if (item) return { slideId, state: item.state };
  }
  const work: Work = { run, slide, before, deps, claims: [] };
  const requests = () => addCounts(before?.requests, deps.requests());
  try {
    await recordTaken(work, await whenFree(work), requests);
  } catch (error) {
    let failure = error;
    if (error instanceof TimeUp) {
      const round = (before?.round ?? 0) + 1;
      const { uploads, content = before?.content } = error;
      const next = { round, uploads, ...(content && { content }), requests: requests() };
      if (round < MAX_ROUNDS) return { slideId, state: 'COPYING', continue: next };
      failure = new CopyTooSlow(`The slide was not copied in ${MAX_ROUNDS} invocations. Look at S3's speed.`);
    }
    if (
      !(failure instanceof SlidewayError) ||
      failure instanceof Throttled ||
      failure instanceof ServiceUnavailable
    ) {
      throw failure;
    }
    await setAside(work, failure, requests);
    for (const key of work.claims) await holdings.release(key, holderOf(work));
  }
  const item = await state.slide(runId, slideId);
  return { slideId, state: item?.state ?? 'COPYING' };
}

async function recordTaken(
  work: Work,
  { bronze, sources, name, proofs, duplicateOf, replaced, sameAs }: Taken,
  requests: () => Record<string, number>,
): Promise<void> {
  const { run, slide, claims } = work;
  const { state, lineage, holdings } = work.deps;
  const { runId } = run;
  const { slideId } = slide;
  const shared = {
    slide: slide.slide,
    ...(name && { name }),
    ...(duplicateOf && { duplicateOf }),
  };
  const event = {
    runId,
    inputs: sources,
    outputs: bronze.files.map((file) => ({ bucket: bronze.bucket, ...lineageOf(file) })),
    parameters: {
      study: run.study,
      ...shared,
      checksum: bronze.checksum,
      ...(proofs && { proofs }),
      ...(replaced && { replaced }),
      ...(slide.mpp !== undefined && { mpp: slide.mpp, mppSource: slide.mppSource }),
      ...(slide.catalogue && { catalogue: slide.catalogue }),
    },
  };
  if (sameAs !== undefined) {
    const reason = {
      error: 'SlideDuplicate',
      message: `The same content as the slide ${sameAs} of this run; it is done once.`,
    };
    await lineage.append(
      { slideId },
      { ...event, id: `${runId}/DUPLICATE`, action: 'SLIDE_DUPLICATE', reason: textOf(reason) },
    );
    await state.transition(runId, slideId, 'DUPLICATE', { ...shared, reason, requests: requests() });
    for (const key of claims) await holdings.release(key, { runId, slideId, study: run.study, until: '' });
    return;
  }
  await lineage.append({ slideId }, { ...event, id: `${runId}/ingested`, action: 'SLIDE_INGESTED' });
  await state.transition(runId, slideId, 'INGESTED', { ...shared, bronze, requests: requests() });
}

async function setAside(
  { run: { runId }, slide: { slideId, slide }, deps: { state, lineage } }: Work,
  error: SlidewayError,
  requests: () => Record<string, number>,
): Promise<void> {
  const reason = reasonOf(error);
  const needsPerson = [NameTaken, NameRefused, SlideChanged, ContentSeen].some(
    (kind) => error instanceof kind,
  );
  const ended = needsPerson ? 'QUARANTINED' : 'FAILED';
  await lineage.append(
    { slideId },
    { id: `${runId}/${ended}`, runId, action: `SLIDE_${ended}`, reason: textOf(reason) },
  );
  await state.transition(runId, slideId, ended, { slide, reason, requests: requests() });
}

const textOf = ({ error, message }: Reason) => `${error}: ${message}`;
const lineageOf = ({ key, versionId, checksum }: BronzeFile) => ({ key, versionId, checksum });

// --- waiting for others -------------------------------------------------------------------------------------------

/** Takes the slide in, waiting while another slide of the same content is under way. */
async function whenFree(work: Work): Promise<Taken> {
  const { timeLeft = () => Number.POSITIVE_INFINITY } = work.deps;
  // Short at first, so that no place is held that the other one needs.
  const patience = Math.min(20_000 * 2 ** (work.before?.round ?? 0), timeLeft() - LAST_STEPS_MS);
  const until = Date.now() + patience;
  for (let pause = 100; ; pause = Math.min(pause * 2, 5_000)) {
    try {
      return await takeIn(work);
    } catch (error) {
      if (!(error instanceof Busy)) throw error;
      while ((await stateOf(work.deps.state, error.holder)) === 'busy') {
        if (Date.now() + pause > until) throw new TimeUp(work.before?.uploads);
        await sleep(pause);
        pause = Math.min(pause * 2, 5_000);
      }
    }
  }
}

/** Whether a claim counts: its slide has been taken in, is under way, or has been given up. */
async function stateOf(
  state: StateTable,
  holder: Holder,
): Promise<'busy' | 'free' | { bronze: BronzeSlide }> {
  const item = await state.slide(holder.runId, holder.slideId);
  if (item?.bronze) return { bronze: item.bronze };
  if (item && isFinal(item.state)) return 'free';
  return Date.parse(holder.until) > Date.now() ? 'busy' : 'free';
}

const holderOf = ({ run: { runId, study }, slide: { slideId } }: Work): Holder => ({
  runId,
  study,
  slideId,
  until: new Date(Date.now() + CLAIM_MS).toISOString(),
});

const isOwn = (holder: Holder, { run, slide }: Work): boolean =>
  holder.runId === run.runId && holder.study === run.study && holder.slideId === slide.slideId;

// --- taking in ----------------------------------------------------------------------------------------------------

async function takeIn(work: Work): Promise<Taken> {
  const taken = await takenOrCopied(work);
  const { slide, run, deps } = work;
  const { bronze } = taken;
  // One content is one object in Bronze, so that this stands for it.
  const object = [bronze.bucket, bronze.key, bronze.files[0]?.versionId ?? null];
  const asked = [object, [...slide.models].sort(), slide.mpp ?? null];
  const key = askedKey(run.runId, sha256(canonicalJson(asked)));
  const mine = holderOf(work);
  for (;;) {
    const other = await deps.holdings.claim(key, mine);
    if (!other) return taken;
    const there = await stateOf(deps.state, other);
    if (there === 'busy') throw new Busy(other);
    if (there !== 'free') return { ...taken, sameAs: other.slideId };
    if (await deps.holdings.takeOver(key, other, mine)) return taken;
  }
}

/** The slide in Bronze: as an earlier run or another slide brought it there, else copied. */
async function takenOrCopied(work: Work): Promise<Taken> {
  const { slide, deps, run } = work;
  const { s3, state, holdings, duplicates } = deps;
  if (slide.bronze) {
    const { bronze } = slide;
    await checkTaken(s3, bronze);
    return { bronze, sources: bronze.files.map((file) => ({ bucket: bronze.bucket, ...lineageOf(file) })) };
  }
  const { source, target } = slide;
  if (!source || !target) throw new Error(`${slide.slideId}: the plan's line has no source or target`);
  const files = await seeFiles(s3, source);
  const contents = contentsOf(files, source);
  const seen = contents.at(-1) ?? '';
  if (work.before?.content !== undefined && work.before.content !== seen)
    throw new SlideChanged(`${source.key} changed while it was copied. Drop the manifest again.`);
  const sources = files.map(lineageOfSource);

  const held = await holdings.holder(slideKey(run.study, slide.slideId));
  const own = held && (await stateOf(state, held));
  const standing = typeof own === 'object' ? own.bronze : undefined;
  let replace = false;
  if (held && standing) {
    if (contents.some((content) => held.contents?.includes(content))) {
      if (await stands(s3, standing)) return { bronze: standing, sources };
    } else if (duplicates === 'replace') replace = true;
    else if (contents.length > 1) throw otherContent(slide.slideId);
  }

  const first = await contentInBronze(work, contents);
  const taken =
    first ?? (await copySlide(work, files, source, target, { replace, seen, ...(standing && { standing }) }));
  if (!first) {
    const checksums = taken.bronze.files.map(({ checksum }) => checksum);
    contents.unshift(contentOf(files, source, checksums));
  }
  // Only now is it known where the source did not tell.
  const before = first ? undefined : await broughtBefore(work, contents[0] ?? '');
  if (!(await holdSlide(work, { ...holderOf(work), contents: [...new Set(contents)] }, replace)))
    throw otherContent(slide.slideId);
  return { ...taken, ...before, sources, ...(replace && { replaced: true }) };
}

const otherContent = (slideId: string) =>
  new NameTaken(
    `Bronze holds other content under the slide_id ${slideId}. Give the slide another slide_id, or have the stage replace.`,
  );

/** Whether a slide lies in Bronze as it was taken in. */
async function stands(s3: S3Client, bronze: BronzeSlide): Promise<boolean> {
  try {
    await checkTaken(s3, bronze);
    return true;
  } catch (error) {
    if (error instanceof BronzeChanged) return false;
    throw error;
  }
}

/** What another slide of the same content was taken in as; else the content is this slide's to bring. */
async function contentInBronze(work: Work, contents: string[]): Promise<Omit<Taken, 'sources'> | undefined> {
  const { deps } = work;
  const mine = holderOf(work);
  for (const content of contents) {
    const key = contentKey(content);
    for (;;) {
      const other = await deps.holdings.claim(key, mine);
      if (!other) {
        work.claims.push(key);
        break;
      }
      const there = await stateOf(deps.state, other);
      if (there === 'busy') throw new Busy(other);
      if (there !== 'free' && (await stands(deps.s3, there.bronze))) {
        if (deps.duplicates === 'error') throw contentSeen(other);
        return { bronze: there.bronze, duplicateOf: named(other) };
      }
      if (await deps.holdings.takeOver(key, other, mine)) {
        work.claims.push(key);
        break;
      }
    }
  }
  return undefined;
}

/** Claims the content of what was copied; what another slide had brought of it before. */
async function broughtBefore(
  work: Work,
  content: string,
): Promise<Pick<Taken, 'bronze' | 'duplicateOf'> | undefined> {
  const { deps } = work;
  const key = contentKey(content);
  const other = await deps.holdings.claim(key, holderOf(work));
  const there = other && (await stateOf(deps.state, other));
  if (!other) work.claims.push(key);
  else if (typeof there === 'object' && (await stands(deps.s3, there.bronze))) {
    if (deps.duplicates === 'error') throw contentSeen(other);
    return { bronze: there.bronze, duplicateOf: named(other) };
  } else await deps.holdings.takeOver(key, other, holderOf(work));
  return undefined;
}

const named = ({ runId, study, slideId }: Holder) => ({ runId, study, slideId });

const contentSeen = ({ study, slideId }: Holder) =>
  new ContentSeen(
    `The same content is in Bronze already, as the slide ${slideId} of ${study}. Take the row out, or have the stage skip duplicates.`,
  );

/** Puts down what stands under the slide's id; false when other content came to stand there meanwhile. */
async function holdSlide(work: Work, mine: Holder, replace: boolean): Promise<boolean> {
  const { holdings, state } = work.deps;
  const key = slideKey(work.run.study, work.slide.slideId);
  for (;;) {
    const other = await holdings.holder(key);
    const same = other?.contents?.some((content) => mine.contents?.includes(content));
    if (other && !same && !replace && !isOwn(other, work) && (await stateOf(state, other)) !== 'free')
      return false;
    if (await holdings.takeOver(key, other, mine)) return true;
  }
}

// --- copying ------------------------------------------------------------------------------------------------------

interface Copying {
  replace: boolean;
  /** What stands under the slide's id: the same, as far as can be told, or what is to be replaced. */
  standing?: BronzeSlide;
  /** The slide's files as one checksum. */
  seen: string;
}

/** Copies under the canonical name, or where it cannot be had under a safe one. */
async function copySlide(
  work: Work,
  files: Source[],
  source: SlideSource,
  target: NonNullable<PlannedSlide['target']>,
  copying: Copying,
): Promise<Pick<Taken, 'bronze' | 'name' | 'proofs'>> {
  const { slide, run } = work;
  const { name: wanted, fallback = wanted, prefix } = target;
  const standing = copying.standing && topName(copying.standing.key, prefix);
  const marked = markedName(slide.slideId, source.kind === 'dicom' ? '' : slide.slide, copying.seen);
  // What stands under the slide's id has a name already.
  const names = standing ? [standing] : [...new Set([wanted, fallback, marked])];
  let reason = target.reason;
  for (const name of names) {
    const key = name === wanted && wanted !== fallback ? nameKey(run.study, name) : undefined;
    if (key && !(await claimName(work, key))) {
      reason = { error: 'NameTaken', message: `Another slide of the study is named ${name}.` };
      continue;
    }
    try {
      const { bronze, proofs } = await copyFiles(work, files, source, { prefix, name }, copying);
      return {
        bronze,
        proofs,
        name: { name, ...(reason && { reason }), ...(reason && name !== wanted && { wanted }) },
      };
    } catch (error) {
      if (!(error instanceof NameTaken || error instanceof NameRefused)) throw error;
      reason = reasonOf(error);
      if (key) await work.deps.holdings.release(key, holderOf(work));
      if (name === names.at(-1)) throw error;
    }
  }
  throw new NameTaken(`No name could be had for the slide: ${reason?.message ?? ''}`);
}

/** A name that another slide has may be given up by it: asked for again, then not. */
async function claimName(work: Work, key: ReturnType<typeof nameKey>): Promise<boolean> {
  const { holdings, state } = work.deps;
  const mine = holderOf(work);
  for (let attempt = 1; attempt <= NAME_ATTEMPTS; attempt++) {
    const other = await holdings.claim(key, mine);
    const free = other && (await stateOf(state, other)) === 'free';
    if (!other || (free && (await holdings.takeOver(key, other, mine)))) {
      work.claims.push(key);
      return true;
    }
    if (attempt < NAME_ATTEMPTS) await sleep(100 * 2 ** attempt);
  }
  return false;
}

async function copyFiles(
  { run, slide: { slideId }, before, deps }: Work,
  planned: Source[],
  source: SlideSource,
  { prefix, name }: { prefix: string; name: string },
  { replace, seen }: Copying,
): Promise<{ bronze: BronzeSlide; proofs: Proof[] }> {
  const { s3, bronzeBucket, timeLeft, limits } = deps;
  const files: BronzeFile[] = new Array(planned.length);
  const proofs = new Set<Proof>();
  const uploads: Continuation['uploads'] = {};
  let late = false;
  await forEachConcurrently([...planned.entries()], FILE_CONCURRENCY, async ([index, file]) => {
    const upload = before?.uploads[file.key];
    if (late) {
      if (upload) uploads[file.key] = upload;
      return;
    }
    const copied = await copyObject(
      s3,
      file,
      {
        bucket: bronzeBucket,
        key: prefix + bronzeName(source, name, file.key),
        tags: { run: run.runId, slide: slideId, study: run.study },
        replace,
      },
      { ...limits, ...(timeLeft && { timeLeft }), upload },
    );
    if ('unfinished' in copied) {
      late = true;
      if (copied.upload) uploads[file.key] = copied.upload;
      return;
    }
    const { source: _, proof, ...there } = copied;
    files[index] = there;
    proofs.add(proof);
  });
  if (late) throw new TimeUp(uploads, seen);
  const [main] = files;
  if (!main) throw new SlideChanged(`${source.key} has no files any more. Copy it to Landing again.`);
  if (source.folder) {
    const now = contentsOf(await listFiles(s3, source), source).at(-1);
    if (now !== seen)
      throw new SlideChanged(`${source.key} changed while it was copied. Drop the manifest again.`);
  }
  return {
    proofs: [...proofs].sort(),
    bronze: {
      bucket: bronzeBucket,
      key: main.key,
      files,
      size: files.reduce((sum, { size }) => sum + size, 0),
      checksum: slideChecksum(files, prefix),
    },
  };
}

// --- the files of a slide -----------------------------------------------------------------------------------------

type Listed = Pick<Source, 'key' | 'etag' | 'size'> & Partial<Pick<Source, 'head'>>;

/** The slide's objects as they are now; the one that is opened comes first. */
async function seeFiles(s3: S3Client, source: SlideSource): Promise<Source[]> {
  const { bucket } = source;
  if (!source.folder) return [await seeSource(s3, source)];
  const listed = await listFiles(s3, source);
  const size = listed.reduce((sum, file) => sum + file.size, 0);
  if (listed.length !== source.files || size !== source.size) {
    throw new SlideChanged(
      `${source.key}: ${source.files} files of ${source.size} bytes when the run was planned, ${listed.length} of ${size} now. Drop the manifest again when the upload is complete.`,
    );
  }
  const seen: Source[] = new Array(listed.length);
  await forEachConcurrently([...listed.entries()], FILE_CONCURRENCY, async ([index, { key, etag }]) => {
    const planned = key === source.key ? (source.etag ?? etag) : etag;
    seen[index] = await seeSource(s3, { bucket, key, etag: planned });
  });
  return seen;
}

/** The files of a slide of several, the one that is opened first. */
async function listFiles(s3: S3Client, { bucket, kind, key, folder = '' }: SlideSource): Promise<Listed[]> {
  const files: Listed[] = [];
  if (kind !== 'dicom') files.push(await seeSource(s3, { bucket, key }));
  for await (const page of paginateListObjectsV2({ client: s3 }, { Bucket: bucket, Prefix: folder })) {
    for (const { Key = '', ETag = '', Size = 0 } of page.Contents ?? []) {
      if (!Key.endsWith('/')) files.push({ key: Key, etag: ETag, size: Size });
    }
  }
  return files;
}

/** A file's name below the slide's prefix in Bronze: companions keep their places beside the renamed file. */
export function bronzeName(source: SlideSource, name: string, key: string): string {
  if (!source.folder || key === source.key) return name;
  const inside = key.slice(source.folder.length);
  const stem = name.replace(/\.[^.]+$/, '');
  if (source.kind === 'mrxs') return `${stem}/${inside}`;
  if (source.kind === 'vsi') return `_${stem}_/${inside}`;
  return `${name}/${inside}`;
}

/** The name that the slide itself has: that of its file, or of its folder. */
const topName = (key: string, prefix: string) => key.slice(prefix.length).split('/')[0] ?? '';

/** One file's own checksum; of several, SHA-256 over their names and checksums, sorted. */
export function slideChecksum(files: BronzeFile[], prefix: string): string {
  if (files.length === 1 && files[0]) return files[0].checksum;
  const lines = files.map(({ key, checksum }) => `${key.slice(prefix.length)} ${checksum}\n`);
  return `sha256:${sha256(lines.sort().join(''))}`;
}

// --- what is in a slide -------------------------------------------------------------------------------------------

const sha256 = (text: string) => createHash('sha256').update(text).digest('hex');

/**
 * The contents of a slide, whatever it is called: by S3's CRC64NVME where every file has one, and last by the ETags.
 * A CRC of fewer bits is too short to tell slides apart by.
 */
function contentsOf(files: Listed[], source: SlideSource): string[] {
  const etags = files.map(({ etag }) => `etag:${etag.replaceAll('"', '')}`);
  const crcs = files.map(({ head }) => head?.ChecksumCRC64NVME);
  return [
    ...(crcs.every(Boolean)
      ? [
          contentOf(
            files,
            source,
            crcs.map((crc) => `crc64nvme:${crc}`),
          ),
        ]
      : []),
    contentOf(files, source, etags),
  ];
}

/** One file's checksum and size; of several, a hash over the places, checksums and sizes of all. */
function contentOf(files: Listed[], source: SlideSource, checksums: string[]): string {
  if (!source.folder) return `${checksums[0]}/${files[0]?.size}`;
  const lines = files.map(({ key, size }, index) => {
    const place = key === source.key ? '' : key.slice(source.folder?.length);
    return `${place} ${checksums[index]} ${size}\n`;
  });
  const algorithm = checksums[0]?.split(':')[0];
  return `${algorithm}:sha256:${sha256(lines.sort().join(''))}/${files.reduce((sum, { size }) => sum + size, 0)}`;
}
