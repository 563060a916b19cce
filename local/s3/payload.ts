/**
 * The body of a request, proven: its framing taken off, its length, MD5, SHA-256 and checksum held against what the
 * client said they are, in headers or in the trailer.
 */

import { ALGORITHMS, type Algorithm, DIGEST_BYTES, Digests } from './checksum.ts';
import { ChunkedBody } from './chunked.ts';
import { S3Error, type S3Request } from './wire.ts';

/** What is known of a body once it has been read and found right. */
export interface Proven {
  size: number;
  md5: Buffer;
  checksums: Map<Algorithm, Buffer>;
  /** The algorithm the client chose to send a checksum of. */
  declared: Algorithm | undefined;
}

/** Largest body of PutObject and UploadPart. */
export const BODY_BYTES = 5 * 1024 ** 3;

export const checksumHeader = (algorithm: Algorithm) => `x-amz-checksum-${algorithm.toLowerCase()}`;

export class Payload implements AsyncIterable<Buffer> {
  readonly digests: Digests;
  /** Bytes to come, without framing. */
  readonly length: number;
  readonly declared: Algorithm | undefined;
  readonly #request: S3Request;
  readonly #chunked: ChunkedBody | undefined;

  /**
   * `algorithms` are computed besides those the client named. Where the request's checksum is of something else than
   * its body (CompleteMultipartUpload), `summed` is false. Throws where the headers contradict themselves.
   */
  constructor(request: S3Request, algorithms: Iterable<Algorithm> = [], summed = true) {
    this.#request = request;
    const sha256 = request.header('x-amz-content-sha256') ?? '';
    const framed =
      sha256.startsWith('STREAMING-') ||
      /(^|,)\s*aws-chunked/i.test(request.header('content-encoding') ?? '');
    this.#chunked = framed ? new ChunkedBody(bytesOf(request)) : undefined;
    this.length = declaredLength(request, framed);
    this.declared = summed ? declaredAlgorithm(request) : undefined;
    this.digests = new Digests(
      new Set([
        ...algorithms,
        ...(this.declared ? [this.declared] : []),
        ...(isSha256(sha256) ? (['SHA256'] as const) : []),
      ]),
    );
  }

  [Symbol.asyncIterator](): AsyncIterator<Buffer> {
    return (this.#chunked ?? bytesOf(this.#request))[Symbol.asyncIterator]();
  }

  /** The same bytes, through `digests` as they pass. */
  async *digested(): AsyncGenerator<Buffer> {
    for await (const bytes of this) {
      this.digests.update(bytes);
      yield bytes;
    }
  }

  /**
   * To be called when all has gone through `digests`. Throws `IncompleteBody`, `BadDigest`, `InvalidDigest`,
   * `InvalidRequest`, `XAmzContentSHA256Mismatch`.
   */
  prove(): Proven {
    const { size, md5, checksums } = this.digests.digest();
    if (size !== this.length)
      throw new S3Error(
        'IncompleteBody',
        `The body has ${size} bytes, not the ${this.length} announced.`,
        400,
      );
    const contentMd5 = this.#request.header('content-md5');
    if (contentMd5 !== undefined && !md5.equals(decode(contentMd5, 16, 'Content-MD5', 'InvalidDigest')))
      throw new S3Error('BadDigest', 'The Content-MD5 you specified did not match what we received.', 400);
    const sha256 = this.#request.header('x-amz-content-sha256') ?? '';
    if (isSha256(sha256) && checksums.get('SHA256')?.toString('hex') !== sha256)
      throw new S3Error(
        'XAmzContentSHA256Mismatch',
        "The provided 'x-amz-content-sha256' header does not match what was computed.",
        400,
      );
    if (this.declared) {
      const name = checksumHeader(this.declared);
      const value = this.#request.header(name) ?? this.#chunked?.trailers.get(name);
      if (value === undefined)
        throw new S3Error('MalformedTrailer', `The trailer ${name} was announced but did not come.`, 400);
      const said = decode(value, DIGEST_BYTES[this.declared], name, 'InvalidRequest');
      if (!checksums.get(this.declared)?.equals(said))
        throw new S3Error(
          'BadDigest',
          `The ${this.declared} you specified did not match the calculated checksum.`,
          400,
        );
    }
    return { size, md5, checksums, declared: this.declared };
  }
}

const isSha256 = (value: string) => /^[0-9a-f]{64}$/.test(value);

/** A refused body must be left readable, so that the answer can still be sent on the same connection. */
const bytesOf = (request: S3Request): AsyncIterable<Buffer> =>
  request.http.iterator({ destroyOnReturn: false });

function declaredLength(request: S3Request, framed: boolean): number {
  const text = request.header(framed ? 'x-amz-decoded-content-length' : 'content-length');
  if (text === undefined || !/^\d{1,15}$/.test(text))
    throw new S3Error('MissingContentLength', 'You must provide the Content-Length HTTP header.', 411);
  return Number(text);
}

/** The one algorithm that headers or trailer carry a checksum of. */
export function declaredAlgorithm(request: S3Request): Algorithm | undefined {
  const announced = (request.header('x-amz-trailer') ?? '').toLowerCase().split(/\s*,\s*/);
  const found = ALGORITHMS.filter((algorithm) => {
    const name = checksumHeader(algorithm);
    return request.header(name) !== undefined || announced.includes(name);
  });
  if (found.length > 1)
    throw new S3Error('InvalidRequest', 'Expecting a single x-amz-checksum- header.', 400);
  const unknown = [...Object.keys(request.http.headers), ...announced].find(
    (name) =>
      /^x-amz-checksum-(?!algorithm$|type$|mode$)/.test(name) &&
      !ALGORITHMS.some((algorithm) => checksumHeader(algorithm) === name),
  );
  if (unknown !== undefined) throw new S3Error('NotImplemented', `${unknown} is not supported.`, 501);
  const named = request.header('x-amz-sdk-checksum-algorithm');
  if (named !== undefined && found[0] !== parseAlgorithm(named))
    throw new S3Error(
      'InvalidRequest',
      'x-amz-sdk-checksum-algorithm specified, but no corresponding x-amz-checksum-* or x-amz-trailer headers were found.',
      400,
    );
  return found[0];
}

/** Throws `InvalidRequest` when there is no such algorithm. */
export function parseAlgorithm(name: string): Algorithm {
  const algorithm = ALGORITHMS.find((known) => known === name.toUpperCase());
  if (!algorithm)
    throw new S3Error('InvalidRequest', `Checksum algorithm ${name} is not one of ${ALGORITHMS}.`, 400);
  return algorithm;
}

function decode(value: string, bytes: number, name: string, code: string): Buffer {
  const decoded = Buffer.from(value, 'base64');
  if (decoded.length !== bytes || decoded.toString('base64') !== value)
    throw new S3Error(code, `Value for ${name} header is invalid.`, 400);
  return decoded;
}
