/**
 * Amazon S3 on a folder: what the AWS SDKs and boto3 speak to when the whole of Slideway runs on one machine.
 *
 * `<folder>/index` holds the records (LevelDB), `<folder>/content` the bytes as plain files. Bodies are streamed;
 * what was answered with success survives the kill of the process, and what was not leaves no trace after a start.
 * An operation that is not here, and a header that would change what is kept, is refused, never ignored.
 */
import type { IncomingMessage, ServerResponse } from 'node:http';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import { finished, pipeline } from 'node:stream/promises';
import { z } from 'zod';
import { type Caller, type HttpService, LOCAL_ACCOUNT, LOCAL_REGION, ServiceError } from '../types.ts';
import { Content } from './content.ts';
import { Deliveries } from './deliveries.ts';
import { type Expired, Lifecycle, type LifecycleRule } from './lifecycle.ts';
import { Listing } from './listing.ts';
import type { BucketLock } from './lock.ts';
import { Multipart } from './multipart.ts';
import { isoTime, Objects } from './objects.ts';
import { Payload } from './payload.ts';
import { type Bucket, type ObjectCreated, Store } from './store.ts';
import { type Reply, readXml, S3Error, S3Request, toXml } from './wire.ts';

export type { Expired } from './lifecycle.ts';
export type { ObjectCreated } from './store.ts';

/** S3 does it once a day; here nobody may be there at midnight. */
const LIFECYCLE_MS = 3600 * 1000;

type Operation = (request: S3Request) => Promise<Reply>;

export class S3Service implements HttpService {
  readonly #store: Store;
  readonly #content: Content;
  readonly #deliveries: Deliveries;
  readonly #operations: ReadonlyMap<string, Operation>;
  readonly #ready: Promise<void>;
  readonly #lifecycle: Lifecycle;
  /** By bucket. */
  readonly #rules = new Map<string, LifecycleRule[]>();
  readonly #onExpired: (expired: Expired) => void;
  readonly #closing = new AbortController();
  #expiring: Promise<unknown> = Promise.resolve();
  #clock: NodeJS.Timeout | undefined;

  /**
   * `onExpired` is told what each rule let go, where it was anything.
   *
   * `onObjectCreated` is called at least once for each object created in a bucket with `eventBridge`, again after a
   * while when it rejects, and again by {@link recover} when the process ended before it resolved.
   */
  constructor(options: {
    folder: string;
    onObjectCreated(event: ObjectCreated): Promise<void>;
    onExpired?(expired: Expired): void;
  }) {
    this.#store = new Store(join(options.folder, 'index'));
    this.#content = new Content(join(options.folder, 'content'));
    this.#deliveries = new Deliveries(this.#store, (event) => options.onObjectCreated(event));
    const objects = new Objects(this.#store, this.#content, this.#deliveries);
    const multipart = new Multipart(this.#store, this.#content, objects);
    this.#operations = this.#table(objects, multipart);
    this.#lifecycle = new Lifecycle(this.#store, objects, multipart);
    this.#onExpired = (expired) => options.onExpired?.(expired);
    this.#ready = this.#store.open().then(() => this.#content.load(this.#store.extents()));
    // Whoever calls first learns of it.
    this.#ready.catch(() => {});
  }

  /** Creates the bucket, or gives the one that is there this configuration. */
  async createBucket(
    name: string,
    config: {
      versioning: boolean;
      eventBridge: boolean;
      lock?: BucketLock | undefined;
      lifecycle?: LifecycleRule[];
    },
  ): Promise<void> {
    await this.#ready;
    checkBucketName(name);
    const known = this.#store.hasBucket(name) ? this.#store.bucket(name) : undefined;
    const versioning = config.versioning ? 'Enabled' : known?.versioning && 'Suspended';
    // A bucket never loses Object Lock, and with it never its versions.
    const lock = config.lock ?? known?.lock;
    if (lock && versioning !== 'Enabled') throw suspended();
    await this.#store.putBucket({
      name,
      created: known?.created ?? Date.now(),
      ...(versioning && { versioning }),
      eventBridge: config.eventBridge,
      ...(lock && { lock }),
    });
    this.#rules.set(name, config.lifecycle ?? []);
  }

  /** Begins to deliver the events that an earlier process left, and to keep time. Throws {@link FolderInUse}. */
  async recover(): Promise<void> {
    await this.#ready;
    await this.#deliveries.recover();
    const expire = () => {
      // What cannot be done now is done in an hour.
      this.#expiring = this.expire().catch(() => {});
    };
    expire();
    this.#clock = setInterval(expire, LIFECYCLE_MS).unref();
  }

