/**
 * Multipart uploads. The parts of an upload are written side by side into one file, each where it will be in the
 * object, so that completing copies nothing; a part that does not fit there gets a file of its own.
 */
import { createHash } from 'node:crypto';
import { z } from 'zod';
import {
  type Algorithm,
  type Checksum,
  type ChecksumType,
  createDigest,
  Digests,
  isCrc,
  joinCrcs,
} from './checksum.ts';
import { checkSource } from './conditions.ts';
import { type Content, type Extent, merge, slice } from './content.ts';
import {
  authorizePut,
  base64,
  checksumElements,
  describe,
  encryptionHeaders,
  isoTime,
  type Objects,
} from './objects.ts';
import {
  BODY_BYTES,
  checksumHeader,
  declaredAlgorithm,
  Payload,
  type Proven,
  parseAlgorithm,
} from './payload.ts';
import { Batch, newUploadId, type Part, type Piece, type Store, type Upload } from './store.ts';
import { namer, quoted, type Reply, readXml, S3Error, type S3Request, toXml, unquoted } from './wire.ts';

const MIN_PART_BYTES = 5 * 1024 ** 2;
const MAX_PARTS = 10_000;
/** Parts lie at most this far into the shared file, for file systems with a limit on sparse files. */
const SHARED_FILE_BYTES = 8 * 1024 ** 4;

/** The shared file of an upload that this process has begun: part n has its slot at (n − 1) × `slotBytes`. */
interface SharedFile {
  held: Extent;
  slotBytes: number;
  taken: Set<number>;
}

export class Multipart {
  readonly #store: Store;
  readonly #content: Content;
  readonly #objects: Objects;
  readonly #shared = new Map<string, Promise<SharedFile>>();

  constructor(store: Store, content: Content, objects: Objects) {
    this.#store = store;
    this.#content = content;
    this.#objects = objects;
  }

  async create(request: S3Request): Promise<Reply> {
    const { headers, tags } = describe(request);
    authorizePut(request, tags, false);
    const retention = this.#objects.retention(request);
    const named = request.header('x-amz-checksum-algorithm');
    const algorithm = named === undefined ? undefined : parseAlgorithm(named);
    const initiated = Date.now();
    const upload: Upload = {
      id: newUploadId(initiated),
      bucket: request.bucket,
      key: request.key,
      initiated,
      headers,
      tags,
      ...(retention && { retention }),
      ...(algorithm && { algorithm }),
      type: checksumType(request, algorithm),
    };
    await this.#store.write(new Batch().upload(upload, upload));
    return {
      headers: {
        ...(algorithm && { 'x-amz-checksum-algorithm': algorithm, 'x-amz-checksum-type': upload.type }),
        ...encryptionHeaders(upload),
      },
      body: toXml('InitiateMultipartUploadResult', {
        Bucket: upload.bucket,
        Key: upload.key,
        UploadId: upload.id,
      }),
    };
  }

