/**
 * The one door of the local AWS: an HTTP server on loopback that knows who calls (by SigV4 signature), finds
 * the service (by the signature's scope), and counts what passes.
 */
import {
  createHash,
  createHmac,
  createSecretKey,
  type KeyObject,
  randomUUID,
  timingSafeEqual,
} from 'node:crypto';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { type Caller, type HttpService, type JsonService, ServiceError } from './types.ts';

/** A service whose requests are small: it gets the body whole. */
export interface BodyService {
  /** Name of the operation, for the counts. */
  operation(request: IncomingMessage, body: Buffer): string;
  handle(request: IncomingMessage, body: Buffer, response: ServerResponse, caller: Caller): Promise<void>;
}

/** How a service is offered, by the protocol it speaks. */
export type Offer =
  | { protocol: 's3'; service: HttpService }
  | { protocol: 'json'; service: JsonService }
  | { protocol: 'json-body'; service: BodyService }
  | { protocol: 'query-body'; service: BodyService };

/** Finds the holder of an access key. */
export type Principals = (accessKeyId: string) => { caller: Caller; secretAccessKey: string } | undefined;

/** Requests since the start: by class (`s3.get`, `dynamodb.PutItem`, …), and the same by principal. */
export interface RequestCounts {
  byClass: Record<string, number>;
  byPrincipal: Record<string, Record<string, number>>;
}

const MAX_BODY_BYTES = 16 * 1024 * 1024;

/** The parts of a SigV4 signature, from the Authorization header or a presigned URL. */
interface Signature {
  accessKeyId: string;
  date: string;
  region: string;
  service: string;
  signedHeaders: string[];
  signature: string;
  timestamp: string;
  /** Presigned URLs only: milliseconds since the epoch. */
  expiresAt?: number;
}

export class Gateway {
  readonly #server: Server;
  readonly #services: Record<string, Offer>;
  readonly #principals: Principals;
  readonly #counts: RequestCounts = { byClass: {}, byPrincipal: {} };

  /** `services` by the name that signatures are scoped to (`s3`, `dynamodb`, `sns`, `states`, …). */
  constructor(options: { services: Record<string, Offer>; principals: Principals }) {
    this.#services = options.services;
    this.#principals = options.principals;
    this.#server = createServer({ requestTimeout: 0, keepAliveTimeout: 65_000 }, (request, response) => {
      void this.#serve(request, response);
    });
  }

  /** Listens on 127.0.0.1; `port` 0 takes a free one. */
  async listen(port: number): Promise<void> {
    await new Promise<void>((resolve, reject) => {
      this.#server.once('error', reject);
      this.#server.listen(port, '127.0.0.1', () => {
        this.#server.removeListener('error', reject);
        resolve();
      });
    });
  }

  get endpoint(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  counts(): RequestCounts {
    return structuredClone(this.#counts);
  }

  /** Lets running requests end for a moment, then cuts what is left. */
  async close(): Promise<void> {
    const closed = new Promise<void>((resolve) => this.#server.close(() => resolve()));
    this.#server.closeIdleConnections();
    const cut = setTimeout(() => this.#server.closeAllConnections(), 2000);
    await closed;
    clearTimeout(cut);
  }

  async #serve(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const requestId = randomUUID();
    response.setHeader('x-amzn-requestid', requestId);
    let offer: Offer | undefined;
    try {
      const signature = readSignature(request);
      offer = this.#services[signature.service];
      if (offer === undefined) {
        throw new ServiceError(
          'UnknownService',
          `The local AWS has no service '${signature.service}'; it has ${Object.keys(this.#services).join(', ')}.`,
          404,
        );
      }
      if (offer.protocol === 's3') response.setHeader('x-amz-request-id', requestId);
      const principal = this.#principals(signature.accessKeyId);
      if (principal === undefined) throw unknownKey(offer, signature.accessKeyId);
      const body = offer.protocol === 's3' ? undefined : await readBody(request);
      verify(request, signature, principal.secretAccessKey, body);
      await this.#dispatch(offer, signature.service, request, body, response, principal.caller);
    } catch (error) {
      answerError(request, response, offer, error, requestId);
    }
  }

  async #dispatch(
    offer: Offer,
    service: string,
    request: IncomingMessage,
    body: Buffer | undefined,
    response: ServerResponse,
    caller: Caller,
  ): Promise<void> {
    if (offer.protocol === 's3') {
      this.#count(`s3.${s3Class(request)}`, caller);
      return offer.service.handle(request, response, caller);
    }
    const bytes = body ?? Buffer.alloc(0);
    if (offer.protocol !== 'json') {
      this.#count(`${service}.${offer.service.operation(request, bytes)}`, caller);
      return offer.service.handle(request, bytes, response, caller);
    }
    const name =
      String(request.headers['x-amz-target'] ?? '')
        .split('.')
        .at(-1) ?? '';
    const operation = Object.hasOwn(offer.service.operations, name)
      ? offer.service.operations[name]
      : undefined;
    if (operation === undefined) {
      throw new ServiceError(
        'UnknownOperationException',
        `The local AWS does not support ${service}:${name || '(no X-Amz-Target)'}; it supports ${Object.keys(
          offer.service.operations,
        ).join(', ')}.`,
      );
    }
    this.#count(`${service}.${name}`, caller);
    const output = await operation(parseJson(bytes) as never, caller);
    response.writeHead(200, { 'content-type': jsonType(request) });
    response.end(JSON.stringify(output ?? {}));
    return undefined;
  }

  #count(name: string, caller: Caller): void {
    const { byClass, byPrincipal } = this.#counts;
    byClass[name] = (byClass[name] ?? 0) + 1;
    byPrincipal[caller.arn] ??= {};
    const own = byPrincipal[caller.arn] ?? {};
    own[name] = (own[name] ?? 0) + 1;
  }
}

