/**
 * Copies one object within S3, byte for byte: server-side, the source pinned by ETag and version, never over an
 * object that is there, and held against the source by whatever checksum of the whole the source has. What stands in
 * Bronze has S3's full-object CRC64NVME, which is the same however an object was uploaded.
 *
 * A copy that has no time left stops between two parts and gives its upload's id, with which it goes on later.
 */
import {
  AbortMultipartUploadCommand,
  type CompletedPart,
  CompleteMultipartUploadCommand,
  CopyObjectCommand,
  CreateMultipartUploadCommand,
  GetObjectAttributesCommand,
  GetObjectTaggingCommand,
  HeadObjectCommand,
  type HeadObjectCommandOutput,
  ListPartsCommand,
  type S3Client,
  UploadPartCopyCommand,
} from '@aws-sdk/client-s3';
import { forEachConcurrently } from './concurrency.ts';
import type { BronzeFile } from './contracts.ts';
import { type Crc32, type CrcPart, joinCrcs } from './crc.ts';
import { ChecksumMismatch, isNotFound, NameRefused, NameTaken, SlideChanged } from './errors.ts';
import type { LineageObject } from './lineage.ts';

const MiB = 2 ** 20;
/** CopyObject takes objects up to 5 GB; larger ones go part by part. */
export const COPY_OBJECT_LIMIT = 5 * 1000 ** 3;
export const MAX_PARTS = 10_000;
/** Small, so that a part is soon done and many go at once: a slide of 50 GB has 373. */
export const PART_SIZE = 128 * MiB;
export const PART_CONCURRENCY = 32;
/** A copy that met somebody else's write of the same key starts again, so often. */
const ATTEMPTS = 4;
/** What S3 copies at worst of one part; a part is not begun when less time is left than it takes. */
const SLOWEST_BYTES_PER_MS = 10_000;
/** Time for completing, verifying and putting on record. */
const LAST_STEPS_MS = 45_000;

/** An object of Landing as it was seen at one moment: which version, which bytes. */
export interface Source {
  bucket: string;
  key: string;
  etag: string;
  versionId?: string;
  size: number;
  head: HeadObjectCommandOutput;
}

export interface CopyTarget {
  bucket: string;
  key: string;
  tags: Record<string, string>;
  /** A new version of what stands there is wanted, where that has other content. */
  replace?: boolean;
}

/** A copy that is under way in S3. */
export interface Upload {
  uploadId: string;
  /** The source whose parts it has. */
  etag: string;
  versionId?: string | undefined;
}

export interface CopyOptions {
  copyObjectLimit?: number;
  partSize?: number;
  /** Milliseconds until the caller is ended. */
  timeLeft?(): number;
  /** What an earlier call began. */
  upload?: Upload | undefined;
}

/** How what stands in Bronze was held against the source. `size`: S3 keeps no checksum of the source as a whole. */
export type Proof = 'crc64nvme' | 'md5' | 'crc32' | 'crc32c' | 'size';

/** What stands in Bronze, and what it is a copy of. */
export type Copied = BronzeFile & { source: LineageObject; proof: Proof };

/** The time was up. */
export interface Unfinished {
  unfinished: true;
  upload?: Upload;
}

/** Byte ranges of the parts of an object: as small as `partSize` allows, at most 10,000. */
export function partRanges(size: number, partSize = PART_SIZE): { first: number; last: number }[] {
  const length = Math.max(partSize, Math.ceil(size / MAX_PARTS / MiB) * MiB);
  return Array.from({ length: Math.ceil(size / length) }, (_, index) => ({
    first: index * length,
    last: Math.min((index + 1) * length, size) - 1,
  }));
}

/**
 * Sees an object of Landing, and pins it.
 * @throws {SlideChanged} it is gone, or has another ETag than `etag`.
 */