  async uploadPart(request: S3Request): Promise<Reply> {
    authorizePut(request, [], false);
    const number = partNumber(request);
    const upload = await this.#find(request);
    const payload = new Payload(request, algorithmsOf(upload));
    if (payload.length > BODY_BYTES) throw new S3Error('EntityTooLarge', 'A part may have 5 GiB.', 400);
    if (upload.algorithm && payload.declared && payload.declared !== upload.algorithm)
      throw new S3Error(
        'InvalidRequest',
        `Checksum Type mismatch occurred, expected checksum Type: ${upload.algorithm.toLowerCase()}, actual checksum Type: ${payload.declared.toLowerCase()}`,
        400,
      );
    const slot = await this.#takeSlot(upload.id, number, payload.length);
    try {
      const extents = await this.#content.write(payload, payload.digests, slot?.place);
      const part = await this.#objects.keep(extents, async () => {
        const proven = payload.prove();
        return this.#keepPart(upload, number, extents, proven);
      });
      const algorithm = payload.declared ?? upload.algorithm;
      const value = algorithm && part.checksums[algorithm];
      return {
        headers: {
          etag: quoted(part.etag),
          ...(algorithm && value !== undefined && { [checksumHeader(algorithm)]: value }),
        },
      };
    } catch (error) {
      slot?.giveBack();
      // The upload may have ended after this part had laid out a shared file for it.
      if (error instanceof S3Error && error.code === 'NoSuchUpload') await this.#forget(upload.id);
      throw error;
    }
  }

  /** Bytes are read, to be digested, but not written: the part is a range of the source's own file. */
  async copyPart(request: S3Request): Promise<Reply> {
    authorizePut(request, [], false);
    const number = partNumber(request);
    const upload = await this.#find(request);
    const source = this.#objects.source(request);
    const found = await this.#objects.holdSource(request, source);
    try {
      checkSource(request, found);
      const { start, length } = copyRange(request, found.size);
      if (length > BODY_BYTES) throw new S3Error('InvalidRequest', 'A part may have 5 GiB.', 400);
      const digests = new Digests(algorithmsOf(upload));
      for await (const bytes of this.#content.read(found.extents, start, length)) digests.update(bytes);
      const extents = slice(found.extents, start, length);
      this.#content.retain(extents);
      const part = await this.#objects.keep(extents, () =>
        this.#keepPart(upload, number, extents, { ...digests.digest(), declared: undefined }),
      );
      const value = upload.algorithm && part.checksums[upload.algorithm];
      return {
        headers: this.#objects.sourceVersionHeader(source.bucket, found),
        body: toXml('CopyPartResult', {
          ETag: quoted(part.etag),
          LastModified: isoTime(part.modified),
          ...(upload.algorithm && { [`Checksum${upload.algorithm}`]: value }),
        }),
      };
    } finally {
      this.#content.release(found.extents);
    }
  }

  async complete(request: S3Request): Promise<Reply> {
    authorizePut(request, []);
    // The checksum in this request's headers is the object's, not the body's.
    const body = new Payload(request, [], false);
    const { Part: listed } = await readXml(body.digested(), 'CompleteMultipartUpload', COMPLETE);
    body.prove();
    const made = await this.#alone(request, async (upload) => {
      const stored = await this.#parts(upload.id);
      const parts = chooseParts(listed, stored);
      const size = parts.reduce((sum, part) => sum + part.size, 0);
      const announced = request.header('x-amz-mp-object-size');
      if (announced !== undefined && Number(announced) !== size)
        throw new S3Error(
          'InvalidRequest',
          `The parts have ${size} bytes, not the ${announced} announced.`,
          400,
        );
      const checksum = checksumOfParts(upload, parts);
      checkAnnounced(request, checksum);
      const { algorithm, type } = checksum;
      const pieces = parts.map((part): Piece => {
        const value = type === 'COMPOSITE' ? part.checksums[algorithm] : undefined;
        return { size: part.size, ...(value !== undefined && { checksum: value }) };
      });
      const { joined, surplus } = merge(parts.flatMap(({ extents }) => extents));
      const batch = new Batch().upload(upload, undefined);
      for (const { number } of stored.values()) batch.part(upload.id, number, undefined);
      const draft = {
        size,
        etag: `${md5OfParts(parts)}-${parts.length}`,
        crc64: joinCrcs('CRC64NVME', crcsOf(parts, 'CRC64NVME')).toString('base64'),
        checksum,
        extents: joined,
        headers: upload.headers,
        tags: upload.tags,
        ...(upload.retention && { retention: upload.retention }),
        pieces,
      };
      const version = await this.#objects.commit(request, 'CompleteMultipartUpload', draft, batch);
      const left = [...stored.values()].filter((part) => !parts.includes(part));
      this.#content.release([...surplus, ...left.flatMap(({ extents }) => extents)]);
      await this.#forget(upload.id);
      return version;
    });
    return {
      headers: { ...this.#objects.versionHeader(request.bucket, made), ...encryptionHeaders(made) },
      body: toXml('CompleteMultipartUploadResult', {
        Location: `http://${request.header('host')}/${request.bucket}/${encodeURIComponent(request.key)}`,
        Bucket: request.bucket,
        Key: request.key,
        ETag: quoted(made.etag),
        ...checksumElements(made.checksum),
      }),
    };
  }

  async abort(request: S3Request): Promise<Reply> {
    request.caller.authorize('s3:AbortMultipartUpload', request.objectArn);
    await this.#alone(request, (upload) => this.#drop(upload));
    return { status: 204 };
  }

  /** Aborts an upload that nobody finishes, if it is there still. */
  async expire({ bucket, key, id }: Upload): Promise<void> {
    await this.#store.alone(`upload ${id}`, async () =>
      this.#drop(await this.#store.upload(bucket, key, id)),
    );
  }

  async #drop(upload: Upload): Promise<void> {
    const parts = [...(await this.#parts(upload.id)).values()];
    const batch = new Batch().upload(upload, undefined);
    for (const { number } of parts) batch.part(upload.id, number, undefined);
    await this.#store.write(batch);
    this.#content.release(parts.flatMap(({ extents }) => extents));
    await this.#forget(upload.id);
  }

  async listParts(request: S3Request): Promise<Reply> {
    request.caller.authorize('s3:ListMultipartUploadParts', request.objectArn);
    const upload = await this.#find(request);
    const name = namer(request);
    const marker = request.number('part-number-marker', 0);
    const limit = Math.min(request.number('max-parts', 1000), 1000);
    const later = [...(await this.#parts(upload.id)).values()].filter(({ number }) => number > marker);
    const shown = later.slice(0, limit);
    return {
      body: toXml('ListPartsResult', {
        Bucket: upload.bucket,
        Key: name(upload.key),
        UploadId: upload.id,
        PartNumberMarker: marker,
        NextPartNumberMarker: shown.at(-1)?.number ?? marker,
        MaxParts: limit,
        IsTruncated: later.length > shown.length,
        ChecksumAlgorithm: upload.algorithm,
        ChecksumType: upload.algorithm && upload.type,
        StorageClass: 'STANDARD',
        Part: shown.map((part) => ({
          PartNumber: part.number,
          LastModified: isoTime(part.modified),
          ETag: quoted(part.etag),
          Size: part.size,
          ...(upload.algorithm && { [`Checksum${upload.algorithm}`]: part.checksums[upload.algorithm] }),
        })),
      }),
    };
  }

  async listUploads(request: S3Request): Promise<Reply> {
    request.caller.authorize('s3:ListBucketMultipartUploads', request.bucketArn);
    this.#store.bucket(request.bucket);
    if (request.parameter('delimiter'))
      throw new S3Error('NotImplemented', 'delimiter is not supported in ListMultipartUploads.', 501);
    const name = namer(request);
    const prefix = request.parameter('prefix') ?? '';
    const limit = Math.min(request.number('max-uploads', 1000), 1000);
    const marker = Buffer.from(request.parameter('key-marker') ?? '');
    const idMarker = request.parameter('upload-id-marker') ?? '';
    const uploads: Upload[] = [];
    for await (const upload of this.#store.uploads(request.bucket, prefix)) {
      const order = Buffer.compare(Buffer.from(upload.key), marker);
      if (order < 0 || (order === 0 && marker.length > 0 && (idMarker === '' || upload.id <= idMarker)))
        continue;
      uploads.push(upload);
      if (uploads.length > limit) break;
    }
    const shown = uploads.slice(0, limit);
    const truncated = uploads.length > shown.length;
    return {
      body: toXml('ListMultipartUploadsResult', {
        Bucket: request.bucket,
        KeyMarker: name(request.parameter('key-marker') ?? ''),
        UploadIdMarker: idMarker,
        NextKeyMarker: truncated ? name(shown.at(-1)?.key) : undefined,
        NextUploadIdMarker: truncated ? shown.at(-1)?.id : undefined,
        Prefix: name(prefix),
        EncodingType: request.parameter('encoding-type'),
        MaxUploads: limit,
        IsTruncated: truncated,
        Upload: shown.map((upload) => ({
          Key: name(upload.key),
          UploadId: upload.id,
          Initiated: isoTime(upload.initiated),
          StorageClass: 'STANDARD',
          ChecksumAlgorithm: upload.algorithm,
          ChecksumType: upload.algorithm && upload.type,
        })),
      }),
    };
  }

  // --- inside ---

  #find(request: S3Request): Promise<Upload> {
    this.#store.bucket(request.bucket);
    return this.#store.upload(request.bucket, request.key, request.parameter('uploadId') ?? '');
  }

  /** Runs `work` on the upload while no part of it is being recorded. */
  #alone<T>(request: S3Request, work: (upload: Upload) => Promise<T>): Promise<T> {
    return this.#store.alone(`upload ${request.parameter('uploadId')}`, async () =>
      work(await this.#find(request)),
    );
  }

  async #parts(uploadId: string): Promise<Map<number, Part>> {
    const parts = new Map<number, Part>();
    for await (const part of this.#store.parts(uploadId)) parts.set(part.number, part);
    return parts;
  }

  /** Records a part whose bytes are written; an earlier one of its number gives way. */
  async #keepPart(upload: Upload, number: number, extents: Extent[], proven: Proven): Promise<Part> {
    const part: Part = {
      number,
      modified: Date.now(),
      size: proven.size,
      etag: proven.md5.toString('hex'),
      checksums: Object.fromEntries([...proven.checksums.keys()].map((name) => [name, base64(proven, name)])),
      extents,
    };
    return this.#store.alone(`upload ${upload.id}`, async () => {
      await this.#store.upload(upload.bucket, upload.key, upload.id);
      const replaced = (await this.#parts(upload.id)).get(number);
      await this.#store.write(new Batch().part(upload.id, number, part));
      if (replaced) this.#content.release(replaced.extents);
      return part;
    });
  }

  /** A place in the shared file, which the first part lays out; none where the part does not fit or was there before. */
  async #takeSlot(uploadId: string, number: number, length: number) {
    let pending = this.#shared.get(uploadId);
    if (!pending) {
      // A short part that is not the first is the last one, and says nothing of the others.
      if (length < MIN_PART_BYTES) return undefined;
      pending = this.#content.create().then((held) => ({ held, slotBytes: length, taken: new Set() }));
      this.#shared.set(uploadId, pending);
      pending.catch(() => this.#shared.delete(uploadId));
    }
    const { held, slotBytes, taken } = await pending;
    const offset = (number - 1) * slotBytes;
    if (length > slotBytes || taken.has(number) || offset + length > SHARED_FILE_BYTES) return undefined;
    taken.add(number);
    return { place: { file: held.file, offset }, giveBack: () => taken.delete(number) };
  }

  async #forget(uploadId: string): Promise<void> {
    const shared = this.#shared.get(uploadId);
    this.#shared.delete(uploadId);
    if (shared) this.#content.release([(await shared).held]);
  }
}

