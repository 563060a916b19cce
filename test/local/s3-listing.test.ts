/** Listings: order, pages, delimiters, and their speed. */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  DeleteObjectCommand,
  ListObjectsCommand,
  ListObjectsV2Command,
  ListObjectVersionsCommand,
  PutObjectCommand,
  type S3Client,
} from '@aws-sdk/client-s3';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { Batch, type ObjectVersion, Store } from '../../local/s3/store.ts';
import { startS3, type TestS3 } from './s3-server.ts';

let folder: string;
let s3: TestS3;
let client: S3Client;
let buckets = 0;

const MANY = 100_000;
const manyKey = (i: number) => `runs/many/${String(i).padStart(6, '0')}/complete.json`;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'slideway-s3-'));
  await fillMany(join(folder, 'index'));
  s3 = await startS3(folder);
  client = s3.client();
});

afterAll(async () => {
  await s3.close();
  await rm(folder, { recursive: true });
});

/** Empty objects need no content, so many can be put on record directly. */
async function fillMany(index: string): Promise<void> {
  const store = new Store(index);
  await store.open();
  await store.putBucket({ name: 'many-bucket', created: 0, eventBridge: false });
  const empty: ObjectVersion = {
    id: 'null',
    modified: 0,
    size: 0,
    etag: 'd41d8cd98f00b204e9800998ecf8427e',
    crc64: 'AAAAAAAAAAA=',
    checksum: { algorithm: 'CRC64NVME', type: 'FULL_OBJECT', value: 'AAAAAAAAAAA=' },
    extents: [],
    headers: { 'content-type': 'application/json' },
    tags: [],
  };
  for (let start = 0; start < MANY; start += 10_000) {
    const batch = new Batch();
    for (let i = start; i < start + 10_000; i++) batch.object('many-bucket', manyKey(i), [empty]);
    await store.write(batch);
  }
  await store.close();
}

async function bucketWith(keys: Iterable<string>, versioning = false): Promise<string> {
  const name = `listed-${++buckets}`;
  await s3.service.createBucket(name, { versioning, eventBridge: false });
  for (const Key of keys)
    await client.send(new PutObjectCommand({ Bucket: name, Key, Body: Buffer.alloc(0) }));
  return name;
}

/** All pages of a listing: keys and common prefixes, in the order in which they came. */
async function walk(Bucket: string, more: object = {}): Promise<string[]> {
  const found: string[] = [];
  let ContinuationToken: string | undefined;
  do {
    const page = await client.send(new ListObjectsV2Command({ Bucket, ContinuationToken, ...more }));
    const names = [
      ...(page.Contents ?? []).map(({ Key }) => Key),
      ...(page.CommonPrefixes ?? []).map((p) => p.Prefix),
    ];
    expect(page.KeyCount).toBe(names.length);
    found.push(
      ...names.map((name) => (name === undefined ? '' : decodeName(page.EncodingType, name))).sort(byBytes),
    );
    ContinuationToken = page.NextContinuationToken;
    expect(page.IsTruncated).toBe(ContinuationToken !== undefined);
  } while (ContinuationToken);
  return found;
}

const decodeName = (encoding: string | undefined, name: string) =>
  encoding === 'url' ? decodeURIComponent(name) : name;
const byBytes = (a: string, b: string) => Buffer.compare(Buffer.from(a), Buffer.from(b));