export async function seeSource(
  s3: S3Client,
  { bucket, key, etag }: { bucket: string; key: string; etag?: string | undefined },
): Promise<Source> {
  const found = await head(s3, { bucket, key });
  if (!found?.ETag || (etag !== undefined && found.ETag !== etag)) {
    throw new SlideChanged(
      `${key} ${found ? 'changed' : 'vanished'} after the run was planned. Drop the manifest again when the upload is complete.`,
    );
  }
  return {
    bucket,
    key,
    etag: found.ETag,
    ...(found.VersionId && { versionId: found.VersionId }),
    size: found.ContentLength ?? 0,
    head: found,
  };
}

/** An object of Landing as it goes on record. */
export const lineageOfSource = ({ bucket, key, versionId, etag, head: found }: Source): LineageObject => ({
  bucket,
  key,
  ...(versionId && { versionId }),
  checksum: found.ChecksumCRC64NVME
    ? `crc64nvme:${found.ChecksumCRC64NVME}`
    : `etag:${etag.replaceAll('"', '')}`,
});

/**
 * Copies `source` to `target` and says what stands there, or that the time was up.
 * An object that is there already with the same bytes counts as copied.
 * @throws {SlideChanged} the source is not what was seen. {NameTaken} other content stands under the target's key.
 * @throws {NameRefused} S3 takes no object of that key. {ChecksumMismatch} what arrived differs from the source.
 */
export async function copyObject(
  s3: S3Client,
  source: Source,
  target: CopyTarget,
  options: CopyOptions = {},
): Promise<Copied | Unfinished> {
  const { copyObjectLimit = COPY_OBJECT_LIMIT } = options;
  let { upload } = options;
  if (upload && (upload.etag !== source.etag || upload.versionId !== source.versionId)) {
    await abort(s3, target, upload.uploadId);
    throw new SlideChanged(`${source.key} changed while it was copied. Drop the manifest again.`);
  }
  for (let attempt = 1; ; attempt++) {
    const there = await head(s3, target);
    const proof = there && (await prove(s3, source, there, target));
    if (proof) return describe(source, target, there, proof);
    if (there && !target.replace) throw new NameTaken(taken(target.key));
    if (timeFor(source.size > copyObjectLimit ? 0 : source.size, options) < 0)
      return { unfinished: true, ...(upload && { upload }) };
    try {
      const condition = there ? { IfMatch: there.ETag } : { IfNoneMatch: '*' };
      if (source.size <= copyObjectLimit && (await copyWhole(s3, source, target, condition))) break;
      const begun = await copyInParts(s3, source, target, condition, { ...options, upload });
      if (begun) return { unfinished: true, upload: begun };
      break;
    } catch (error) {
      upload = undefined;
      const name = error instanceof Error ? error.name : '';
      if (['KeyTooLongError', 'KeyTooLong', 'InvalidURI', 'InvalidObjectName'].includes(name)) {
        throw new NameRefused(`S3 takes no object named ${target.key}: ${name}`);
      }
      if (name === 'BadDigest') throw new ChecksumMismatch(differs(target.key));
      // Somebody, perhaps an earlier attempt of ours, was first under this key, or the source changed under the copy.
      // An upload that is gone may have been completed, and the answer lost.
      if (!['PreconditionFailed', 'ConditionalRequestConflict', 'NoSuchUpload'].includes(name)) throw error;
      await seeSource(s3, source);
      if (attempt === ATTEMPTS) throw error;
    }
  }
  const after = await head(s3, target);
  const proof = after && (await prove(s3, source, after, target));
  if (!proof) throw new ChecksumMismatch(differs(target.key));
  return describe(source, target, after, proof);
}

const differs = (key: string) => `${key} arrived in Bronze with other bytes than it has in Landing`;

const taken = (key: string) => `Bronze holds other content under ${key}. Give the slide another slide_id.`;

/** Milliseconds left when so many bytes will have been copied at worst; negative when there are too few. */
const timeFor = (bytes: number, { timeLeft }: CopyOptions): number =>
  timeLeft ? timeLeft() - LAST_STEPS_MS - Math.min(bytes / SLOWEST_BYTES_PER_MS, 240_000) : 1;

