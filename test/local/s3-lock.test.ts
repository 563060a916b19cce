import {
  CopyObjectCommand,
  DeleteObjectCommand,
  DeleteObjectsCommand,
  GetObjectCommand,
  GetObjectLockConfigurationCommand,
  HeadObjectCommand,
  PutBucketVersioningCommand,
  PutObjectCommand,
  type S3Client,
} from '@aws-sdk/client-s3';
import { Upload } from '@aws-sdk/lib-storage';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { temporaryFolder } from './kit.ts';
import { startS3, type TestS3 } from './s3-server.ts';

const DAY_MS = 24 * 3600 * 1000;
let s3: TestS3;
let client: S3Client;
beforeAll(async () => {
  s3 = await startS3(temporaryFolder());
  client = s3.client();
  const config = { versioning: true, eventBridge: false };
  await s3.service.createBucket('plain', config);
  await s3.service.createBucket('open', { ...config, lock: {} });
  await s3.service.createBucket('law', { ...config, lock: { default: { mode: 'COMPLIANCE', days: 10 } } });
  await s3.service.createBucket('house', { ...config, lock: { default: { mode: 'GOVERNANCE', days: 1 } } });
});
afterAll(() => s3.close());

const put = async (Bucket: string, Key: string, more: object = {}) =>
  (await client.send(new PutObjectCommand({ Bucket, Key, Body: Key, ...more }))).VersionId ?? '';
const remove = (Bucket: string, Key: string, VersionId: string, more: object = {}) =>
  client.send(new DeleteObjectCommand({ Bucket, Key, VersionId, ...more }));
const text = async (Bucket: string, Key: string, VersionId: string) =>
  (await client.send(new GetObjectCommand({ Bucket, Key, VersionId }))).Body?.transformToString();
const refused = { name: 'AccessDenied', message: expect.stringContaining('object lock') };

describe('a version under the bucket’s default retention', () => {
  it('says until when, and cannot be deleted before', async () => {
    const version = await put('law', 'a');
    const head = await client.send(new HeadObjectCommand({ Bucket: 'law', Key: 'a' }));
    expect(head.ObjectLockMode).toBe('COMPLIANCE');
    const days = ((head.ObjectLockRetainUntilDate?.getTime() ?? 0) - Date.now()) / DAY_MS;
    expect(days).toBeCloseTo(10, 3);
    await expect(remove('law', 'a', version)).rejects.toMatchObject(refused);
    await expect(remove('law', 'a', version, { BypassGovernanceRetention: true })).rejects.toMatchObject(
      refused,
    );
    const { Errors } = await client.send(
      new DeleteObjectsCommand({ Bucket: 'law', Delete: { Objects: [{ Key: 'a', VersionId: version }] } }),
    );
    expect(Errors).toMatchObject([{ Code: 'AccessDenied', Key: 'a' }]);
    expect(await text('law', 'a', version)).toBe('a');
  });

  it('stays under what is put over it, and under a delete marker, which may go again', async () => {
    const version = await put('law', 'b');
    const over = await put('law', 'b', { Body: 'other' });
    expect(over).not.toBe(version);
    const { VersionId = '' } = await client.send(new DeleteObjectCommand({ Bucket: 'law', Key: 'b' }));
    expect(await text('law', 'b', version)).toBe('b');
    await remove('law', 'b', VersionId);
    await expect(remove('law', 'b', over)).rejects.toMatchObject(refused);
  });

  it('comes to be by copies and multipart uploads too', async () => {
    await put('plain', 'c');
    await client.send(new CopyObjectCommand({ Bucket: 'law', Key: 'copy', CopySource: 'plain/c' }));
    const Body = Buffer.alloc(6 * 2 ** 20);
    await new Upload({ client, params: { Bucket: 'law', Key: 'large', Body } }).done();
    for (const Key of ['copy', 'large']) {
      const { VersionId = '', ObjectLockMode } = await client.send(
        new HeadObjectCommand({ Bucket: 'law', Key }),
      );
      expect(ObjectLockMode).toBe('COMPLIANCE');
      await expect(remove('law', Key, VersionId)).rejects.toMatchObject(refused);
    }
  });

  it('of GOVERNANCE goes for who may bypass it and says so', async () => {
    const version = await put('house', 'a');
    await expect(remove('house', 'a', version)).rejects.toMatchObject(refused);
    s3.denied.add('s3:BypassGovernanceRetention');
    const bypass = { BypassGovernanceRetention: true };
    await expect(remove('house', 'a', version, bypass)).rejects.toThrow('s3:BypassGovernanceRetention');
    s3.denied.clear();
    await remove('house', 'a', version, bypass);
    await expect(text('house', 'a', version)).rejects.toMatchObject({ name: 'NoSuchVersion' });
  });
});

describe('retention that a request asks for', () => {
  const until = (ms: number) => ({
    ObjectLockMode: 'COMPLIANCE',
    ObjectLockRetainUntilDate: new Date(Date.now() + ms),
  });

  it('holds until its time, and not longer', async () => {
    const version = await put('open', 'a', until(1_200));
    expect(s3.asked).toContain('s3:PutObjectRetention arn:aws:s3:::open/a');
    await expect(remove('open', 'a', version)).rejects.toMatchObject(refused);
    await new Promise((resolve) => setTimeout(resolve, 1_300));
    await remove('open', 'a', version);
    const free = await put('open', 'b');
    await remove('open', 'b', free);
  });

  it.each<[string, string, object, RegExp]>([
    ['a bucket without Object Lock', 'plain', until(DAY_MS), /missing Object Lock/],
    ['a time that is past', 'open', until(-DAY_MS), /in the future/],
    ['a mode without a time', 'open', { ObjectLockMode: 'COMPLIANCE' }, /both be supplied/],
    ['a legal hold, which is not known here', 'open', { ObjectLockLegalHoldStatus: 'ON' }, /not supported/],
  ])('is refused for %s', async (_, bucket, more, message) => {
    await expect(put(bucket, 'x', more)).rejects.toThrow(message);
  });
});

describe('a bucket with Object Lock', () => {
  it('says so, and its versions cannot be suspended', async () => {
    const { ObjectLockConfiguration: law } = await client.send(
      new GetObjectLockConfigurationCommand({ Bucket: 'law' }),
    );
    expect(law).toEqual({
      ObjectLockEnabled: 'Enabled',
      Rule: { DefaultRetention: { Mode: 'COMPLIANCE', Days: 10 } },
    });
    await expect(
      client.send(new GetObjectLockConfigurationCommand({ Bucket: 'plain' })),
    ).rejects.toMatchObject({ name: 'ObjectLockConfigurationNotFoundError' });
    await expect(
      client.send(
        new PutBucketVersioningCommand({ Bucket: 'law', VersioningConfiguration: { Status: 'Suspended' } }),
      ),
    ).rejects.toMatchObject({ name: 'InvalidBucketState' });
  });

  it('keeps it when it is configured anew without', async () => {
    const version = await put('law', 'kept');
    await s3.service.createBucket('law', { versioning: true, eventBridge: false });
    await expect(remove('law', 'kept', version)).rejects.toMatchObject(refused);
    await expect(
      s3.service.createBucket('law', { versioning: false, eventBridge: false }),
    ).rejects.toMatchObject({ name: 'InvalidBucketState' });
  });
});
