/** Operations on objects: put, get, copy, delete, tags, attributes. */
import { randomBytes } from 'node:crypto';
import { z } from 'zod';
import { type Algorithm, type Checksum, Digests } from './checksum.ts';
import { checkRead, checkSource, checkWrite } from './conditions.ts';
import type { Content, Extent } from './content.ts';
import type { Deliveries } from './deliveries.ts';
import { checkUnlocked, type Retention, requestedRetention, retentionHeaders, retentionOf } from './lock.ts';
import { BODY_BYTES, checksumHeader, Payload, type Proven, parseAlgorithm } from './payload.ts';
import {
  Batch,
  isMarker,
  newVersionId,
  type ObjectCreated,
  type ObjectVersion,
  type Piece,
  type Store,
  type Tag,
  type Version,
} from './store.ts';
import {
  objectArn,
  quoted,
  type Reply,
  readXml,
  S3Error,
  type S3Request,
  splitPath,
  toXml,
  unquoted,
} from './wire.ts';

/** A version that is still to be given its id and time. */
export type Draft = Omit<ObjectVersion, 'id' | 'modified' | 'pieces'> & { pieces?: Piece[] };

const METADATA_BYTES = 2048;
const KEPT_HEADERS = [
  'cache-control',
  'content-disposition',
  'content-encoding',
  'content-language',
  'content-type',
  'expires',
  'x-amz-server-side-encryption',
  'x-amz-server-side-encryption-aws-kms-key-id',
  'x-amz-server-side-encryption-bucket-key-enabled',
  'x-amz-storage-class',
];

/** Headers that would change what is stored, or who may have it, in ways that are not kept here. */
const REFUSED_HEADERS =
  /^x-amz-(object-lock-legal-hold|server-side-encryption-customer-|copy-source-server-side-|website-redirect|grant-|write-offset)/;

export class Objects {
  readonly #store: Store;
  readonly #content: Content;
  readonly #deliveries: Deliveries;

  constructor(store: Store, content: Content, deliveries: Deliveries) {
    this.#store = store;
    this.#content = content;
    this.#deliveries = deliveries;
  }

  async put(request: S3Request): Promise<Reply> {
    const { headers, tags } = describe(request);
    authorizePut(request, tags);
    const retention = this.retention(request);
    const payload = new Payload(request, ['CRC64NVME']);
    if (payload.length > BODY_BYTES)
      throw new S3Error('EntityTooLarge', 'A body may have 5 GiB; use a multipart upload.', 400);
    await this.#checkWriteEarly(request);
    const extents = await this.#content.write(payload, payload.digests);
    const made = await this.keep(extents, () => {
      const proven = payload.prove();
      const algorithm = proven.declared ?? 'CRC64NVME';
      const draft: Draft = {
        size: proven.size,
        etag: proven.md5.toString('hex'),
        crc64: base64(proven, 'CRC64NVME'),
        checksum: { algorithm, type: 'FULL_OBJECT', value: base64(proven, algorithm) },
        extents,
        headers,
        tags,
        ...(retention && { retention }),
      };
      return this.commit(request, 'PutObject', draft);
    });
    return {
      headers: {
        etag: quoted(made.etag),
        ...this.versionHeader(request.bucket, made),
        ...checksumHeaders(made.checksum),
        ...encryptionHeaders(made),
      },
    };
  }