async function head(
  s3: S3Client,
  { bucket, key }: { bucket: string; key: string },
): Promise<HeadObjectCommandOutput | undefined> {
  try {
    return await s3.send(new HeadObjectCommand({ Bucket: bucket, Key: key, ChecksumMode: 'ENABLED' }));
  } catch (error) {
    if (isNotFound(error)) return undefined;
    throw error;
  }
}

// --- is it the same ---------------------------------------------------------------------------------------------

function describe(
  source: Source,
  { key }: CopyTarget,
  { VersionId, ContentLength, ChecksumCRC64NVME }: HeadObjectCommandOutput,
  proof: Proof,
): Copied {
  if (!ChecksumCRC64NVME) throw new ChecksumMismatch(`${key}: S3 gave no CRC64NVME checksum`);
  return {
    key,
    ...(VersionId && { versionId: VersionId }),
    size: ContentLength ?? 0,
    checksum: `crc64nvme:${ChecksumCRC64NVME}`,
    source: lineageOfSource(source),
    proof,
  };
}

/** How the object in Bronze was found to have the source's bytes; undefined when it has others. */
async function prove(
  s3: S3Client,
  { size, head: source, ...from }: Source,
  there: HeadObjectCommandOutput,
  target: CopyTarget,
): Promise<Proof | undefined> {
  if (there.ContentLength !== size) return undefined;
  const proof = (same: boolean, by: Proof) => (same ? by : undefined);
  if (source.ChecksumCRC64NVME && there.ChecksumCRC64NVME)
    return proof(source.ChecksumCRC64NVME === there.ChecksumCRC64NVME, 'crc64nvme');
  const [was, is] = [md5Of(source), md5Of(there)];
  if (was && is) return proof(was === is, 'md5');
  for (const algorithm of ['CRC32', 'CRC32C'] as const) {
    const expected = await wholeCrc(s3, { ...from, head: source }, algorithm);
    if (!expected) continue;
    const found = await crcInBronze(s3, target, there, algorithm);
    return proof(expected === found, algorithm === 'CRC32' ? 'crc32' : 'crc32c');
  }
  return 'size';
}

/** The MD5 that an ETag is: of an object put in one piece that is not encrypted with a key of KMS. */
const md5Of = ({ ETag = '', ServerSideEncryption: encryption }: HeadObjectCommandOutput) =>
  /^"?[0-9a-f]{32}"?$/.test(ETag) && (encryption ?? 'AES256') === 'AES256' ? ETag : undefined;

/** The source's own CRC of the whole, joined of those of its parts where it has only them. */
async function wholeCrc(
  s3: S3Client,
  { bucket, key, versionId, head: found }: Omit<Source, 'size'>,
  algorithm: Crc32,
): Promise<string | undefined> {
  const value = found[`Checksum${algorithm}`];
  if (!value) return undefined;
  if (found.ChecksumType !== 'COMPOSITE') return value;
  const parts: CrcPart[] = [];
  let marker: string | undefined;
  do {
    const { ObjectParts: page } = await s3.send(
      new GetObjectAttributesCommand({
        Bucket: bucket,
        Key: key,
        VersionId: versionId,
        ObjectAttributes: ['ObjectParts'],
        PartNumberMarker: marker,
      }),
    );
    for (const { Size, [`Checksum${algorithm}` as const]: crc } of page?.Parts ?? []) {
      if (Size === undefined || !crc) return undefined;
      parts.push({ crc, size: Size });
    }
    marker = page?.IsTruncated ? page.NextPartNumberMarker : undefined;
  } while (marker);
  return parts.length > 0 ? joinCrcs(algorithm, parts) : undefined;
}

/**
 * Has S3 compute a CRC of what stands in Bronze: an object keeps one algorithm only, so its parts are copied into an
 * upload of the other one, which is never completed.
 */