/** S3's classes as they are priced: `put` is PUT, COPY, POST and LIST; `get` is GET and HEAD; `delete` is free. */
function s3Class(request: IncomingMessage): 'put' | 'get' | 'delete' {
  const [path, query] = splitUrl(request);
  if (request.method === 'DELETE') return 'delete';
  if (request.method !== 'GET') return request.method === 'HEAD' ? 'get' : 'put';
  const key = path.split('/').slice(2).join('/');
  const parameters = new URLSearchParams(query);
  const lists = key === '' && !['location', 'versioning', 'policy'].some((name) => parameters.has(name));
  return lists ? 'put' : 'get';
}

function splitUrl(request: IncomingMessage): [path: string, query: string] {
  const url = request.url ?? '/';
  const mark = url.indexOf('?');
  return mark < 0 ? [url, ''] : [url.slice(0, mark), url.slice(mark + 1)];
}

async function readBody(request: IncomingMessage): Promise<Buffer> {
  const chunks: Buffer[] = [];
  let bytes = 0;
  for await (const chunk of request as AsyncIterable<Buffer>) {
    bytes += chunk.length;
    if (bytes > MAX_BODY_BYTES) {
      throw new ServiceError('RequestEntityTooLarge', `A request may hold ${MAX_BODY_BYTES} bytes.`, 413);
    }
    chunks.push(chunk);
  }
  return Buffer.concat(chunks);
}

function parseJson(body: Buffer): unknown {
  if (body.length === 0) return {};
  try {
    return JSON.parse(body.toString('utf8'));
  } catch {
    throw new ServiceError('SerializationException', 'The body is not JSON.');
  }
}

function jsonType(request: IncomingMessage): string {
  return request.headers['content-type'] ?? 'application/x-amz-json-1.1';
}

// --- SigV4 -------------------------------------------------------------------------------------------------------

