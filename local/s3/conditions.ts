/** The conditions of requests: RFC 9110's for reading and copying, S3's two for writing. */
import { S3Error, type S3Request, unquoted } from './wire.ts';

interface Validators {
  etag: string;
  modified: number;
}

const failed = (header: string) =>
  new S3Error(
    'PreconditionFailed',
    `At least one of the pre-conditions you specified did not hold: ${header}.`,
    412,
  );

/** Reading: `PreconditionFailed` (412) or `NotModified` (304). */
export function checkRead(request: S3Request, found: Validators): void {
  const unmet = unmetCondition(request, '', found);
  if (unmet === 'if-none-match' || unmet === 'if-modified-since')
    throw new S3Error('NotModified', 'Not Modified', 304, { etag: `"${found.etag}"` });
  if (unmet !== undefined) throw failed(unmet);
}

/** The source of a copy: any condition that does not hold is a `PreconditionFailed`. */
export function checkSource(request: S3Request, source: Validators): void {
  const unmet = unmetCondition(request, 'x-amz-copy-source-', source);
  if (unmet !== undefined) throw failed(unmet);
}

/** Writing, under the key's lock: `If-None-Match: *` and `If-Match`; `current` is what the key holds. */
export function checkWrite(request: S3Request, current: Validators | undefined): void {
  const none = request.header('if-none-match');
  if (none !== undefined && none !== '*')
    throw new S3Error('NotImplemented', 'If-None-Match may only be * when writing.', 501);
  if (none !== undefined && current) throw failed('If-None-Match');
  const match = request.header('if-match');
  if (match === undefined) return;
  if (!current) throw new S3Error('NoSuchKey', 'The specified key does not exist.', 404);
  if (!matches(match, current.etag)) throw failed('If-Match');
}

/** Times count in whole seconds, as in the headers; an ETag condition outweighs its time condition. */
function unmetCondition(
  request: S3Request,
  prefix: string,
  { etag, modified }: Validators,
): string | undefined {
  const seconds = Math.floor(modified / 1000);
  const time = (name: string) => {
    const since = Date.parse(request.header(`${prefix}${name}`) ?? '');
    return Number.isNaN(since) ? undefined : Math.floor(since / 1000);
  };
  const match = request.header(`${prefix}if-match`);
  const unmodifiedSince = time('if-unmodified-since');
  if (match !== undefined) {
    if (!matches(match, etag)) return `${prefix}if-match`;
  } else if (unmodifiedSince !== undefined && seconds > unmodifiedSince)
    return `${prefix}if-unmodified-since`;
  const none = request.header(`${prefix}if-none-match`);
  const modifiedSince = time('if-modified-since');
  if (none !== undefined) {
    if (matches(none, etag)) return `${prefix}if-none-match`;
  } else if (modifiedSince !== undefined && seconds <= modifiedSince) return `${prefix}if-modified-since`;
  return undefined;
}

const matches = (header: string, etag: string) =>
  header.split(',').some((candidate) => candidate.trim() === '*' || unquoted(candidate) === etag);