async function crcInBronze(
  s3: S3Client,
  { bucket, key }: CopyTarget,
  { ETag, VersionId, ContentLength: size = 0 }: HeadObjectCommandOutput,
  algorithm: Crc32,
): Promise<string> {
  const where = { Bucket: bucket, Key: key };
  const { UploadId } = await s3.send(
    new CreateMultipartUploadCommand({ ...where, ChecksumAlgorithm: algorithm, ChecksumType: 'FULL_OBJECT' }),
  );
  try {
    const ranges = partRanges(size);
    const parts: CrcPart[] = new Array(ranges.length);
    await forEachConcurrently([...ranges.entries()], PART_CONCURRENCY, async ([index, { first, last }]) => {
      const { CopyPartResult } = await s3.send(
        new UploadPartCopyCommand({
          ...where,
          UploadId,
          PartNumber: index + 1,
          CopySource: copySource(bucket, key, VersionId),
          CopySourceIfMatch: ETag,
          CopySourceRange: `bytes=${first}-${last}`,
        }),
      );
      parts[index] = { crc: CopyPartResult?.[`Checksum${algorithm}`] ?? '', size: last - first + 1 };
    });
    return joinCrcs(algorithm, parts);
  } finally {
    await abort(s3, { bucket, key }, UploadId);
  }
}

// --- what is carried over -----------------------------------------------------------------------------------------

const encodePath = (path: string) => path.split('/').map(encodeURIComponent).join('/');

const copySource = (bucket: string, key: string, versionId: string | undefined) =>
  `${bucket}/${encodePath(key)}${versionId ? `?versionId=${encodeURIComponent(versionId)}` : ''}`;

const pinned = ({ bucket, key, versionId, etag }: Source) => ({
  CopySource: copySource(bucket, key, versionId),
  CopySourceIfMatch: etag,
});

/** S3 keeps ten tags; Slideway's own come first. Values allow fewer characters than names of studies and slides do. */
export async function taggingOf(
  s3: S3Client,
  { bucket, key, versionId, head: found }: Source,
  own: Record<string, string>,
): Promise<string> {
  const tags = new Map(Object.entries(own));
  if (found.TagCount !== 0) {
    const { TagSet = [] } = await s3.send(
      new GetObjectTaggingCommand({ Bucket: bucket, Key: key, VersionId: versionId }),
    );
    const carried = TagSet.map(({ Key = '', Value = '' }) => [Key, Value] as const)
      .filter(([name]) => !tags.has(name) && !name.startsWith('aws:'))
      .sort(([a], [b]) => (a < b ? -1 : 1));
    for (const [name, value] of carried.slice(0, 10 - tags.size)) tags.set(name, value);
  }
  const query = new URLSearchParams();
  for (const [name, value] of tags) {
    query.set(name, value.replace(/[^\p{L}\p{N} +=._:/@-]/gu, '_').slice(0, 256));
  }
  return query.toString();
}

// --- copying ----------------------------------------------------------------------------------------------------

type Condition = { IfMatch?: string | undefined } | { IfNoneMatch: string };

/** False where S3 does not do it: a bucket whose policy demands conditions may refuse CopyObject altogether. */
async function copyWhole(s3: S3Client, source: Source, target: CopyTarget, condition: Condition) {
  try {
    await s3.send(
      new CopyObjectCommand({
        ...pinned(source),
        ...condition,
        Bucket: target.bucket,
        Key: target.key,
        ChecksumAlgorithm: 'CRC64NVME',
        TaggingDirective: 'REPLACE',
        Tagging: await taggingOf(s3, source, target.tags),
      }),
    );
    return true;
  } catch (error) {
    if (error instanceof Error && error.name === 'NotImplemented') return false;
    throw error;
  }
}

