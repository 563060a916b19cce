/**
 * The `aws-chunked` framing in which SDKs send streamed bodies: chunks with their length in hexadecimal (and, when
 * signed, a signature), then trailers, among them the checksum. The framing is taken off; signatures inside it are
 * read past, since the gateway has already authenticated the request.
 */
import { ServiceError } from '../types.ts';

const LINE_LIMIT = 8192;

/** The decoded body; `trailers` (lower-case names) is filled once the body has been read to its end. */
export class ChunkedBody {
  readonly trailers = new Map<string, string>();
  readonly #source: AsyncIterable<Buffer>;

  constructor(source: AsyncIterable<Buffer>) {
    this.#source = source;
  }

  /** Throws {@link ServiceError} `IncompleteBody` when the framing is broken or ends early. */
  async *[Symbol.asyncIterator](): AsyncGenerator<Buffer> {
    let state: 'size' | 'data' | 'data-end' | 'trailers' | 'done' = 'size';
    let left = 0;
    let line = '';
    for await (const bytes of this.#source) {
      let at = 0;
      while (at < bytes.length && state !== 'done') {
        if (state === 'data') {
          const piece = bytes.subarray(at, at + left);
          at += piece.length;
          left -= piece.length;
          if (left === 0) state = 'data-end';
          yield piece;
          continue;
        }
        const end = bytes.indexOf(10, at);
        line += bytes.toString('latin1', at, end < 0 ? bytes.length : end);
        if (line.length > LINE_LIMIT) throw broken('a line is too long');
        if (end < 0) break;
        at = end + 1;
        const text = line.trimEnd();
        line = '';
        if (state === 'size') {
          const size = /^([0-9a-fA-F]{1,13})(?:;.*)?$/.exec(text)?.[1];
          if (size === undefined) throw broken('a chunk has no size');
          left = Number.parseInt(size, 16);
          state = left === 0 ? 'trailers' : 'data';
        } else if (state === 'data-end') {
          if (text !== '') throw broken('a chunk is longer than its size');
          state = 'size';
        } else if (text === '') {
          state = 'done';
        } else {
          const colon = text.indexOf(':');
          this.trailers.set(text.slice(0, colon).trim().toLowerCase(), text.slice(colon + 1).trim());
        }
      }
    }
    // Some clients leave out the last empty line; everything that counts has been read by then.
    if (state !== 'done' && state !== 'trailers') throw broken('it ends too early');
  }
}

const broken = (how: string) =>
  new ServiceError('IncompleteBody', `The aws-chunked request body is not well formed: ${how}.`, 400);
