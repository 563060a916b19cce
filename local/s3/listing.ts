/** Listings: ListObjects in both versions, ListObjectVersions. Pages are read from the index, never sorted here. */
import { isoTime } from './objects.ts';
import { after, isMarker, type ObjectCursor, type ObjectVersion, type Store, type Version } from './store.ts';
import { type Elements, namer, quoted, type Reply, S3Error, type S3Request, toXml } from './wire.ts';

const PAGE = 1000;

export class Listing {
  readonly #store: Store;

  constructor(store: Store) {
    this.#store = store;
  }

  async objectsV2(request: S3Request): Promise<Reply> {
    const token = request.parameter('continuation-token');
    const startAfter = request.parameter('start-after');
    const from = token === undefined ? pastKey(startAfter ?? '') : parseToken(token);
    const { name, limit, prefix, delimiter, page } = await this.#objects(request, from);
    return {
      body: toXml('ListBucketResult', {
        Name: request.bucket,
        Prefix: name(prefix),
        Delimiter: name(delimiter),
        StartAfter: name(startAfter),
        ContinuationToken: token,
        NextContinuationToken: page.next && formatToken(page.next),
        KeyCount: page.items.length + page.prefixes.length,
        MaxKeys: limit,
        EncodingType: request.parameter('encoding-type'),
        IsTruncated: page.next !== undefined,
        Contents: page.items.map((item) => describeObject(item, name)),
        CommonPrefixes: page.prefixes.map((common) => ({ Prefix: name(common) })),
      }),
    };
  }

  /** The first version, which boto3's resources still use. Its marker is a name, not a token. */
  async objectsV1(request: S3Request): Promise<Reply> {
    const marker = request.parameter('marker') ?? '';
    const delimited = request.parameter('delimiter');
    // A marker that is a common prefix stands for all that begins with it.
    const past = delimited && marker.endsWith(delimited) ? after(Buffer.from(marker)) : pastKey(marker);
    const { name, limit, prefix, delimiter, page } = await this.#objects(request, past);
    return {
      body: toXml('ListBucketResult', {
        Name: request.bucket,
        Prefix: name(prefix),
        Marker: name(marker),
        Delimiter: name(delimiter),
        NextMarker: page.next && name(page.last),
        MaxKeys: limit,
        EncodingType: request.parameter('encoding-type'),
        IsTruncated: page.next !== undefined,
        Contents: page.items.map((item) => describeObject(item, name)),
        CommonPrefixes: page.prefixes.map((common) => ({ Prefix: name(common) })),
      }),
    };
  }

  async versions(request: S3Request): Promise<Reply> {
    request.caller.authorize('s3:ListBucketVersions', request.bucketArn);
    this.#store.bucket(request.bucket);
    const name = namer(request);
    const { prefix, delimiter, limit } = scope(request);
    const keyMarker = request.parameter('key-marker') ?? '';
    const idMarker = request.parameter('version-id-marker') ?? '';
    const pastMarker =
      delimiter && keyMarker.endsWith(delimiter) ? after(Buffer.from(keyMarker)) : pastKey(keyMarker);
    const page = await paginate(
      this.#store.objects(request.bucket, prefix, idMarker === '' ? pastMarker : Buffer.from(keyMarker)),
      { prefix, delimiter, limit },
      (key, versions) => {
        const all = versions.map((version, index) => ({ key, version, latest: index === 0 }));
        const marked = key === keyMarker ? all.findIndex(({ version }) => version.id === idMarker) : -1;
        return all.slice(marked + 1);
      },
    );
    const truncated = page.next !== undefined;
    const describeOne = ({ key, version, latest }: (typeof page.items)[number]): Elements => ({
      Key: name(key),
      VersionId: version.id,
      IsLatest: latest,
      LastModified: isoTime(version.modified),
      ...(!isMarker(version) && describeContent(version)),
    });
    return {
      body: toXml('ListVersionsResult', {
        Name: request.bucket,
        Prefix: name(prefix),
        Delimiter: name(delimiter),
        KeyMarker: name(keyMarker),
        VersionIdMarker: idMarker,
        NextKeyMarker: truncated ? name(page.last) : undefined,
        NextVersionIdMarker:
          truncated && page.items.at(-1)?.key === page.last ? page.items.at(-1)?.version.id : undefined,
        MaxKeys: limit,
        EncodingType: request.parameter('encoding-type'),
        IsTruncated: truncated,
        Version: page.items.filter(({ version }) => !isMarker(version)).map(describeOne),
        DeleteMarker: page.items.filter(({ version }) => isMarker(version)).map(describeOne),
        CommonPrefixes: page.prefixes.map((common) => ({ Prefix: name(common) })),
      }),
    };
  }