/** Copies what parts are missing, and completes; the upload where the time was up before. */
async function copyInParts(
  s3: S3Client,
  source: Source,
  target: CopyTarget,
  condition: Condition,
  options: CopyOptions,
): Promise<Upload | undefined> {
  const where = { Bucket: target.bucket, Key: target.key };
  const ranges = partRanges(source.size, options.partSize);
  const parts: CompletedPart[] = new Array(ranges.length);
  const found = options.upload && (await partsDone(s3, target, options.upload.uploadId));
  const UploadId = found ? options.upload?.uploadId : await createUpload(s3, source, target);
  let late = false;
  try {
    await forEachConcurrently([...ranges.entries()], PART_CONCURRENCY, async ([index, { first, last }]) => {
      const size = last - first + 1;
      const done = found?.get(index + 1);
      if (done?.size === size) {
        parts[index] = done.part;
        return;
      }
      late ||= timeFor(size, options) < 0;
      if (late) return;
      const { CopyPartResult } = await s3.send(
        new UploadPartCopyCommand({
          ...where,
          ...pinned(source),
          UploadId,
          PartNumber: index + 1,
          CopySourceRange: `bytes=${first}-${last}`,
        }),
      );
      parts[index] = {
        PartNumber: index + 1,
        ETag: CopyPartResult?.ETag,
        ChecksumCRC64NVME: CopyPartResult?.ChecksumCRC64NVME,
      };
    });
    if (late) {
      return {
        uploadId: UploadId ?? '',
        etag: source.etag,
        ...(source.versionId && { versionId: source.versionId }),
      };
    }
    await s3.send(
      new CompleteMultipartUploadCommand({
        ...where,
        ...condition,
        UploadId,
        MultipartUpload: { Parts: parts },
        MpuObjectSize: source.size,
        ChecksumType: 'FULL_OBJECT',
        ...(source.head.ChecksumCRC64NVME && { ChecksumCRC64NVME: source.head.ChecksumCRC64NVME }),
      }),
    );
    return undefined;
  } catch (error) {
    await abort(s3, target, UploadId);
    throw error;
  }
}

/** Copying part by part carries none of this over. */
async function createUpload(s3: S3Client, source: Source, target: CopyTarget): Promise<string | undefined> {
  const { Metadata, ContentType, CacheControl, ContentDisposition, ContentEncoding, ContentLanguage } =
    source.head;
  const { UploadId } = await s3.send(
    new CreateMultipartUploadCommand({
      Bucket: target.bucket,
      Key: target.key,
      Metadata,
      ContentType,
      CacheControl,
      ContentDisposition,
      ContentEncoding,
      ContentLanguage,
      Tagging: await taggingOf(s3, source, target.tags),
      ChecksumAlgorithm: 'CRC64NVME',
      ChecksumType: 'FULL_OBJECT',
    }),
  );
  return UploadId;
}

/** The parts that an upload has, by number; nothing where there is no such upload any more. */
async function partsDone(
  s3: S3Client,
  { bucket, key }: CopyTarget,
  uploadId: string,
): Promise<Map<number, { size: number; part: CompletedPart }> | undefined> {
  const done = new Map<number, { size: number; part: CompletedPart }>();
  // S3 names a next marker on the last page too, so that the SDK's paginator would never end.
  let marker: string | undefined;
  try {
    do {
      const page = await s3.send(
        new ListPartsCommand({ Bucket: bucket, Key: key, UploadId: uploadId, PartNumberMarker: marker }),
      );
      for (const { PartNumber = 0, ETag, Size = 0, ChecksumCRC64NVME } of page.Parts ?? [])
        done.set(PartNumber, { size: Size, part: { PartNumber, ETag, ChecksumCRC64NVME } });
      marker = page.IsTruncated ? page.NextPartNumberMarker : undefined;
    } while (marker);
  } catch (error) {
    if (error instanceof Error && error.name === 'NoSuchUpload') return undefined;
    throw error;
  }
  return done;
}

async function abort(
  s3: S3Client,
  { bucket, key }: { bucket: string; key: string },
  UploadId: string | undefined,
): Promise<void> {
  await s3.send(new AbortMultipartUploadCommand({ Bucket: bucket, Key: key, UploadId })).catch(() => {
    // The bucket's lifecycle rule removes what could not be aborted.
  });
}
