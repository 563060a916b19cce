/**
 * The records of the local S3: buckets, objects with their versions, uploads under way and events not yet delivered.
 *
 * They lie in one LevelDB, ordered by the bytes of their UTF-8 keys, which is the order of S3's listings. Everything
 * that belongs together is one atomic batch: an object is there with its event, or neither is. LevelDB's log survives
 * the kill of the process at any instant; the operating system's crash may lose the last batches, never half of one.
 */
import { randomBytes } from 'node:crypto';
import { mkdirSync } from 'node:fs';
import { ClassicLevel } from 'classic-level';
import type { Algorithm, Checksum, ChecksumType } from './checksum.ts';
import type { Extent } from './content.ts';
import type { BucketLock, Retention } from './lock.ts';
import { S3Error } from './wire.ts';

export interface Bucket {
  name: string;
  /** Milliseconds since 1970, as all times here. */
  created: number;
  /** Absent until versioning is first enabled. */
  versioning?: 'Enabled' | 'Suspended';
  /** Whether "Object Created" is announced. */
  eventBridge: boolean;
  /** Present where the bucket has Object Lock; it cannot be taken from it again. */
  lock?: BucketLock;
}

export interface ObjectVersion {
  /** `null` for objects put while the bucket was not versioned. */
  id: string;
  modified: number;
  size: number;
  /** Without quotes. */
  etag: string;
  /** CRC-64/NVME of the whole, base64; kept even where the client chose another checksum. */
  crc64: string;
  checksum: Checksum;
  extents: Extent[];
  /** Headers that come back with the object: content-type and its like, `x-amz-meta-*`. */
  headers: Record<string, string>;
  tags: Tag[];
  retention?: Retention;
  /** Of a multipart object: where its {@link Piece}s are, and how many. */
  pieces?: { id: string; count: number };
}

export interface DeleteMarker {
  id: string;
  modified: number;
  deleted: true;
}

export type Version = ObjectVersion | DeleteMarker;
export type Tag = [key: string, value: string];

export const isMarker = (version: Version): version is DeleteMarker => 'deleted' in version;

/** One part of a finished multipart object. */
export interface Piece {
  size: number;
  checksum?: string;
}

export interface Upload {
  id: string;
  bucket: string;
  key: string;
  initiated: number;
  headers: Record<string, string>;
  tags: Tag[];
  /** That the client asked for. */
  retention?: Retention;
  /** Absent when the client named none: parts may then come with any, and the object gets CRC64NVME. */
  algorithm?: Algorithm;
  type: ChecksumType;
}

export interface Part {
  number: number;
  modified: number;
  size: number;
  etag: string;
  /** Base64 by algorithm; CRC64NVME and the upload's own always. */
  checksums: Partial<Record<Algorithm, string>>;
  extents: Extent[];
}

/** What S3 tells EventBridge of a new object. */
export interface ObjectCreated {
  bucket: string;
  key: string;
  size: number;
  etag: string;
  versionId?: string;
  /** Hexadecimal; of two events of one key the later has the greater. */
  sequencer: string;
  reason: 'PutObject' | 'CopyObject' | 'CompleteMultipartUpload';
  /** ARN of the caller. */
  requester: string;
}

export class FolderInUse extends Error {
  constructor(folder: string) {
    super(`Another process uses ${folder}. Stop it first.`);
    this.name = 'FolderInUse';
  }
}

const at = (...names: string[]) => Buffer.from(names.join('\0'));
const KINDS = { bucket: 'b', object: 'o', pieces: 's', upload: 'u', part: 'p', event: 'e' } as const;

/** Past every name that begins with `prefix`: 0xff is in no UTF-8. */
export const after = (prefix: Buffer) => Buffer.concat([prefix, Buffer.from([0xff])]);

/** What is to be written at once. */
export class Batch {
  readonly operations: ({ type: 'put'; key: Buffer; value: unknown } | { type: 'del'; key: Buffer })[] = [];