describe('ListObjectsV2', () => {
  it('gives every key once, in the order of UTF-8 bytes, whatever the page size', async () => {
    const key = fc
      .array(fc.constantFrom('a', 'b', '/', '//', ' ', '!', '+', '%', '\u00e9', '\uffee', '\u{1f52c}', '0'), {
        minLength: 1,
        maxLength: 6,
      })
      .map((parts) => parts.join(''));
    await fc.assert(
      fc.asyncProperty(
        fc.uniqueArray(key, { maxLength: 25 }),
        fc.integer({ min: 1, max: 7 }),
        fc.constantFrom('', 'a', '/', 'a/'),
        async (keys, MaxKeys, Prefix) => {
          const name = await bucketWith(keys);
          const sorted = keys.filter((one) => one.startsWith(Prefix)).sort(byBytes);
          for (const EncodingType of [undefined, 'url'])
            expect(await walk(name, { MaxKeys, Prefix, EncodingType })).toEqual(sorted);
          const rolled = sorted.map((one) => {
            const cut = one.indexOf('/', Prefix.length);
            return cut < 0 ? one : one.slice(0, cut + 1);
          });
          expect(await walk(name, { MaxKeys, Prefix, Delimiter: '/' })).toEqual([...new Set(rolled)]);
          const middle = sorted[Math.floor(sorted.length / 2)];
          if (middle !== undefined)
            expect(await walk(name, { MaxKeys, Prefix, StartAfter: middle })).toEqual(
              sorted.slice(sorted.indexOf(middle) + 1),
            );
        },
      ),
      { numRuns: 20 },
    );
  });

  it('goes through 100,000 keys of one prefix in milliseconds a page', async () => {
    const found = await walk('many-bucket', { Prefix: 'runs/many/' });
    expect(found).toHaveLength(MANY);
    expect(found[0]).toBe(manyKey(0));
    const times: number[] = [];
    for (let i = 0; i < 9; i++) {
      const begun = performance.now();
      const page = await client.send(
        new ListObjectsV2Command({ Bucket: 'many-bucket', StartAfter: manyKey(i * 10_000), MaxKeys: 100 }),
      );
      times.push(performance.now() - begun);
      expect(page.Contents?.[0]?.Key).toBe(manyKey(i * 10_000 + 1));
    }
    // A generous bound on a shared machine; a scan of all keys takes a second.
    expect(times.sort((a, b) => a - b)[4]).toBeLessThan(200);
  });

  it('leaps over what a delimiter rolls up', async () => {
    const begun = performance.now();
    expect(await walk('many-bucket', { Delimiter: '/' })).toEqual(['runs/']);
    expect(performance.now() - begun).toBeLessThan(200);
  });

  it('refuses tokens and numbers that are none', async () => {
    const list = (more: object) => client.send(new ListObjectsV2Command({ Bucket: 'many-bucket', ...more }));
    await expect(list({ ContinuationToken: '*' })).rejects.toMatchObject({ name: 'InvalidArgument' });
    await expect(list({ MaxKeys: -1 })).rejects.toMatchObject({ name: 'InvalidArgument' });
    expect((await list({ MaxKeys: 0 })).KeyCount).toBe(0);
  });
});

it('ListObjects pages by name, also past common prefixes', async () => {
  const name = await bucketWith(['a', 'b/1', 'b/2', 'c', 'd/1']);
  const found: (string | undefined)[] = [];
  for (let Marker: string | undefined; ; ) {
    const page = await client.send(
      new ListObjectsCommand({ Bucket: name, Delimiter: '/', MaxKeys: 1, Marker }),
    );
    found.push(
      ...(page.Contents ?? []).map(({ Key }) => Key),
      ...(page.CommonPrefixes ?? []).map((p) => p.Prefix),
    );
    if (!page.IsTruncated) break;
    Marker = page.NextMarker;
  }
  expect(found).toEqual(['a', 'b/', 'c', 'd/']);
});

it('ListObjectVersions gives every version and delete marker once, newest first', async () => {
  const name = await bucketWith(['a', 'a', 'b', 'c/1', 'a', 'c/2'], true);
  await client.send(new DeleteObjectCommand({ Bucket: name, Key: 'a' }));
  expect(await walk(name)).toEqual(['b', 'c/1', 'c/2']);
  for (const MaxKeys of [1, 2, 3, 1000]) {
    const found: string[] = [];
    let marker: { KeyMarker?: string; VersionIdMarker?: string } = {};
    for (;;) {
      const page = await client.send(
        new ListObjectVersionsCommand({ Bucket: name, MaxKeys, Delimiter: '/', ...marker }),
      );
      const entries = [
        ...(page.DeleteMarkers ?? []).map((one) => `${one.Key} deleted ${one.IsLatest}`),
        ...(page.Versions ?? []).map((one) => `${one.Key} ${one.IsLatest}`),
        ...(page.CommonPrefixes ?? []).map((one) => `${one.Prefix}`),
      ];
      found.push(...entries);
      if (!page.IsTruncated) break;
      marker = {
        ...(page.NextKeyMarker !== undefined && { KeyMarker: page.NextKeyMarker }),
        ...(page.NextVersionIdMarker !== undefined && { VersionIdMarker: page.NextVersionIdMarker }),
      };
    }
    expect(found).toEqual(['a deleted true', 'a false', 'a false', 'a false', 'b true', 'c/']);
  }
});