  async get(request: S3Request): Promise<Reply> {
    authorizeVersion(request, 's3:GetObject');
    const found = await this.#hold(request);
    const release = () => this.#content.release(found.extents);
    return this.keep(found.extents, async () => {
      checkRead(request, found);
      const piece = await this.#piece(request, found);
      const range = piece ?? parseRange(request.header('range'), found.size);
      const { start, length } = range ?? { start: 0, length: found.size };
      const headers: Record<string, string | number> = {
        'accept-ranges': 'bytes',
        'content-length': length,
        ...this.#describeFound(request, found, range === undefined),
        ...(range && { 'content-range': `bytes ${start}-${start + length - 1}/${found.size}` }),
        ...(piece && found.pieces && { 'x-amz-mp-parts-count': found.pieces.count }),
      };
      const status = range ? 206 : 200;
      if (request.method === 'HEAD') return { status, headers, done: release };
      return { status, headers, body: this.#content.read(found.extents, start, length), done: release };
    });
  }

  async copy(request: S3Request): Promise<Reply> {
    const described = describe(request);
    const source = this.source(request);
    const replaceHeaders = directive(request, 'x-amz-metadata-directive') === 'REPLACE';
    const replaceTags = directive(request, 'x-amz-tagging-directive') === 'REPLACE';
    authorizePut(request, replaceTags ? described.tags : []);
    const retention = this.retention(request);
    if (
      source.bucket === request.bucket &&
      source.key === request.key &&
      !source.versionId &&
      !replaceHeaders
    )
      throw new S3Error(
        'InvalidRequest',
        'This copy request is illegal because it is trying to copy an object to itself without changing its metadata.',
        400,
      );
    const found = await this.holdSource(request, source);
    const made = await this.keep(found.extents, async () => {
      checkSource(request, found);
      if (found.size > BODY_BYTES)
        throw new S3Error('InvalidRequest', 'The copy source is larger than 5 GiB; use UploadPartCopy.', 400);
      if (!replaceTags && found.tags.length > 0) {
        const action = source.versionId === undefined ? 's3:GetObjectTagging' : 's3:GetObjectVersionTagging';
        request.caller.authorize(action, objectArn(source.bucket, source.key));
        request.caller.authorize('s3:PutObjectTagging', request.objectArn);
      }
      const wanted = request.header('x-amz-checksum-algorithm');
      const draft: Draft = {
        size: found.size,
        // The bytes are the same file's: the ETag stays, also that of a multipart object.
        etag: found.etag,
        crc64: found.crc64,
        checksum: await this.#checksumOf(found, wanted === undefined ? undefined : parseAlgorithm(wanted)),
        extents: found.extents,
        headers: replaceHeaders ? described.headers : found.headers,
        tags: replaceTags ? described.tags : found.tags,
        ...(retention && { retention }),
      };
      return this.commit(request, 'CopyObject', draft);
    });
    return {
      headers: {
        ...this.versionHeader(request.bucket, made),
        ...this.sourceVersionHeader(source.bucket, found),
        ...encryptionHeaders(made),
      },
      body: toXml('CopyObjectResult', {
        ETag: quoted(made.etag),
        LastModified: isoTime(made.modified),
        ...checksumElements(made.checksum),
      }),
    };
  }

  async delete(request: S3Request): Promise<Reply> {
    const { headers } = await this.#remove(request, request.key, request.parameter('versionId'), () =>
      request.header('if-match'),
    );
    return { status: 204, headers };
  }

  async deleteMany(request: S3Request): Promise<Reply> {
    const payload = new Payload(request);
    const { Object: objects, Quiet } = await readXml(payload.digested(), 'Delete', DELETE);
    payload.prove();
    const deleted: ReturnType<typeof describeDeleted>[] = [];
    const errors: { Key: string; VersionId: string | undefined; Code: string; Message: string }[] = [];
    for (const { Key, VersionId, ETag } of objects) {
      try {
        const { headers } = await this.#remove(request, Key, VersionId, () => ETag);
        if (Quiet !== 'true') deleted.push(describeDeleted(Key, VersionId, headers));
      } catch (error) {
        if (!(error instanceof Error && 'code' in error)) throw error;
        errors.push({ Key, VersionId, Code: String(error.code), Message: error.message });
      }
    }
    return { body: toXml('DeleteResult', { Deleted: deleted, Error: errors }) };
  }

  async getTags(request: S3Request): Promise<Reply> {
    authorizeVersion(request, 's3:GetObjectTagging');
    const found = await this.#find(request);
    return {
      headers: this.versionHeader(request.bucket, found),
      body: toXml('Tagging', { TagSet: { Tag: found.tags.map(([Key, Value]) => ({ Key, Value })) } }),
    };
  }