  bucket(name: string, bucket: Bucket | undefined): this {
    return this.#set(at(KINDS.bucket, name), bucket);
  }
  /** Newest version first; none removes the key. */
  object(bucket: string, key: string, versions: Version[]): this {
    return this.#set(at(KINDS.object, bucket, key), versions.length > 0 ? versions : undefined);
  }
  pieces(id: string, pieces: Piece[] | undefined): this {
    return this.#set(at(KINDS.pieces, id), pieces);
  }
  upload({ bucket, key, id }: Upload, upload: Upload | undefined): this {
    return this.#set(at(KINDS.upload, bucket, key, id), upload);
  }
  part(uploadId: string, number: number, part: Part | undefined): this {
    return this.#set(at(KINDS.part, uploadId, String(number).padStart(5, '0')), part);
  }
  event(sequencer: string, event: ObjectCreated | undefined): this {
    return this.#set(at(KINDS.event, sequencer), event);
  }

  #set(key: Buffer, value: unknown): this {
    this.operations.push(value === undefined ? { type: 'del', key } : { type: 'put', key, value });
    return this;
  }
}

export class Store {
  readonly #level: ClassicLevel<Buffer, unknown>;
  readonly #folder: string;
  readonly #buckets = new Map<string, Bucket>();
  readonly #locks = new Map<string, Promise<unknown>>();
  #sequence = 0n;

  constructor(folder: string) {
    mkdirSync(folder, { recursive: true });
    this.#folder = folder;
    this.#level = new ClassicLevel(folder, { keyEncoding: 'buffer', valueEncoding: 'json' });
  }

