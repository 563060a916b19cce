/** Documents in S3: JSON, JSON lines and text, streamed where they can be long. */
import { createHash } from 'node:crypto';
import { createInterface } from 'node:readline';
import { PassThrough, Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { GetObjectCommand, PutObjectCommand, type S3Client } from '@aws-sdk/client-s3';
import { Upload } from '@aws-sdk/lib-storage';
import type { ObjectRef } from './contracts.ts';
import { isNotFound, ServiceUnavailable } from './errors.ts';

/** An object as it was written: which version, which bytes. */
export interface Written extends ObjectRef {
  /** `sha256:<hex>` of the whole. */
  checksum: string;
}

/** The object's body as a stream; `undefined` when there is no such object. */
export async function readObject(s3: S3Client, ref: ObjectRef): Promise<Readable | undefined> {
  return (await openObject(s3, ref))?.body;
}

/** The same with the version that it is of. */
export async function openObject(
  s3: S3Client,
  { bucket, key, versionId }: ObjectRef,
): Promise<(ObjectRef & { body: Readable }) | undefined> {
  const found = await getObject(s3, { bucket, key, versionId });
  return found && { ...found.ref, body: found.body };
}

async function getObject(
  s3: S3Client,
  { bucket, key, versionId }: ObjectRef,
): Promise<{ ref: ObjectRef; body: Readable; size: number } | undefined> {
  try {
    const { Body, VersionId, ContentLength } = await s3.send(
      new GetObjectCommand({ Bucket: bucket, Key: key, VersionId: versionId }),
    );
    const ref = { bucket, key, ...(VersionId && { versionId: VersionId }) };
    return { ref, body: Body as Readable, size: ContentLength ?? 0 };
  } catch (error) {
    if (isNotFound(error)) return undefined;
    throw error;
  }
}

export async function readBytes(s3: S3Client, ref: ObjectRef): Promise<Uint8Array | undefined> {
  return (await readVersion(s3, ref))?.bytes;
}

/** The object's bytes, and which version they are; `undefined` when there is no such object. */
export async function readVersion(
  s3: S3Client,
  ref: ObjectRef,
): Promise<(ObjectRef & { bytes: Uint8Array }) | undefined> {
  const found = await getObject(s3, ref);
  if (!found) return undefined;
  // Into its place as it comes: pieces put together afterwards would for a moment take twice the memory.
  const bytes = Buffer.allocUnsafe(found.size);
  let at = 0;
  for await (const chunk of found.body) {
    (chunk as Buffer).copy(bytes, at);
    at += (chunk as Buffer).length;
  }
  if (at !== found.size) throw new ServiceUnavailable(`${ref.key} came as ${at} bytes of ${found.size}`);
  return { ...found.ref, bytes };
}

/** Parsed JSON; the caller checks its shape where it does not come from Slideway itself. */
export async function readJson(s3: S3Client, ref: ObjectRef): Promise<unknown> {
  const bytes = await readBytes(s3, ref);
  return bytes && JSON.parse(Buffer.from(bytes).toString('utf8'));
}

/** One parsed line after the other of a JSON lines object that Slideway wrote. */
export async function* readLines<T>(s3: S3Client, ref: ObjectRef): AsyncGenerator<T> {
  const body = await readObject(s3, ref);
  if (!body) return;
  for await (const line of createInterface({ input: body, crlfDelay: Number.POSITIVE_INFINITY })) {
    if (line !== '') yield JSON.parse(line) as T;
  }
}

export async function writeObject(
  s3: S3Client,
  ref: ObjectRef,
  body: string | Uint8Array,
  contentType: string,
): Promise<Written> {
  const { bucket, key } = ref;
  const { VersionId } = await s3.send(
    new PutObjectCommand({ Bucket: bucket, Key: key, Body: body, ContentType: contentType }),
  );
  return { bucket, key, ...(VersionId && { versionId: VersionId }), checksum: sha256(body) };
}

export const writeJson = (s3: S3Client, ref: ObjectRef, value: unknown): Promise<Written> =>
  writeObject(s3, ref, `${JSON.stringify(value, null, 2)}\n`, 'application/json');

/** Writes text of any length as it is made, in parts, never holding it whole. */
export async function writeText(
  s3: S3Client,
  ref: ObjectRef,
  text: AsyncIterable<string> | Iterable<string>,
  contentType: string,
): Promise<Written> {
  const { bucket, key } = ref;
  const hash = createHash('sha256');
  async function* hashed() {
    for await (const chunk of text) {
      hash.update(chunk);
      yield chunk;
    }
  }
  const body = new PassThrough({ highWaterMark: 1 << 20 });
  const upload = new Upload({
    client: s3,
    params: { Bucket: bucket, Key: key, Body: body, ContentType: contentType },
    partSize: 8 << 20,
    queueSize: 2,
  });
  const [{ VersionId }] = await Promise.all([upload.done(), pipeline(Readable.from(hashed()), body)]);
  const checksum = `sha256:${hash.digest('hex')}`;
  return { bucket, key, ...(VersionId && { versionId: VersionId }), checksum };
}

/** JSON on one line: readers of lines also break at U+2028 and U+2029, which JSON leaves as they are. */
export const jsonLine = (value: unknown): string =>
  JSON.stringify(value).replace(/[\u2028\u2029]/g, (character) =>
    character === '\u2028' ? '\\u2028' : '\\u2029',
  );

export async function writeLines(
  s3: S3Client,
  ref: ObjectRef,
  values: AsyncIterable<unknown> | Iterable<unknown>,
): Promise<Written> {
  async function* lines() {
    for await (const value of values) yield `${jsonLine(value)}\n`;
  }
  return writeText(s3, ref, lines(), 'application/x-ndjson');
}

export const sha256 = (bytes: string | Uint8Array): string =>
  `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