  async putTags(request: S3Request): Promise<Reply> {
    authorizeVersion(request, 's3:PutObjectTagging');
    const payload = new Payload(request);
    const { TagSet } = await readXml(payload.digested(), 'Tagging', TAGGING);
    payload.prove();
    const tags = typeof TagSet === 'string' ? [] : TagSet.Tag.map(({ Key, Value }): Tag => [Key, Value]);
    return this.#setTags(request, checkTags(tags), 200);
  }

  async deleteTags(request: S3Request): Promise<Reply> {
    authorizeVersion(request, 's3:DeleteObjectTagging');
    return this.#setTags(request, [], 204);
  }

  async attributes(request: S3Request): Promise<Reply> {
    authorizeVersion(request, 's3:GetObject');
    authorizeVersion(request, 's3:GetObjectAttributes');
    const found = await this.#find(request);
    const wanted = new Set((request.header('x-amz-object-attributes') ?? '').split(/\s*,\s*/));
    const marker = Number(request.header('x-amz-part-number-marker') ?? 0);
    const limit = Math.min(Number(request.header('x-amz-max-parts') ?? 1000), 1000);
    const pieces = found.pieces && wanted.has('ObjectParts') ? await this.#store.pieces(found.pieces.id) : [];
    const shown = pieces
      .map((piece, index) => ({ ...piece, number: index + 1 }))
      .slice(marker, marker + limit);
    const { algorithm, type, value } = found.checksum;
    return {
      headers: { 'last-modified': httpTime(found.modified), ...this.versionHeader(request.bucket, found) },
      body: toXml('GetObjectAttributesResponse', {
        ETag: wanted.has('ETag') ? found.etag : undefined,
        Checksum: wanted.has('Checksum')
          ? { [`Checksum${algorithm}`]: value, ChecksumType: type }
          : undefined,
        ObjectParts:
          pieces.length > 0
            ? {
                PartsCount: pieces.length,
                PartNumberMarker: marker,
                NextPartNumberMarker: shown.at(-1)?.number ?? marker,
                MaxParts: limit,
                IsTruncated: marker + limit < pieces.length,
                Part: shown.map(({ number, size, checksum }) => ({
                  PartNumber: number,
                  Size: size,
                  [`Checksum${algorithm}`]: checksum,
                })),
              }
            : undefined,
        StorageClass: wanted.has('StorageClass')
          ? (found.headers['x-amz-storage-class'] ?? 'STANDARD')
          : undefined,
        ObjectSize: wanted.has('ObjectSize') ? found.size : undefined,
      }),
    };
  }

  // --- shared with multipart uploads ---

