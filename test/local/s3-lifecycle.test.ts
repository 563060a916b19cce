import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  CreateMultipartUploadCommand,
  DeleteObjectCommand,
  ListMultipartUploadsCommand,
  ListObjectVersionsCommand,
  PutObjectCommand,
  type S3Client,
  UploadPartCommand,
} from '@aws-sdk/client-s3';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { LifecycleRule } from '../../local/s3/lifecycle.ts';
import { type Expired, S3Service } from '../../local/s3/service.ts';
import { startS3, type TestS3 } from './s3-server.ts';

const DAY = 24 * 3600 * 1000;
const NONE = { objects: 0, versions: 0, bytes: 0, markers: 0, uploads: 0 };
/** As the Silver bucket has them. */
const TILES: LifecycleRule = { id: 'tiles', prefix: 'tiles/', tags: [], days: 7, noncurrentDays: 1 };
const UPLOADS: LifecycleRule = { id: 'uploads', prefix: '', tags: [], uploadDays: 7 };

let folder: string;
let s3: TestS3;
let client: S3Client;
let expired: Expired[];
const buckets = {
  silver: { versioning: true, eventBridge: false, lifecycle: [TILES, UPLOADS] },
  tagged: {
    ...{ versioning: true, eventBridge: false },
    lifecycle: [{ id: 'passing', prefix: '', tags: [['kind', 'passing']], days: 1 } satisfies LifecycleRule],
  },
  plain: { versioning: false, eventBridge: false, lifecycle: [{ ...TILES, prefix: '' }] },
  locked: { versioning: true, eventBridge: false, lock: {}, lifecycle: [{ ...TILES, prefix: '' }] },
};
beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), 'lifecycle-'));
  expired = [];
  s3 = await startS3(folder, undefined, (told) => expired.push(told));
  for (const [name, config] of Object.entries(buckets)) await s3.service.createBucket(name, config);
  client = s3.client();
});
afterEach(async () => {
  await s3.close();
  rmSync(folder, { recursive: true, force: true });
});

const put = (Bucket: string, Key: string, more: { Tagging?: string; days?: number } = {}) =>
  client.send(
    new PutObjectCommand({
      ...{ Bucket, Key, Body: 'tiles' },
      ...(more.Tagging && { Tagging: more.Tagging }),
      ...(more.days && {
        ObjectLockMode: 'COMPLIANCE',
        ObjectLockRetainUntilDate: new Date(Date.now() + more.days * DAY),
      }),
    }),
  );
const inDays = (days: number) => s3.service.expire(Date.now() + days * DAY);
/** Keys of versions, `-` before those of delete markers, current ones first. */
async function versions(Bucket: string): Promise<string[]> {
  const { Versions = [], DeleteMarkers = [] } = await client.send(new ListObjectVersionsCommand({ Bucket }));
  return [...DeleteMarkers.map(({ Key }) => `-${Key}`), ...Versions.map(({ Key }) => `${Key}`)];
}
const files = () =>
  readdirSync(join(folder, 'content'), { recursive: true, withFileTypes: true }).filter((file) =>
    file.isFile(),
  );

describe('what a rule is for', () => {
  it('stays as long as it says, is hidden then, and is gone from the disk a day later', async () => {
    await put('silver', 'tiles/a');
    await put('silver', 'runs/a');
    await inDays(6.9);
    expect(await versions('silver')).toEqual(['runs/a', 'tiles/a']);
    expect(expired).toEqual([]);
    await inDays(7);
    expect(await versions('silver')).toEqual(['-tiles/a', 'runs/a', 'tiles/a']);
    await inDays(8);
    expect(await versions('silver')).toEqual(['-tiles/a', 'runs/a']);
    await inDays(14);
    expect(await versions('silver')).toEqual(['runs/a']);
    expect(expired).toEqual(
      [{ objects: 1 }, { versions: 1, bytes: 5 }, { markers: 1 }].map((what) => ({
        ...{ bucket: 'silver', rule: 'tiles' },
        ...NONE,
        ...what,
      })),
    );
    await s3.close();
    expect(files()).toHaveLength(1);
    s3 = await startS3(folder);
  });

  it('goes at once as far as it would have gone, when nobody was there for long', async () => {
    await put('silver', 'tiles/a');
    await put('silver', 'tiles/a');
    await inDays(30);
    expect(await versions('silver')).toEqual([]);
    expect(expired).toEqual([
      { ...NONE, bucket: 'silver', rule: 'tiles', objects: 1, versions: 2, bytes: 10, markers: 0 },
    ]);
  });

  it('goes earlier where it was replaced or deleted', async () => {
    for (const key of ['tiles/replaced', 'tiles/replaced', 'tiles/deleted']) await put('silver', key);
    await client.send(new DeleteObjectCommand({ Bucket: 'silver', Key: 'tiles/deleted' }));
    await inDays(0.5);
    expect(await versions('silver')).toHaveLength(4);
    await inDays(1.5);
    expect(await versions('silver')).toEqual(['-tiles/deleted', 'tiles/replaced']);
  });

  it('may be told by tags', async () => {
    await put('tagged', 'kept', { Tagging: 'kind=lasting' });
    await put('tagged', 'gone', { Tagging: 'kind=passing&study=a' });
    await inDays(2);
    expect((await versions('tagged'))[0]).toBe('-gone');
    expect(await versions('tagged')).toContain('kept');
  });

  it('has no second life in a bucket without versions', async () => {
    await put('plain', 'a');
    await inDays(7);
    expect(await versions('plain')).toEqual([]);
  });

  it('is never what is under retention', async () => {
    await put('locked', 'a', { days: 60 });
    await inDays(40);
    expect(await versions('locked')).toContain('a');
    await inDays(61);
    expect(await versions('locked')).not.toContain('a');
  });

  it('is also what was never finished', async () => {
    const upload = { Bucket: 'silver', Key: 'runs/b' };
    const { UploadId } = await client.send(new CreateMultipartUploadCommand(upload));
    await client.send(new UploadPartCommand({ ...upload, UploadId, PartNumber: 1, Body: 'part' }));
    await inDays(6);
    expect((await client.send(new ListMultipartUploadsCommand(upload))).Uploads).toHaveLength(1);
    await inDays(8);
    expect((await client.send(new ListMultipartUploadsCommand(upload))).Uploads).toBeUndefined();
    expect(expired).toEqual([{ ...NONE, bucket: 'silver', rule: 'uploads', uploads: 1 }]);
  });
});

it('it is looked for at the start', async () => {
  await put('silver', 'tiles/a');
  await s3.close();
  const now = Date.now;
  Date.now = () => now() + 30 * DAY;
  try {
    const told = Promise.withResolvers<Expired>();
    const service = new S3Service({ folder, onObjectCreated: async () => {}, onExpired: told.resolve });
    for (const [name, config] of Object.entries(buckets)) await service.createBucket(name, config);
    await service.recover();
    expect(await told.promise).toMatchObject({ rule: 'tiles', objects: 1, versions: 1 });
    await service.close();
  } finally {
    Date.now = now;
  }
  s3 = await startS3(folder);
  client = s3.client();
  expect(await versions('silver')).toEqual([]);
});