function readSignature(request: IncomingMessage): Signature {
  const header = request.headers.authorization;
  if (header !== undefined) {
    const parts =
      /^AWS4-HMAC-SHA256\s+Credential=([^,\s]+),\s*SignedHeaders=([^,\s]+),\s*Signature=([0-9a-f]{64})$/.exec(
        header,
      );
    const timestamp = request.headers['x-amz-date'];
    if (!parts || typeof timestamp !== 'string') {
      throw new ServiceError(
        'IncompleteSignature',
        'The Authorization header is not a SigV4 signature.',
        403,
      );
    }
    const [, credential = '', signed = '', signature = ''] = parts;
    return {
      ...readCredential(credential),
      signedHeaders: signed.split(';'),
      signature,
      timestamp,
    };
  }
  const query = new URLSearchParams(splitUrl(request)[1]);
  const credential = query.get('X-Amz-Credential');
  if (credential === null) {
    throw new ServiceError(
      'MissingAuthenticationToken',
      'The request is not signed. Use credentials that the local AWS printed or `slideway` set for you.',
      403,
    );
  }
  const timestamp = query.get('X-Amz-Date') ?? '';
  const signedAt = Date.parse(
    timestamp.replace(/^(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)Z$/, '$1-$2-$3T$4:$5:$6Z'),
  );
  return {
    ...readCredential(credential),
    signedHeaders: (query.get('X-Amz-SignedHeaders') ?? '').split(';'),
    signature: query.get('X-Amz-Signature') ?? '',
    timestamp,
    expiresAt: signedAt + Number(query.get('X-Amz-Expires') ?? '0') * 1000,
  };
}

function readCredential(credential: string) {
  const [accessKeyId, date, region, service, end, ...rest] = credential.split('/');
  if (!accessKeyId || !date || !region || !service || end !== 'aws4_request' || rest.length > 0) {
    throw new ServiceError(
      'IncompleteSignature',
      `Credential must be <key>/<date>/<region>/<service>/aws4_request, got '${credential}'.`,
      403,
    );
  }
  return { accessKeyId, date, region, service };
}

/** Throws unless the signature is the one that the secret gives; the body counts by its declared hash. */
const KEYS_AT_MOST = 1000;
const signingKeys = new Map<string, KeyObject>();

/** The key of a day's signatures for one region and service; made once, because making it takes four of five hashes. */
function signingKey(secret: string, scope: string): KeyObject {
  const name = `${secret} ${scope}`;
  let key = signingKeys.get(name);
  if (key === undefined) {
    const bytes = scope
      .split('/')
      .reduce<Buffer>(
        (previous, part) => createHmac('sha256', previous).update(part).digest(),
        Buffer.from(`AWS4${secret}`),
      );
    key = createSecretKey(bytes);
    if (signingKeys.size >= KEYS_AT_MOST) signingKeys.clear();
    signingKeys.set(name, key);
  }
  return key;
}

function verify(
  request: IncomingMessage,
  signature: Signature,
  secret: string,
  body: Buffer | undefined,
): void {
  if (signature.expiresAt !== undefined && !(signature.expiresAt > Date.now())) {
    throw new ServiceError('AccessDenied', 'Request has expired', 403);
  }
  const declared = request.headers['x-amz-content-sha256'];
  const actual = body && createHash('sha256').update(body).digest('hex');
  if (typeof declared === 'string' && actual && /^[0-9a-f]{64}$/.test(declared) && declared !== actual) {
    throw new ServiceError('InvalidSignatureException', 'The body is not the one that was signed.', 403);
  }
  const payload =
    declared ?? (signature.expiresAt !== undefined ? 'UNSIGNED-PAYLOAD' : (actual ?? 'UNSIGNED-PAYLOAD'));
  const [path, query] = splitUrl(request);
  const canonical = [
    request.method,
    // S3 signs the path as it is sent; all others encode it once more.
    signature.service === 's3' ? path : path.split('/').map(encode).join('/'),
    canonicalQuery(query),
    ...signature.signedHeaders.map((name) => `${name}:${headerValue(request, name)}`),
    '',
    signature.signedHeaders.join(';'),
    payload,
  ].join('\n');
  const scope = `${signature.date}/${signature.region}/${signature.service}/aws4_request`;
  const toSign = [
    'AWS4-HMAC-SHA256',
    signature.timestamp,
    scope,
    createHash('sha256').update(canonical).digest('hex'),
  ].join('\n');
  const expected = createHmac('sha256', signingKey(secret, scope)).update(toSign).digest();
  const given = Buffer.from(signature.signature, 'hex');
  if (given.length !== expected.length || !timingSafeEqual(given, expected)) {
    throw new ServiceError(
      signature.service === 's3' ? 'SignatureDoesNotMatch' : 'InvalidSignatureException',
      'The request signature we calculated does not match the signature you provided. Check your AWS Secret Access Key and signing method.',
      403,
    );
  }
}

