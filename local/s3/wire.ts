/**
 * S3's REST protocol as text: what a request names, how answers and errors are written, and how the few XML bodies
 * are read. Paths are taken raw, since a key may hold `..`, `//` and `%`.
 */
import type { IncomingMessage } from 'node:http';
import { XMLParser } from 'fast-xml-parser';
import { z } from 'zod';
import { type Caller, ServiceError } from '../types.ts';

export class S3Error extends ServiceError {
  readonly headers: Record<string, string>;
  constructor(code: string, message: string, status: number, headers: Record<string, string> = {}) {
    super(code, message, status);
    this.headers = headers;
  }
}

export interface Reply {
  status?: number;
  headers?: Record<string, string | number>;
  body?: string | AsyncIterable<Buffer>;
  /** Called once the body has been sent or given up. */
  done?(): void;
}

const KEY_BYTES = 1024;
const XML_BYTES = 2 * 1024 * 1024;

/** Parameters that choose the operation; one that no operation takes is refused, never ignored. */
const SUBRESOURCES = [
  ...['abac', 'accelerate', 'acl', 'analytics', 'attributes', 'cors', 'delete', 'encryption'],
  ...['intelligent-tiering', 'inventory', 'legal-hold', 'lifecycle', 'location', 'logging', 'metadataTable'],
  ...['metrics', 'notification', 'object-lock', 'ownershipControls', 'policy', 'policyStatus'],
  ...['publicAccessBlock', 'renameObject', 'replication', 'requestPayment', 'restore', 'retention', 'select'],
  ...['session', 'tagging', 'torrent', 'uploadId', 'uploads', 'versioning', 'versions', 'website'],
];

export class S3Request {
  readonly http: IncomingMessage;
  readonly caller: Caller;
  readonly method: string;
  /** Empty when the request is for the service. */
  readonly bucket: string;
  /** Empty when the request is for a bucket. */
  readonly key: string;
  readonly query: URLSearchParams;

  constructor(http: IncomingMessage, caller: Caller) {
    const [path = '', query = ''] = (http.url ?? '/').split(/\?(.*)/s);
    const { bucket, key } = splitPath(path.slice(1));
    this.http = http;
    this.caller = caller;
    this.method = http.method ?? 'GET';
    this.bucket = bucket;
    this.key = key;
    this.query = new URLSearchParams(query);
  }

  header(name: string): string | undefined {
    const value = this.http.headers[name];
    return Array.isArray(value) ? value.join(',') : value;
  }

  parameter(name: string): string | undefined {
    return this.query.get(name) ?? undefined;
  }

  /** A whole number from the query; throws `InvalidArgument`. */
  number(name: string, fallback: number): number {
    const text = this.parameter(name);
    if (text === undefined || text === '') return fallback;
    if (!/^\d{1,9}$/.test(text))
      throw new S3Error('InvalidArgument', `${name} must be a whole number, not '${text}'.`, 400);
    return Number(text);
  }

  /** As the table of operations has it: `PUT object ?tagging`. */
  get operation(): string {
    const scope = this.key !== '' ? 'object' : this.bucket !== '' ? 'bucket' : 'service';
    const subresource = SUBRESOURCES.find((name) => this.query.has(name));
    return `${this.method} ${scope}${subresource === undefined ? '' : ` ?${subresource}`}`;
  }

  get bucketArn(): string {
    return `arn:aws:s3:::${this.bucket}`;
  }

  get objectArn(): string {
    return objectArn(this.bucket, this.key);
  }
}

export const objectArn = (bucket: string, key: string) => `arn:aws:s3:::${bucket}/${key}`;

/** Bucket and key of an encoded `bucket/key`. Throws `InvalidURI`, `KeyTooLongError`. */
export function splitPath(path: string): { bucket: string; key: string } {
  const [bucket = '', key = ''] = path.split(/\/(.*)/s);
  const decoded = { bucket: decode(bucket), key: decode(key) };
  if (Buffer.byteLength(decoded.key) > KEY_BYTES)
    throw new S3Error('KeyTooLongError', `A key may be at most ${KEY_BYTES} bytes of UTF-8.`, 400);
  return decoded;
}

function decode(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    throw new S3Error('InvalidURI', 'The path is not percent-encoded UTF-8.', 400);
  }
}

// --- XML ------------------------------------------------------------------------------------------------------

/** Elements by name; an array repeats its element, `undefined` leaves it out. */
export interface Elements {
  [name: string]: Value | Value[];
}
type Value = string | number | boolean | undefined | Elements;

const NAMESPACE = 'http://s3.amazonaws.com/doc/2006-03-01/';

export function toXml(root: string, elements: Elements): string {
  const namespace = root === 'Error' ? '' : ` xmlns="${NAMESPACE}"`;
  return `<?xml version="1.0" encoding="UTF-8"?>\n<${root}${namespace}>${inner(elements)}</${root}>`;
}

function inner(elements: Elements): string {
  let text = '';
  for (const [name, values] of Object.entries(elements))
    for (const value of Array.isArray(values) ? values : [values])
      if (value !== undefined)
        text += `<${name}>${typeof value === 'object' ? inner(value) : escapeText(String(value))}</${name}>`;
  return text;
}

const escapeText = (text: string) =>
  // Control characters, above all the carriage return, survive only as references.
  // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is looked for
  text.replace(/[&<>"\u0000-\u001f\u007f]/g, (character) => `&#${character.charCodeAt(0)};`);

const parser = new XMLParser({
  ignoreAttributes: true,
  parseTagValue: false,
  trimValues: false,
  htmlEntities: true,
  isArray: (name) => ['Object', 'Part', 'Tag'].includes(name),
});

/** Reads a small XML body as `schema` has it. Throws `MalformedXML`. */
export async function readXml<T>(
  body: AsyncIterable<Buffer>,
  root: string,
  schema: z.ZodType<T>,
): Promise<T> {
  const chunks: Buffer[] = [];
  let size = 0;
  for await (const chunk of body) {
    size += chunk.length;
    if (size <= XML_BYTES) chunks.push(chunk);
  }
  if (size > XML_BYTES) throw malformed();
  let document: unknown;
  try {
    document = parser.parse(Buffer.concat(chunks));
  } catch {
    throw malformed();
  }
  const parsed = z.object({ [root]: schema }).safeParse(document);
  const found = parsed.success ? (parsed.data as Record<string, T>)[root] : undefined;
  if (found === undefined) throw malformed();
  return found;
}

export const malformed = () =>
  new S3Error('MalformedXML', 'The XML you provided was not well-formed or did not validate.', 400);

/** Leaves names as they are, or percent-encodes them where the client asked for it. */
export function namer(request: S3Request): (name: string | undefined) => string | undefined {
  const encoding = request.parameter('encoding-type');
  if (encoding === undefined) return (name) => name;
  if (encoding !== 'url') throw new S3Error('InvalidArgument', 'encoding-type may only be url.', 400);
  return (name) => (name === undefined ? undefined : encodeURIComponent(name).replaceAll('%2F', '/'));
}

export const quoted = (etag: string) => `"${etag}"`;
export const unquoted = (etag: string) => etag.trim().replace(/^(?:W\/)?"(.*)"$/, '$1');