const algorithmsOf = ({ algorithm }: Upload): Algorithm[] =>
  algorithm ? ['CRC64NVME', algorithm] : ['CRC64NVME'];

function partNumber(request: S3Request): number {
  const number = request.number('partNumber', 0);
  if (number < 1 || number > MAX_PARTS)
    throw new S3Error('InvalidArgument', `Part number must be between 1 and ${MAX_PARTS}.`, 400);
  return number;
}

/** S3's rules: CRC64NVME is of the full object only, SHA of the parts only, CRC32 and CRC32C as asked. */
function checksumType(request: S3Request, algorithm: Algorithm | undefined): ChecksumType {
  const asked = request.header('x-amz-checksum-type');
  const usual = algorithm === undefined || algorithm === 'CRC64NVME' ? 'FULL_OBJECT' : 'COMPOSITE';
  if (asked === undefined || asked === usual) return usual;
  if (asked === 'FULL_OBJECT' && algorithm && isCrc(algorithm)) return asked;
  throw new S3Error(
    'InvalidRequest',
    `The ${asked} checksum type cannot be used with the ${algorithm ?? 'default'} checksum algorithm.`,
    400,
  );
}

function copyRange(request: S3Request, size: number): { start: number; length: number } {
  const header = request.header('x-amz-copy-source-range');
  if (header === undefined) return { start: 0, length: size };
  const [, first, last] = /^bytes=(\d{1,15})-(\d{1,15})$/.exec(header) ?? [];
  const start = Number(first);
  const end = Number(last);
  if (!(start <= end && end < size))
    throw new S3Error('InvalidArgument', `Range ${header} is not valid for a source of ${size} bytes.`, 400);
  return { start, length: end - start + 1 };
}