  /**
   * Makes `draft` the key's newest version, if the request's conditions hold, in one batch with its event and
   * whatever else `batch` has. The version takes over the caller's hold of the extents.
   */
  async commit(
    request: S3Request,
    reason: ObjectCreated['reason'],
    draft: Draft,
    batch = new Batch(),
  ): Promise<ObjectVersion> {
    const { bucket: name, key } = request;
    return this.#store.alone(`${name}/${key}`, async () => {
      const bucket = this.#store.bucket(name);
      const versions = await this.#store.versions(name, key);
      checkWrite(request, current(versions));
      const { pieces, retention: asked, ...rest } = draft;
      const retention = retentionOf(asked, bucket.lock);
      const made: ObjectVersion = {
        ...rest,
        ...(retention && { retention }),
        id: bucket.versioning === 'Enabled' ? newVersionId() : 'null',
        modified: Date.now(),
      };
      if (pieces) {
        made.pieces = { id: randomBytes(16).toString('hex'), count: pieces.length };
        batch.pieces(made.pieces.id, pieces);
      }
      const [kept, replaced] = partition(versions, made.id);
      batch.object(name, key, [made, ...kept]);
      const event: ObjectCreated = {
        bucket: name,
        key,
        size: made.size,
        etag: made.etag,
        ...(bucket.versioning && { versionId: made.id }),
        sequencer: this.#store.sequencer(),
        reason,
        requester: request.caller.arn,
      };
      if (bucket.eventBridge) batch.event(event.sequencer, event);
      await this.#write(batch, replaced);
      if (bucket.eventBridge) this.#deliveries.start(event);
      return made;
    });
  }

  /** Runs `work`; when it fails, the caller's hold of `extents` is given up. */
  async keep<T>(extents: readonly Extent[], work: () => T | Promise<T>): Promise<T> {
    try {
      return await work();
    } catch (error) {
      this.#content.release(extents);
      throw error;
    }
  }

  /** Bucket, key and version that `x-amz-copy-source` names. */
  source(request: S3Request): CopySource {
    const header = request.header('x-amz-copy-source') ?? '';
    const [path = '', query = ''] = header.replace(/^\//, '').split(/\?(.*)/s);
    const { bucket, key } = splitPath(path);
    if (bucket === '' || key === '')
      throw new S3Error('InvalidArgument', 'Copy Source must mention the source bucket and key.', 400);
    const versionId = new URLSearchParams(query).get('versionId');
    return { bucket, key, ...(versionId !== null && { versionId }) };
  }

  /** The source of a copy, its content held by the caller. */
  async holdSource(request: S3Request, { bucket, key, versionId }: CopySource): Promise<ObjectVersion> {
    const action = versionId === undefined ? 's3:GetObject' : 's3:GetObjectVersion';
    request.caller.authorize(action, objectArn(bucket, key));
    return this.#holdVersion(request, bucket, key, versionId);
  }

  /** What a request for a new object asks to be kept for how long. */
  retention(request: S3Request): Retention | undefined {
    return requestedRetention(request, this.#store.bucket(request.bucket).lock);
  }

  versionHeader(bucket: string, version: Version): Record<string, string> {
    return this.#store.bucket(bucket).versioning ? { 'x-amz-version-id': version.id } : {};
  }

  sourceVersionHeader(bucket: string, version: Version): Record<string, string> {
    return this.#store.bucket(bucket).versioning ? { 'x-amz-copy-source-version-id': version.id } : {};
  }

  // --- inside ---

  async #hold(request: S3Request): Promise<ObjectVersion> {
    return this.#holdVersion(request, request.bucket, request.key, request.parameter('versionId'));
  }

  async #holdVersion(request: S3Request, bucket: string, key: string, versionId: string | undefined) {
    for (;;) {
      const found = await this.#findVersion(request, bucket, key, versionId);
      // Between the look-up and now it may have been replaced and its file removed: look again.
      if (this.#content.retain(found.extents)) return found;
    }
  }

  #find(request: S3Request): Promise<ObjectVersion> {
    return this.#findVersion(request, request.bucket, request.key, request.parameter('versionId'));
  }

  /** Throws `NoSuchBucket`, `NoSuchKey`, `NoSuchVersion`, `MethodNotAllowed` (a delete marker's id). */
  async #findVersion(request: S3Request, bucket: string, key: string, versionId: string | undefined) {
    this.#store.bucket(bucket);
    const versions = await this.#store.versions(bucket, key);
    const version = versionId === undefined ? versions[0] : versions.find(({ id }) => id === versionId);
    if (version && !isMarker(version)) return version;
    // Who may not list must not learn what is there.
    request.caller.authorize('s3:ListBucket', `arn:aws:s3:::${bucket}`);
    if (version) {
      const headers = { 'x-amz-delete-marker': 'true', 'x-amz-version-id': version.id };
      if (versionId !== undefined)
        throw new S3Error('MethodNotAllowed', 'This version is a delete marker.', 405, headers);
      throw new S3Error('NoSuchKey', 'The specified key does not exist.', 404, headers);
    }
    if (versionId !== undefined)
      throw new S3Error('NoSuchVersion', 'The specified version does not exist.', 404);
    throw new S3Error('NoSuchKey', 'The specified key does not exist.', 404);
  }

  /** Spares the client a body that a condition would refuse in the end. */
  async #checkWriteEarly(request: S3Request): Promise<void> {
    this.#store.bucket(request.bucket);
    checkWrite(request, current(await this.#store.versions(request.bucket, request.key)));
  }

  /** Leaves a key with these versions; whoever calls is alone with the key. */
  replace(bucket: string, key: string, kept: Version[], dropped: Version[]): Promise<void> {
    return this.#write(new Batch().object(bucket, key, kept), dropped);
  }

  /** Writes a batch that drops versions, then gives up what they held. */
  async #write(batch: Batch, dropped: readonly Version[]): Promise<void> {
    const objects = dropped.filter((version): version is ObjectVersion => !isMarker(version));
    for (const { pieces } of objects) if (pieces) batch.pieces(pieces.id, undefined);
    await this.#store.write(batch);
    for (const { extents } of objects) this.#content.release(extents);
  }

  async #remove(
    request: S3Request,
    key: string,
    versionId: string | undefined,
    match: () => string | undefined,
  ): Promise<{ headers: Record<string, string> }> {
    const { bucket: name } = request;
    request.caller.authorize(
      versionId === undefined ? 's3:DeleteObject' : 's3:DeleteObjectVersion',
      objectArn(name, key),
    );
    return this.#store.alone(`${name}/${key}`, async () => {
      const { versioning } = this.#store.bucket(name);
      const versions = await this.#store.versions(name, key);
      const target =
        versionId === undefined ? current(versions) : versions.find(({ id }) => id === versionId);
      const expected = match();
      if (
        expected !== undefined &&
        target &&
        !isMarker(target) &&
        !['*', target.etag].includes(unquoted(expected))
      )
        throw new S3Error(
          'PreconditionFailed',
          'At least one of the pre-conditions did not hold: If-Match.',
          412,
        );
      if (versionId === undefined && versioning) {
        const marker: Version = {
          id: versioning === 'Enabled' ? newVersionId() : 'null',
          modified: Date.now(),
          deleted: true,
        };
        const [kept, replaced] = partition(versions, marker.id);
        await this.#write(new Batch().object(name, key, [marker, ...kept]), replaced);
        return { headers: { 'x-amz-delete-marker': 'true', 'x-amz-version-id': marker.id } };
      }
      const id = versionId ?? 'null';
      const [kept, removed] = partition(versions, id);
      for (const version of removed) if (!isMarker(version)) checkUnlocked(request, key, version.retention);
      if (removed.length > 0) await this.#write(new Batch().object(name, key, kept), removed);
      return {
        headers: {
          ...(versionId !== undefined && { 'x-amz-version-id': versionId }),
          ...(removed.some(isMarker) && { 'x-amz-delete-marker': 'true' }),
        },
      };
    });
  }

  async #setTags(request: S3Request, tags: Tag[], status: number): Promise<Reply> {
    const { bucket, key } = request;
    return this.#store.alone(`${bucket}/${key}`, async () => {
      const found = await this.#find(request);
      const versions = await this.#store.versions(bucket, key);
      const changed = versions.map((version) => (version.id === found.id ? { ...found, tags } : version));
      await this.#store.write(new Batch().object(bucket, key, changed));
      return { status, headers: this.versionHeader(bucket, found) };
    });
  }

  /** The range that `partNumber` asks for. */
  async #piece(request: S3Request, found: ObjectVersion): Promise<Range | undefined> {
    if (request.parameter('partNumber') === undefined) return undefined;
    const number = request.number('partNumber', 1);
    const pieces: Piece[] = found.pieces ? await this.#store.pieces(found.pieces.id) : [{ size: found.size }];
    const piece = pieces[number - 1];
    if (!piece) throw new S3Error('InvalidPartNumber', 'The requested partnumber is not satisfiable.', 416);
    // An empty object has no range; it is sent as it is.
    if (piece.size === 0) return undefined;
    const start = pieces.slice(0, number - 1).reduce((sum, { size }) => sum + size, 0);
    return { start, length: piece.size };
  }

  #describeFound(request: S3Request, found: ObjectVersion, whole: boolean): Record<string, string> {
    const overrides = [...request.query]
      .filter(([name]) => name.startsWith('response-'))
      .map(([name, value]) => [name.slice('response-'.length), value]);
    const { 'x-amz-storage-class': storageClass, ...headers } = found.headers;
    return {
      ...headers,
      ...(storageClass !== undefined &&
        storageClass !== 'STANDARD' && { 'x-amz-storage-class': storageClass }),
      ...Object.fromEntries(overrides),
      etag: quoted(found.etag),
      'last-modified': httpTime(found.modified),
      ...this.versionHeader(request.bucket, found),
      ...retentionHeaders(found.retention),
      ...(found.tags.length > 0 && { 'x-amz-tagging-count': String(found.tags.length) }),
      ...(whole &&
        request.header('x-amz-checksum-mode')?.toUpperCase() === 'ENABLED' &&
        checksumHeaders(found.checksum)),
    };
  }

  /** The checksum of a copy: the source's where it is of the whole and the wanted kind, else computed. */
  async #checksumOf(found: ObjectVersion, wanted: Algorithm | undefined): Promise<Checksum> {
    const algorithm = wanted ?? found.checksum.algorithm;
    if (found.checksum.type === 'FULL_OBJECT' && found.checksum.algorithm === algorithm)
      return found.checksum;
    if (algorithm === 'CRC64NVME') return { algorithm, type: 'FULL_OBJECT', value: found.crc64 };
    const digests = new Digests([algorithm]);
    for await (const bytes of this.#content.read(found.extents, 0, found.size)) digests.update(bytes);
    return { algorithm, type: 'FULL_OBJECT', value: base64(digests.digest(), algorithm) };
  }
}

