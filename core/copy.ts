/**
 * Copies one object within S3, byte for byte: server-side, the source pinned by ETag and version, never over an
 * object that is there, and verified by S3's full-object CRC64NVME, which is the same however an object was uploaded.
 */
import {
  AbortMultipartUploadCommand,
  type CompletedPart,
  CompleteMultipartUploadCommand,
  CopyObjectCommand,
  CreateMultipartUploadCommand,
  HeadObjectCommand,
  type HeadObjectCommandOutput,
  type S3Client,
  UploadPartCopyCommand,
} from '@aws-sdk/client-s3';
import { forEachConcurrently } from './concurrency.ts';
import type { BronzeFile } from './contracts.ts';
import { ChecksumMismatch, isNotFound, NameTaken, SlideChanged } from './errors.ts';
import type { LineageObject } from './lineage.ts';

const MiB = 2 ** 20;
/** CopyObject takes objects up to 5 GB; larger ones go part by part. */
export const COPY_OBJECT_LIMIT = 5 * 1000 ** 3;
export const MAX_PARTS = 10_000;
const PART_SIZE = 128 * MiB;
const PART_CONCURRENCY = 16;

export interface CopySource {
  bucket: string;
  key: string;
  /** The ETag the source had when it was planned; a source that has another by now is refused. */
  etag?: string | undefined;
}

export interface CopyTarget {
  bucket: string;
  key: string;
  tags: Record<string, string>;
}

export interface CopyLimits {
  copyObjectLimit: number;
  partSize: number;
}

/** What stands in Bronze, and what it is a copy of: version and checksum as S3 had them. */
export type Copied = BronzeFile & { source: LineageObject };

/** Byte ranges of the parts of an object: as small as `partSize` allows, at most 10,000. */
export function partRanges(size: number, partSize = PART_SIZE): { first: number; last: number }[] {
  const length = Math.max(partSize, Math.ceil(size / MAX_PARTS / MiB) * MiB);
  return Array.from({ length: Math.ceil(size / length) }, (_, index) => ({
    first: index * length,
    last: Math.min((index + 1) * length, size) - 1,
  }));
}

/**
 * Copies `source` to `target` and says what stands there.
 * An object that is there already with the same bytes counts as copied.
 * @throws {SlideChanged} the source is not what was planned. {NameTaken} other content stands under the target's key.
 * @throws {ChecksumMismatch} what arrived differs from the source.
 */
export async function copyObject(
  s3: S3Client,
  source: CopySource,
  target: CopyTarget,
  limits: CopyLimits = { copyObjectLimit: COPY_OBJECT_LIMIT, partSize: PART_SIZE },
): Promise<Copied> {
  const before = await headSource(s3, source);
  const from = sourceOf(source, before);
  const there = await head(s3, target);
  if (there) return { ...sameContent(before, there, target), source: from };
  try {
    if ((before.ContentLength ?? 0) <= limits.copyObjectLimit) await copyWhole(s3, source, before, target);
    else await copyInParts(s3, source, before, target, limits.partSize);
  } catch (error) {
    const name = error instanceof Error ? error.name : '';
    // Somebody, perhaps an earlier attempt of ours, was first under this key, or the source changed under the copy.
    if (!['PreconditionFailed', 'ConditionalRequestConflict'].includes(name)) throw error;
    await headSource(s3, source);
    const other = await head(s3, target);
    if (!other) throw error;
    return { ...sameContent(before, other, target), source: from };
  }
  const after = await head(s3, target);
  if (!after) throw new ChecksumMismatch(`${target.key} is not in Bronze after its copy`);
  verify(before, after, target.key, ChecksumMismatch);
  return { ...describe(target.key, after), source: from };
}

const sourceOf = (
  { bucket, key }: CopySource,
  { VersionId, ChecksumCRC64NVME, ETag }: HeadObjectCommandOutput,
): LineageObject => ({
  bucket,
  key,
  ...(VersionId && { versionId: VersionId }),
  checksum: ChecksumCRC64NVME ? `crc64nvme:${ChecksumCRC64NVME}` : `etag:${ETag?.replaceAll('"', '')}`,
});

async function headSource(s3: S3Client, source: CopySource): Promise<HeadObjectCommandOutput> {
  const found = await head(s3, source);
  if (!found || (source.etag !== undefined && found.ETag !== source.etag)) {
    throw new SlideChanged(
      `${source.key} ${found ? 'changed' : 'vanished'} after the run was planned. Drop the manifest again when the upload is complete.`,
    );
  }
  return found;
}