/** Throws `InvalidPartOrder`, `InvalidPart`, `EntityTooSmall`. */
function chooseParts(listed: z.infer<typeof COMPLETE>['Part'], stored: Map<number, Part>): Part[] {
  let before = 0;
  const parts = listed.map(({ PartNumber: number, ETag, ...checksums }) => {
    if (number <= before)
      throw new S3Error('InvalidPartOrder', 'The list of parts was not in ascending order.', 400);
    before = number;
    const part = stored.get(number);
    const same = Object.entries(checksums).every(([name, value]) => {
      const known = part?.checksums[name.slice('Checksum'.length) as Algorithm];
      return value === undefined || known === undefined || known === value;
    });
    if (!part || part.etag !== unquoted(ETag) || !same)
      throw new S3Error('InvalidPart', `Part ${number} was not found, or is not the one named.`, 400);
    return part;
  });
  const small = parts.slice(0, -1).find(({ size }) => size < MIN_PART_BYTES);
  if (small)
    throw new S3Error('EntityTooSmall', `Part ${small.number} has ${small.size} bytes, below 5 MiB.`, 400);
  return parts;
}

function md5OfParts(parts: Part[]): string {
  const hash = createHash('md5');
  for (const { etag } of parts) hash.update(etag, 'hex');
  return hash.digest('hex');
}

