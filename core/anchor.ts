/**
 * Anchors: once a day the last event of every chain, with a root hash over all of them, in a bucket that nobody can
 * delete from. What stood in the record when an anchor was taken cannot be taken out of it later without showing.
 *
 *     anchors/<date>/heads-<time>.jsonl   {pk, sk, hash} of every chain, a line each
 *     anchors/<date>/anchor.json          what was anchored, root hash, link to the anchor before; written last
 */
import { createHash } from 'node:crypto';
import { createInterface } from 'node:readline';
import {
  ListObjectVersionsCommand,
  type ListObjectVersionsCommandOutput,
  PutObjectCommand,
  type S3Client,
} from '@aws-sdk/client-s3';
import { z } from 'zod';
import { SlidewayError } from './errors.ts';
import { canonicalJson } from './lineage.ts';
import type { ChainHead, LineageReader } from './record.ts';
import { readObject, readVersion, writeText } from './store.ts';

/** An anchor that is not what was written: its root hash or its heads do not come out. */
export class AnchorBroken extends SlidewayError {}

const PREFIX = 'anchors/';
const ANCHOR_FILE = 'anchor.json';
/** Broken heads that an anchor lists; it counts the others. */
const MAX_LISTED = 100;

const headSchema = z.object({ pk: z.string(), sk: z.string(), hash: z.string() });

const anchorSchema = z.object({
  /** UTC, `2026-11-20`. */
  date: z.string(),
  takenAt: z.string(),
  actor: z.string(),
  codeVersion: z.string(),
  heads: z.object({
    key: z.string(),
    versionId: z.string().optional(),
    count: z.number().int(),
    checksum: z.string(),
  }),
  previous: z.object({ key: z.string(), versionId: z.string().optional(), root: z.string() }).nullable(),
  /** Heads of the anchor before that the record no longer holds. */
  broken: z.object({ count: z.number().int(), first: z.array(headSchema) }),
  /** SHA-256 in hex over the canonical JSON of all of this but the root. */
  root: z.string(),
});
export type Anchor = z.infer<typeof anchorSchema>;

/** An anchor where it lies. */
export interface PlacedAnchor {
  date: string;
  bucket: string;
  key: string;
  /** Of the version that was written first, which is the anchor. */
  versionId: string | undefined;
  /** S3's own time of it. */
  written: Date;
  /** Versions and delete markers that came on top of it. */
  later: number;
}

export interface AnchorDependencies {
  s3: S3Client;
  record: LineageReader;
  bucket: string;
  actor: string;
  codeVersion: string;
}

/** Hash of all that an anchor says. */
export const rootOf = ({ root: _, ...rest }: Anchor): string =>
  createHash('sha256').update(canonicalJson(rest)).digest('hex');

/**
 * Takes the anchor of the day of `now`, once: where the day has one already, that one is the answer.
 * The record is held against the anchor before first, so that what was taken out of it since is known within a day.
 */
export async function takeAnchor(
  now: Date,
  { s3, record, bucket, actor, codeVersion }: AnchorDependencies,
): Promise<{ anchor: Anchor; taken: boolean }> {
  const takenAt = now.toISOString();
  const date = takenAt.slice(0, 10);
  const key = `${PREFIX}${date}/${ANCHOR_FILE}`;
  const placed = await listAnchors(s3, bucket);
  const today = placed.find((anchor) => anchor.date === date);
  if (today) return { anchor: await readAnchor(s3, today), taken: false };

  const before = placed.filter((anchor) => anchor.date < date).at(-1);
  const previous = before && (await readAnchor(s3, before));
  const broken: Anchor['broken'] = { count: 0, first: [] };
  if (previous) {
    for await (const { head } of record.changed(anchoredHeads(s3, bucket, previous))) {
      broken.count += 1;
      if (broken.first.length < MAX_LISTED) broken.first.push(head);
    }
  }

  let count = 0;
  async function* lines() {
    for await (const { pk, sk, hash } of record.heads()) {
      count += 1;
      yield `${JSON.stringify({ pk, sk, hash })}\n`;
    }
  }
  // A name of its own: what an attempt that was broken off has left is locked.
  const headsKey = `${PREFIX}${date}/heads-${takenAt.replace(/[-:.]/g, '')}.jsonl`;
  const heads = await writeText(s3, { bucket, key: headsKey }, lines(), 'application/x-ndjson');
  const anchor: Anchor = {
    date,
    takenAt,
    actor,
    codeVersion,
    heads: {
      key: heads.key,
      ...(heads.versionId && { versionId: heads.versionId }),
      count,
      checksum: heads.checksum,
    },
    previous:
      before && previous
        ? {
            key: before.key,
            ...(before.versionId && { versionId: before.versionId }),
            root: previous.root,
          }
        : null,
    broken,
    root: '',
  };
  anchor.root = rootOf(anchor);
  try {
    await s3.send(
      new PutObjectCommand({
        Bucket: bucket,
        Key: key,
        Body: `${JSON.stringify(anchor, null, 2)}\n`,
        ContentType: 'application/json',
        IfNoneMatch: '*',
      }),
    );
  } catch (error) {
    // Another invocation for the same day was first.
    if (!(error instanceof Error) || error.name !== 'PreconditionFailed') throw error;
    return takeAnchor(now, { s3, record, bucket, actor, codeVersion });
  }
  return { anchor, taken: true };
}