export interface CopySource {
  bucket: string;
  key: string;
  versionId?: string;
}

interface Range {
  start: number;
  length: number;
}

/** What the key holds now, if it is an object. */
const current = ([newest]: Version[]) => (newest && !isMarker(newest) ? newest : undefined);

/** The versions other than `id`, and the one that is. */
function partition(versions: Version[], id: string): [others: Version[], same: Version[]] {
  return [versions.filter((version) => version.id !== id), versions.filter((version) => version.id === id)];
}

/** Throws `InvalidRange`; what is no range at all is no condition, as in RFC 9110. */
function parseRange(header: string | undefined, size: number): Range | undefined {
  const [, first = '', last = ''] = /^bytes=(\d*)-(\d*)$/.exec(header?.trim() ?? '') ?? [];
  if (first === '' && last === '') return undefined;
  const start = first === '' ? Math.max(size - Number(last), 0) : Number(first);
  const end = first === '' || last === '' ? size - 1 : Math.min(Number(last), size - 1);
  if (first !== '' && last !== '' && Number(first) > Number(last)) return undefined;
  if (start > end)
    throw new S3Error('InvalidRange', 'The requested range is not satisfiable.', 416, {
      'content-range': `bytes */${size}`,
    });
  return { start, length: end - start + 1 };
}