  /** Throws {@link FolderInUse}. */
  async open(): Promise<void> {
    try {
      await this.#level.open();
    } catch (error) {
      const cause = error instanceof Error ? error.cause : undefined;
      if (cause instanceof Error && 'code' in cause && cause.code === 'LEVEL_LOCKED')
        throw new FolderInUse(this.#folder);
      throw error;
    }
    for await (const bucket of this.#all<Bucket>(KINDS.bucket)) this.#buckets.set(bucket.name, bucket);
  }

  close(): Promise<void> {
    return this.#level.close();
  }

  async write(batch: Batch): Promise<void> {
    await this.#level.batch(batch.operations);
  }

  /** Runs `work` when all earlier work on `name` is done. */
  async alone<T>(name: string, work: () => Promise<T>): Promise<T> {
    const before = this.#locks.get(name);
    const turn = (before ?? Promise.resolve()).then(work, work);
    const settled = turn.then(
      () => {},
      () => {},
    );
    this.#locks.set(name, settled);
    try {
      return await turn;
    } finally {
      if (this.#locks.get(name) === settled) this.#locks.delete(name);
    }
  }

  /** Sixteen hexadecimal digits that only grow. */
  sequencer(): string {
    const now = BigInt(Date.now()) << 20n;
    this.#sequence = this.#sequence < now ? now : this.#sequence + 1n;
    return this.#sequence.toString(16).padStart(16, '0').toUpperCase();
  }

  // --- buckets ---

  get buckets(): Bucket[] {
    return [...this.#buckets.values()].sort((a, b) => (a.name < b.name ? -1 : 1));
  }

  hasBucket(name: string): boolean {
    return this.#buckets.has(name);
  }

  /** Throws `NoSuchBucket`. */
  bucket(name: string): Bucket {
    const bucket = this.#buckets.get(name);
    if (!bucket) throw new S3Error('NoSuchBucket', `The bucket '${name}' does not exist.`, 404);
    return bucket;
  }

  async putBucket(bucket: Bucket): Promise<void> {
    await this.write(new Batch().bucket(bucket.name, bucket));
    this.#buckets.set(bucket.name, bucket);
  }

  /** Throws `BucketNotEmpty`. */
  async removeBucket(name: string): Promise<void> {
    const bucket = this.bucket(name);
    // No new object can come while it is being looked for old ones.
    this.#buckets.delete(name);
    try {
      for (const kind of [KINDS.object, KINDS.upload])
        for await (const _ of this.#range(at(kind, name, '')))
          throw new S3Error('BucketNotEmpty', `The bucket '${name}' still holds objects or uploads.`, 409);
      await this.write(new Batch().bucket(name, undefined));
    } catch (error) {
      this.#buckets.set(name, bucket);
      throw error;
    }
  }

  // --- objects ---

  /** The versions of a key, newest first; empty when there is none. */
  async versions(bucket: string, key: string): Promise<Version[]> {
    return ((await this.#level.get(at(KINDS.object, bucket, key))) as Version[] | undefined) ?? [];
  }

  /**
   * Keys with their versions in the order of their bytes, from the position `from` on, as far as they begin with
   * `prefix`. `seek` goes on at another position.
   */
  objects(bucket: string, prefix: string, from: Buffer): ObjectCursor {
    const head = at(KINDS.object, bucket, '');
    const place = (position: Buffer) => Buffer.concat([head, position]);
    const first = Buffer.from(prefix);
    const iterator = this.#level.iterator({
      gte: place(Buffer.compare(from, first) > 0 ? from : first),
      lt: place(after(first)),
    });
    return {
      async next() {
        const entry = await iterator.next();
        return entry && { key: entry[0].toString('utf8', head.length), versions: entry[1] as Version[] };
      },
      seek: (position) => iterator.seek(place(position)),
      close: () => iterator.close(),
    };
  }

  async pieces(id: string): Promise<Piece[]> {
    return ((await this.#level.get(at(KINDS.pieces, id))) as Piece[] | undefined) ?? [];
  }

  // --- uploads ---

  /** Throws `NoSuchUpload`. */
  async upload(bucket: string, key: string, id: string): Promise<Upload> {
    const upload = (await this.#level.get(at(KINDS.upload, bucket, key, id))) as Upload | undefined;
    if (!upload)
      throw new S3Error('NoSuchUpload', 'The upload does not exist: it was completed or aborted.', 404);
    return upload;
  }

  /** In the order of their keys, then of their beginnings. */
  uploads(bucket: string, prefix: string): AsyncIterable<Upload> {
    return this.#range(at(KINDS.upload, bucket, prefix)) as AsyncIterable<Upload>;
  }

  parts(uploadId: string): AsyncIterable<Part> {
    return this.#range(at(KINDS.part, uploadId, '')) as AsyncIterable<Part>;
  }

  // --- what a start needs ---

  /** Every extent that a record refers to. */
  async *extents(): AsyncGenerator<Extent> {
    for await (const versions of this.#all<Version[]>(KINDS.object))
      for (const version of versions) if (!isMarker(version)) yield* version.extents;
    for await (const part of this.#all<Part>(KINDS.part)) yield* part.extents;
  }

  /** Events that nobody has acknowledged, oldest first. */
  events(): AsyncIterable<ObjectCreated> {
    return this.#all<ObjectCreated>(KINDS.event);
  }

  #all<T>(kind: string): AsyncIterable<T> {
    return this.#range(at(kind, '')) as AsyncIterable<T>;
  }

  #range(prefix: Buffer): AsyncIterable<unknown> {
    return this.#level.values({ gte: prefix, lt: after(prefix) });
  }
}

export interface ObjectCursor {
  next(): Promise<{ key: string; versions: Version[] } | undefined>;
  seek(position: Buffer): void;
  close(): Promise<void>;
}

/** 32 characters, as S3's; ids of uploads begin with their time, so that they sort by it. */
export const newVersionId = () => randomBytes(24).toString('base64url');
export const newUploadId = (now: number) =>
  `${now.toString(36).padStart(9, '0')}${randomBytes(24).toString('hex')}`;