function canonicalQuery(query: string): string {
  return query
    .split('&')
    .filter((part) => part !== '')
    .map((part) => {
      const mark = part.indexOf('=');
      const [name, value] = mark < 0 ? [part, ''] : [part.slice(0, mark), part.slice(mark + 1)];
      // Signers write a plus as %2B, so one that is left stands for a space.
      return [name, value].map((text) => encode(decode(text.replaceAll('+', ' ')))) as [string, string];
    })
    .filter(([name]) => name !== 'X-Amz-Signature')
    .sort(([a, x], [b, y]) => (a === b ? order(x, y) : order(a, b)))
    .map(([name, value]) => `${name}=${value}`)
    .join('&');
}

function headerValue(request: IncomingMessage, name: string): string {
  return (request.headersDistinct[name] ?? []).map((value) => value.trim().replace(/\s+/g, ' ')).join(',');
}

function order(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}

function encode(text: string): string {
  return encodeURIComponent(text).replace(
    /[!'()*]/g,
    (character) => `%${character.charCodeAt(0).toString(16).toUpperCase()}`,
  );
}

function decode(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

// --- errors on the wire --------------------------------------------------------------------------------------------

function unknownKey(offer: Offer, accessKeyId: string): ServiceError {
  const message = `The access key ${accessKeyId} is none of this state folder's.`;
  return offer.protocol === 's3'
    ? new ServiceError('InvalidAccessKeyId', message, 403)
    : new ServiceError('UnrecognizedClientException', message, 403);
}

function answerError(
  request: IncomingMessage,
  response: ServerResponse,
  offer: Offer | undefined,
  error: unknown,
  requestId: string,
): void {
  const { code, message, status } =
    error instanceof ServiceError
      ? error
      : new ServiceError('InternalFailure', error instanceof Error ? error.message : String(error), 500);
  if (response.headersSent) {
    response.destroy();
    return;
  }
  // The rest of an upload that was refused is of no use; a connection with unread bytes cannot be kept.
  if (!request.complete) {
    response.setHeader('connection', 'close');
    request.resume();
  }
  if (offer?.protocol === 's3') {
    response.writeHead(status, { 'content-type': 'application/xml' });
    response.end(
      request.method === 'HEAD'
        ? undefined
        : `<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>${xml(code)}</Code><Message>${xml(message)}</Message><RequestId>${requestId}</RequestId></Error>`,
    );
  } else if (offer?.protocol === 'query-body' || (offer === undefined && isForm(request))) {
    response.writeHead(status, { 'content-type': 'text/xml' });
    response.end(
      `<ErrorResponse><Error><Type>${status < 500 ? 'Sender' : 'Receiver'}</Type><Code>${xml(
        code === 'AccessDenied' ? 'AuthorizationError' : code,
      )}</Code><Message>${xml(message)}</Message></Error><RequestId>${requestId}</RequestId></ErrorResponse>`,
    );
  } else {
    const denied = code === 'AccessDenied';
    const type = denied ? 'AccessDeniedException' : code;
    response.writeHead(denied ? 400 : status, {
      'content-type': jsonType(request),
      'x-amzn-errortype': type,
    });
    response.end(JSON.stringify({ __type: type, message }));
  }
}

/** Whether the client speaks the query protocol, and so reads XML. */
function isForm(request: IncomingMessage): boolean {
  return request.headers['content-type']?.startsWith('application/x-www-form-urlencoded') ?? false;
}

/** The operation that a request of the query protocol asks for. */
export const actionOf = (body: Buffer): string =>
  new URLSearchParams(body.toString('utf8')).get('Action') ?? '';

/** Text as it may stand between XML tags. */
export function xml(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;');
}