  async #objects(request: S3Request, from: Buffer) {
    request.caller.authorize('s3:ListBucket', request.bucketArn);
    this.#store.bucket(request.bucket);
    const name = namer(request);
    const { prefix, delimiter, limit } = scope(request);
    const cursor = this.#store.objects(request.bucket, prefix, from);
    const page = await paginate(cursor, { prefix, delimiter, limit }, (key, [newest]) =>
      newest && !isMarker(newest) ? [{ key, version: newest }] : [],
    );
    return { name, prefix, delimiter, limit, page };
  }
}

interface Scope {
  prefix: string;
  /** Empty for none. */
  delimiter: string | undefined;
  limit: number;
}

const scope = (request: S3Request): Scope => ({
  prefix: request.parameter('prefix') ?? '',
  delimiter: request.parameter('delimiter') || undefined,
  limit: Math.min(request.number('max-keys', PAGE), PAGE),
});

interface Page<T> {
  items: T[];
  prefixes: string[];
  /** Where the next page begins; absent on the last one. */
  next?: Buffer;
  /** The last key or common prefix on this page. */
  last: string;
}

/**
 * One page of what `take` makes of each key. Keys that share what comes up to the delimiter count once, and the
 * cursor leaps over them.
 */
async function paginate<T>(
  cursor: ObjectCursor,
  { prefix, delimiter, limit }: Scope,
  take: (key: string, versions: Version[]) => T[],
): Promise<Page<T>> {
  const page: Page<T> = { items: [], prefixes: [], last: '' };
  let next: Buffer = Buffer.alloc(0);
  try {
    if (limit === 0) return page;
    for (;;) {
      const found = await cursor.next();
      if (!found) return page;
      const items = take(found.key, found.versions);
      if (items.length === 0) continue;
      const cut = delimiter === undefined ? -1 : found.key.indexOf(delimiter, prefix.length);
      const common = cut < 0 ? undefined : found.key.slice(0, cut + (delimiter ?? '').length);
      for (const item of common === undefined ? items : [undefined]) {
        if (page.items.length + page.prefixes.length === limit) return { ...page, next };
        if (item !== undefined) page.items.push(item);
        page.last = common ?? found.key;
        next = common === undefined ? pastKey(found.key) : after(Buffer.from(common));
      }
      if (common === undefined) continue;
      page.prefixes.push(common);
      cursor.seek(next);
    }
  } finally {
    await cursor.close();
  }
}

/** The least position after a key itself. */
const pastKey = (key: string) => (key === '' ? Buffer.alloc(0) : Buffer.from(`${key}\0`));

const formatToken = (position: Buffer) => position.toString('base64url');

function parseToken(token: string): Buffer {
  const position = Buffer.from(token, 'base64url');
  if (position.length === 0 || formatToken(position) !== token)
    throw new S3Error('InvalidArgument', 'The continuation token provided is incorrect.', 400);
  return position;
}

const describeObject = (
  { key, version }: { key: string; version: ObjectVersion },
  name: ReturnType<typeof namer>,
): Elements => ({
  Key: name(key),
  LastModified: isoTime(version.modified),
  ...describeContent(version),
});

const describeContent = (version: ObjectVersion): Elements => ({
  ETag: quoted(version.etag),
  ChecksumAlgorithm: version.checksum.algorithm,
  ChecksumType: version.checksum.type,
  Size: version.size,
  StorageClass: version.headers['x-amz-storage-class'] ?? 'STANDARD',
});