/** Every anchor, the oldest first. */
export async function listAnchors(s3: S3Client, bucket: string): Promise<PlacedAnchor[]> {
  const anchors = new Map<string, PlacedAnchor>();
  const markers = new Map<string, number>();
  for await (const { Versions = [], DeleteMarkers = [] } of versionPages(s3, bucket)) {
    for (const { Key: key = '', VersionId: versionId, LastModified: written = new Date(0) } of Versions) {
      const date = key.slice(PREFIX.length, -ANCHOR_FILE.length - 1);
      if (key !== `${PREFIX}${date}/${ANCHOR_FILE}`) continue;
      // Versions come newest first: the last one seen was written first.
      const known = anchors.get(key);
      anchors.set(key, { date, bucket, key, versionId, written, later: known ? known.later + 1 : 0 });
    }
    for (const { Key: key = '' } of DeleteMarkers) markers.set(key, (markers.get(key) ?? 0) + 1);
  }
  return [...anchors.values()]
    .map((anchor) => ({ ...anchor, later: anchor.later + (markers.get(anchor.key) ?? 0) }))
    .sort((a, b) => (a.date < b.date ? -1 : 1));
}

async function* versionPages(s3: S3Client, bucket: string): AsyncGenerator<ListObjectVersionsCommandOutput> {
  let page: ListObjectVersionsCommandOutput | undefined;
  do {
    page = await s3.send(
      new ListObjectVersionsCommand({
        Bucket: bucket,
        Prefix: PREFIX,
        KeyMarker: page?.NextKeyMarker,
        VersionIdMarker: page?.NextVersionIdMarker,
      }),
    );
    yield page;
  } while (page.IsTruncated);
}

/** @throws {AnchorBroken} when it is not an anchor, or its root does not come out. */
export async function readAnchor(s3: S3Client, { bucket, key, versionId }: PlacedAnchor): Promise<Anchor> {
  const found = await readVersion(s3, { bucket, key, versionId });
  if (!found) throw new AnchorBroken(`${key} is not in ${bucket} any more`);
  let document: unknown;
  try {
    document = JSON.parse(Buffer.from(found.bytes).toString('utf8'));
  } catch {
    throw new AnchorBroken(`${key} is not JSON`);
  }
  const parsed = anchorSchema.safeParse(document);
  if (!parsed.success) throw new AnchorBroken(`${key} is not an anchor: ${parsed.error.issues[0]?.message}`);
  const root = rootOf(parsed.data);
  if (root !== parsed.data.root) {
    throw new AnchorBroken(`${key} says its root is ${parsed.data.root}, but what it holds gives ${root}`);
  }
  return parsed.data;
}

/**
 * The heads that an anchor holds, as they are read.
 * @throws {AnchorBroken} at their end, when they are not those that were anchored.
 */
export async function* anchoredHeads(
  s3: S3Client,
  bucket: string,
  { heads }: Anchor,
): AsyncGenerator<ChainHead> {
  const body = await readObject(s3, { bucket, key: heads.key, versionId: heads.versionId });
  if (!body) throw new AnchorBroken(`${heads.key} is not in ${bucket} any more`);
  const hash = createHash('sha256');
  let count = 0;
  const lines = createInterface({ input: body, crlfDelay: Number.POSITIVE_INFINITY });
  for await (const line of lines) {
    hash.update(`${line}\n`);
    count += 1;
    yield parseHead(line, heads.key);
  }
  const checksum = `sha256:${hash.digest('hex')}`;
  if (checksum !== heads.checksum || count !== heads.count) {
    throw new AnchorBroken(
      `${heads.key} holds ${count} heads with ${checksum}; anchored were ${heads.count} with ${heads.checksum}`,
    );
  }
}

function parseHead(line: string, key: string): ChainHead {
  try {
    return headSchema.parse(JSON.parse(line));
  } catch {
    throw new AnchorBroken(`${key} has a line that is no head`);
  }
}