/** The metadata and tags that a request gives a new object. */
export function describe(request: S3Request): { headers: Record<string, string>; tags: Tag[] } {
  const headers: Record<string, string> = { 'content-type': 'binary/octet-stream' };
  const acl = request.header('x-amz-acl');
  if (acl !== undefined && acl !== 'bucket-owner-full-control')
    throw new S3Error('AccessControlListNotSupported', 'The bucket does not allow ACLs.', 400);
  let metadataBytes = 0;
  for (const name of Object.keys(request.http.headers)) {
    if (REFUSED_HEADERS.test(name)) throw new S3Error('NotImplemented', `${name} is not supported.`, 501);
    const value = request.header(name) ?? '';
    if (name.startsWith('x-amz-meta-')) {
      headers[name] = value;
      metadataBytes += name.length - 'x-amz-meta-'.length + value.length;
    } else if (KEPT_HEADERS.includes(name)) headers[name] = value;
  }
  if (metadataBytes > METADATA_BYTES)
    throw new S3Error('MetadataTooLarge', `User metadata may have ${METADATA_BYTES} bytes.`, 400);
  const encoding = withoutFraming(headers['content-encoding']);
  if (encoding === '') delete headers['content-encoding'];
  else headers['content-encoding'] = encoding;
  const tags = [...new URLSearchParams(request.header('x-amz-tagging') ?? '')];
  return { headers, tags: checkTags(tags) };
}