  /** Lets go what has outlived its days. */
  async expire(now = Date.now()): Promise<void> {
    await this.#ready;
    for (const [bucket, rules] of this.#rules)
      for (const rule of rules) {
        if (this.#closing.signal.aborted) return;
        const expired = await this.#lifecycle.apply(bucket, rule, now, this.#closing.signal);
        if (expired.objects + expired.versions + expired.markers + expired.uploads > 0)
          this.#onExpired(expired);
      }
  }

  /** Ends deliveries and closes the folder; no request may be under way. */
  async close(): Promise<void> {
    await this.#ready;
    clearInterval(this.#clock);
    this.#closing.abort();
    await this.#expiring;
    await this.#deliveries.close();
    await this.#content.close();
    await this.#store.close();
  }

  async handle(http: IncomingMessage, response: ServerResponse, caller: Caller): Promise<void> {
    let reply: Reply;
    try {
      await this.#ready;
      const request = new S3Request(http, caller);
      const operation = this.#operations.get(request.operation);
      if (!operation) throw new S3Error('NotImplemented', `The local S3 has no ${request.operation}.`, 501);
      checkOwner(request, 'x-amz-expected-bucket-owner');
      checkOwner(request, 'x-amz-source-expected-bucket-owner');
      reply = await operation(request);
    } catch (error) {
      reply = describeError(error, http);
    }
    // An answer before the body's end would reach a client that is still writing as a broken connection.
    if (!http.complete) {
      http.resume();
      await finished(http, { writable: false }).catch(() => {});
    }
    try {
      await send(http, response, reply);
    } catch {
      // The client went away, or the content could not be read: a cut connection says so where a status cannot.
      response.destroy();
    } finally {
      reply.done?.();
    }
  }

  #table(objects: Objects, multipart: Multipart): Map<string, Operation> {
    const listing = new Listing(this.#store);
    return new Map<string, Operation>([
      ['GET service', (request) => this.#listBuckets(request)],
      ['PUT bucket', (request) => this.#createBucket(request)],
      ['HEAD bucket', (request) => this.#headBucket(request)],
      ['DELETE bucket', (request) => this.#deleteBucket(request)],
      ['GET bucket ?location', (request) => this.#location(request)],
      ['GET bucket ?object-lock', (request) => this.#getLock(request)],
      ['GET bucket ?versioning', (request) => this.#getVersioning(request)],
      ['PUT bucket ?versioning', (request) => this.#putVersioning(request)],
      [
        'GET bucket',
        (request) =>
          request.parameter('list-type') === '2' ? listing.objectsV2(request) : listing.objectsV1(request),
      ],
      ['GET bucket ?versions', (request) => listing.versions(request)],
      ['GET bucket ?uploads', (request) => multipart.listUploads(request)],
      ['POST bucket ?delete', (request) => objects.deleteMany(request)],
      ['GET object', (request) => objects.get(request)],
      ['HEAD object', (request) => objects.get(request)],
      [
        'PUT object',
        (request) =>
          request.header('x-amz-copy-source') === undefined ? objects.put(request) : objects.copy(request),
      ],
      ['DELETE object', (request) => objects.delete(request)],
      ['GET object ?tagging', (request) => objects.getTags(request)],
      ['PUT object ?tagging', (request) => objects.putTags(request)],
      ['DELETE object ?tagging', (request) => objects.deleteTags(request)],
      ['GET object ?attributes', (request) => objects.attributes(request)],
      ['POST object ?uploads', (request) => multipart.create(request)],
      [
        'PUT object ?uploadId',
        (request) =>
          request.header('x-amz-copy-source') === undefined
            ? multipart.uploadPart(request)
            : multipart.copyPart(request),
      ],
      ['POST object ?uploadId', (request) => multipart.complete(request)],
      ['DELETE object ?uploadId', (request) => multipart.abort(request)],
      ['GET object ?uploadId', (request) => multipart.listParts(request)],
    ]);
  }

  async #listBuckets(request: S3Request): Promise<Reply> {
    request.caller.authorize('s3:ListAllMyBuckets', '*');
    const prefix = request.parameter('prefix') ?? '';
    const buckets = this.#store.buckets.filter(({ name }) => name.startsWith(prefix));
    return {
      body: toXml('ListAllMyBucketsResult', {
        Buckets: {
          Bucket: buckets.map(({ name, created }) => ({ Name: name, CreationDate: isoTime(created) })),
        },
      }),
    };
  }

  async #createBucket(request: S3Request): Promise<Reply> {
    request.caller.authorize('s3:CreateBucket', request.bucketArn);
    // As in us-east-1, creating one's own bucket again changes nothing and is no error.
    if (!this.#store.hasBucket(request.bucket))
      await this.createBucket(request.bucket, { versioning: false, eventBridge: false });
    return { headers: { location: `/${request.bucket}` } };
  }

  async #headBucket(request: S3Request): Promise<Reply> {
    this.#authorizeBucket(request, 's3:ListBucket');
    return { headers: { 'x-amz-bucket-region': LOCAL_REGION } };
  }

  async #deleteBucket(request: S3Request): Promise<Reply> {
    this.#authorizeBucket(request, 's3:DeleteBucket');
    await this.#store.removeBucket(request.bucket);
    return { status: 204 };
  }

  async #location(request: S3Request): Promise<Reply> {
    this.#authorizeBucket(request, 's3:GetBucketLocation');
    // Empty is how S3 says us-east-1.
    return { body: toXml('LocationConstraint', {}) };
  }

  async #getVersioning(request: S3Request): Promise<Reply> {
    const { versioning } = this.#authorizeBucket(request, 's3:GetBucketVersioning');
    return { body: toXml('VersioningConfiguration', { Status: versioning }) };
  }

  async #putVersioning(request: S3Request): Promise<Reply> {
    const bucket = this.#authorizeBucket(request, 's3:PutBucketVersioning');
    const payload = new Payload(request);
    const { Status } = await readXml(payload.digested(), 'VersioningConfiguration', VERSIONING);
    payload.prove();
    if (bucket.lock && Status === 'Suspended') throw suspended();
    await this.#store.putBucket({ ...bucket, versioning: Status });
    return {};
  }

  async #getLock(request: S3Request): Promise<Reply> {
    const { lock } = this.#authorizeBucket(request, 's3:GetBucketObjectLockConfiguration');
    if (!lock)
      throw new S3Error(
        'ObjectLockConfigurationNotFoundError',
        'Object Lock configuration does not exist for this bucket',
        404,
      );
    const { mode, days } = lock.default ?? {};
    return {
      body: toXml('ObjectLockConfiguration', {
        ObjectLockEnabled: 'Enabled',
        Rule: lock.default && { DefaultRetention: { Mode: mode, Days: days } },
      }),
    };
  }

  #authorizeBucket(request: S3Request, action: string): Bucket {
    request.caller.authorize(action, request.bucketArn);
    return this.#store.bucket(request.bucket);
  }
}

const suspended = () =>
  new S3Error(
    'InvalidBucketState',
    'An Object Lock configuration is present on this bucket, so the versioning state cannot be changed.',
    409,
  );

const VERSIONING = z.object({ Status: z.enum(['Enabled', 'Suspended']) });

function checkBucketName(name: string): void {
  if (!/^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$/.test(name) || name.includes('..'))
    throw new S3Error(
      'InvalidBucketName',
      `'${name}' is no bucket name: 3–63 lower-case letters, digits, dots and hyphens.`,
      400,
    );
}

/** All buckets here belong to one account. */
function checkOwner(request: S3Request, header: string): void {
  if ((request.header(header) ?? LOCAL_ACCOUNT) !== LOCAL_ACCOUNT)
    throw new S3Error('AccessDenied', `The bucket's owner is ${LOCAL_ACCOUNT}, not the one expected.`, 403);
}

async function send(http: IncomingMessage, response: ServerResponse, reply: Reply): Promise<void> {
  const { status = 200, headers = {}, body } = reply;
  if (typeof body === 'string') {
    const bytes = Buffer.from(body);
    response.writeHead(status, {
      'content-type': 'application/xml',
      'content-length': bytes.length,
      ...headers,
    });
    response.end(http.method === 'HEAD' ? undefined : bytes);
  } else {
    // Without a body its length is said here, for clients that keep the connection.
    const empty = body === undefined && http.method !== 'HEAD' && status !== 204 && status !== 304;
    response.writeHead(status, empty ? { 'content-length': 0, ...headers } : headers);
    if (body) await pipeline(Readable.from(body, { objectMode: true, highWaterMark: 2 }), response);
    else response.end();
  }
}

function describeError(error: unknown, http: IncomingMessage): Reply {
  const known =
    error instanceof ServiceError
      ? error
      : new S3Error(
          'InternalError',
          error instanceof Error ? `${error.name}: ${error.message}` : String(error),
          500,
        );
  const headers = known instanceof S3Error ? known.headers : {};
  if (known.status === 304) return { status: 304, headers };
  const [resource] = (http.url ?? '').split('?');
  return {
    status: known.status,
    headers,
    body: toXml('Error', { Code: known.code, Message: known.message, Resource: resource }),
  };
}