async function head(s3: S3Client, { bucket, key }: { bucket: string; key: string }) {
  try {
    return await s3.send(new HeadObjectCommand({ Bucket: bucket, Key: key, ChecksumMode: 'ENABLED' }));
  } catch (error) {
    if (isNotFound(error)) return undefined;
    throw error;
  }
}

function sameContent(
  source: HeadObjectCommandOutput,
  there: HeadObjectCommandOutput,
  target: CopyTarget,
): BronzeFile {
  verify(source, there, target.key, NameTaken);
  return describe(target.key, there);
}

/** Compares by the whole object's checksum where both have one, by ETag where both are plain MD5, and by size always. */
function verify(
  source: HeadObjectCommandOutput,
  there: HeadObjectCommandOutput,
  key: string,
  Mismatch: typeof ChecksumMismatch | typeof NameTaken,
): void {
  const differs = (a: string | undefined, b: string | undefined) =>
    a !== undefined && b !== undefined && a !== b;
  const md5 = (etag: string | undefined) => (etag?.includes('-') ? undefined : etag);
  const comparable = source.ChecksumCRC64NVME !== undefined && there.ChecksumCRC64NVME !== undefined;
  if (
    source.ContentLength !== there.ContentLength ||
    differs(source.ChecksumCRC64NVME, there.ChecksumCRC64NVME) ||
    (!comparable && differs(md5(source.ETag), md5(there.ETag)))
  ) {
    throw new Mismatch(
      Mismatch === NameTaken
        ? `Bronze holds other content under ${key}. Give the slide another slide_id.`
        : `${key} arrived in Bronze with other bytes than it has in Landing`,
    );
  }
}

function describe(key: string, there: HeadObjectCommandOutput): BronzeFile {
  if (!there.ChecksumCRC64NVME) throw new ChecksumMismatch(`${key}: S3 gave no CRC64NVME checksum`);
  return {
    key,
    ...(there.VersionId && { versionId: there.VersionId }),
    size: there.ContentLength ?? 0,
    checksum: `crc64nvme:${there.ChecksumCRC64NVME}`,
  };
}

const encodePath = (path: string) => path.split('/').map(encodeURIComponent).join('/');

const pinned = (source: CopySource, { ETag, VersionId }: HeadObjectCommandOutput) => ({
  CopySource: `${source.bucket}/${encodePath(source.key)}${VersionId ? `?versionId=${encodeURIComponent(VersionId)}` : ''}`,
  CopySourceIfMatch: ETag,
});

/** Tag values allow fewer characters than names of studies and slides do. */
const tagging = (tags: Record<string, string>): string => {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(tags)) {
    query.set(name, value.replace(/[^\p{L}\p{N} +=._:/@-]/gu, '_').slice(0, 256));
  }
  return query.toString();
};

async function copyWhole(
  s3: S3Client,
  source: CopySource,
  before: HeadObjectCommandOutput,
  target: CopyTarget,
) {
  await s3.send(
    new CopyObjectCommand({
      ...pinned(source, before),
      Bucket: target.bucket,
      Key: target.key,
      IfNoneMatch: '*',
      ChecksumAlgorithm: 'CRC64NVME',
      TaggingDirective: 'REPLACE',
      Tagging: tagging(target.tags),
    }),
  );
}

async function copyInParts(
  s3: S3Client,
  source: CopySource,
  before: HeadObjectCommandOutput,
  target: CopyTarget,
  partSize: number,
) {
  const where = { Bucket: target.bucket, Key: target.key };
  const { UploadId } = await s3.send(
    new CreateMultipartUploadCommand({
      ...where,
      // Copying part by part carries neither of these over.
      Metadata: before.Metadata,
      ContentType: before.ContentType,
      Tagging: tagging(target.tags),
      ChecksumAlgorithm: 'CRC64NVME',
      ChecksumType: 'FULL_OBJECT',
    }),
  );
  try {
    const ranges = partRanges(before.ContentLength ?? 0, partSize);
    const parts: CompletedPart[] = new Array(ranges.length);
    await forEachConcurrently([...ranges.entries()], PART_CONCURRENCY, async ([index, { first, last }]) => {
      const { CopyPartResult } = await s3.send(
        new UploadPartCopyCommand({
          ...where,
          ...pinned(source, before),
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
    await s3.send(
      new CompleteMultipartUploadCommand({
        ...where,
        UploadId,
        MultipartUpload: { Parts: parts },
        IfNoneMatch: '*',
        ChecksumType: 'FULL_OBJECT',
      }),
    );
  } catch (error) {
    await s3.send(new AbortMultipartUploadCommand({ ...where, UploadId })).catch(() => {
      // The bucket's lifecycle rule removes what could not be aborted.
    });
    throw error;
  }
}