const withoutFraming = (encoding = '') =>
  encoding
    .split(',')
    .map((name) => name.trim())
    .filter((name) => name !== '' && name.toLowerCase() !== 'aws-chunked')
    .join(',');

function checkTags(tags: Tag[]): Tag[] {
  const wrong =
    tags.length > 10 ||
    new Set(tags.map(([key]) => key)).size < tags.length ||
    tags.some(([key, value]) => key === '' || key.length > 128 || value.length > 256);
  if (wrong)
    throw new S3Error('InvalidTag', 'At most 10 tags, keys unique and 1–128 long, values up to 256.', 400);
  return tags;
}

function directive(request: S3Request, header: string): 'COPY' | 'REPLACE' {
  const value = request.header(header) ?? 'COPY';
  if (value !== 'COPY' && value !== 'REPLACE')
    throw new S3Error('InvalidArgument', `${header} may be COPY or REPLACE.`, 400);
  return value;
}

/** `creates` is false for what prepares an object only: the beginning of a multipart upload, and its parts. */
export function authorizePut(request: S3Request, tags: Tag[], creates = true): void {
  const context: Record<string, string> = { 's3:objectcreationoperation': String(creates) };
  for (const name of ['if-match', 'if-none-match']) {
    const value = request.header(name);
    if (value !== undefined) context[`s3:${name}`] = value;
  }
  request.caller.authorize('s3:PutObject', request.objectArn, context);
  if (tags.length > 0) request.caller.authorize('s3:PutObjectTagging', request.objectArn);
}

/** IAM has its own action for requests that name a version: `s3:GetObject` becomes `s3:GetObjectVersion`. */
function authorizeVersion(request: S3Request, action: string): void {
  const named = request.parameter('versionId') !== undefined;
  request.caller.authorize(named ? action.replace('Object', 'ObjectVersion') : action, request.objectArn);
}

export function base64({ checksums }: Pick<Proven, 'checksums'>, algorithm: Algorithm): string {
  const checksum = checksums.get(algorithm);
  if (!checksum) throw new RangeError(`${algorithm} was not computed`);
  return checksum.toString('base64');
}

const checksumHeaders = ({ algorithm, type, value }: Checksum) => ({
  [checksumHeader(algorithm)]: value,
  'x-amz-checksum-type': type,
});

export const checksumElements = ({ algorithm, type, value }: Checksum) => ({
  [`Checksum${algorithm}`]: value,
  ChecksumType: type,
});

export const encryptionHeaders = ({ headers }: Pick<ObjectVersion, 'headers'>) =>
  Object.fromEntries(Object.entries(headers).filter(([name]) => name.startsWith('x-amz-server-side-')));

export const isoTime = (milliseconds: number) => new Date(milliseconds).toISOString();
const httpTime = (milliseconds: number) => new Date(milliseconds).toUTCString();

function describeDeleted(Key: string, VersionId: string | undefined, headers: Record<string, string>) {
  const marker = headers['x-amz-delete-marker'] === 'true';
  return {
    Key,
    VersionId,
    DeleteMarker: marker ? true : undefined,
    DeleteMarkerVersionId: marker ? headers['x-amz-version-id'] : undefined,
  };
}

const DELETE = z.object({
  Object: z
    .array(
      z.object({
        Key: z.string().min(1),
        VersionId: z.string().optional(),
        ETag: z.string().optional(),
      }),
    )
    .min(1)
    .max(1000),
  Quiet: z.string().optional(),
});

const TAGGING = z.object({
  TagSet: z.union([
    z.string().regex(/^\s*$/),
    z.object({ Tag: z.array(z.object({ Key: z.string(), Value: z.string() })) }),
  ]),
});