function checksumOf(part: Part, algorithm: Algorithm): Buffer {
  const value = part.checksums[algorithm];
  if (value === undefined) throw new RangeError(`part ${part.number} has no ${algorithm}`);
  return Buffer.from(value, 'base64');
}

const crcsOf = (parts: Part[], algorithm: Algorithm) =>
  parts.map((part) => ({ crc: checksumOf(part, algorithm), size: part.size }));

function checksumOfParts({ algorithm = 'CRC64NVME', type }: Upload, parts: Part[]): Checksum {
  if (type === 'FULL_OBJECT' && isCrc(algorithm)) {
    const value = joinCrcs(algorithm, crcsOf(parts, algorithm)).toString('base64');
    return { algorithm, type, value };
  }
  const digest = createDigest(algorithm);
  for (const part of parts) digest.update(checksumOf(part, algorithm));
  return { algorithm, type: 'COMPOSITE', value: `${digest.digest().toString('base64')}-${parts.length}` };
}

/** The object's checksum, where the client gives it. Throws `BadDigest`, `InvalidRequest`. */
function checkAnnounced(request: S3Request, checksum: Checksum): void {
  const algorithm = declaredAlgorithm(request);
  if (!algorithm) return;
  if (algorithm !== checksum.algorithm)
    throw new S3Error(
      'InvalidRequest',
      `The upload's checksum is ${checksum.algorithm}, not ${algorithm}.`,
      400,
    );
  // A composite's count of parts may be left out.
  const said = request.header(checksumHeader(algorithm)) ?? '';
  if (said !== checksum.value && said !== checksum.value.replace(/-\d+$/, ''))
    throw new S3Error(
      'BadDigest',
      `The ${algorithm} you specified did not match the calculated checksum.`,
      400,
    );
}

const COMPLETE = z.object({
  Part: z
    .array(
      z.object({
        PartNumber: z
          .string()
          .regex(/^\d{1,5}$/)
          .transform(Number),
        ETag: z.string(),
        ChecksumCRC32: z.string().optional(),
        ChecksumCRC32C: z.string().optional(),
        ChecksumCRC64NVME: z.string().optional(),
        ChecksumSHA1: z.string().optional(),
        ChecksumSHA256: z.string().optional(),
      }),
    )
    .min(1)
    .max(MAX_PARTS),
});
