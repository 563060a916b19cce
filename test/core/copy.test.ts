/** How objects are copied: at the limits of S3 with a client that only records, and for real on the local S3. */
import { createHash } from 'node:crypto';
import {
  CompleteMultipartUploadCommand,
  CreateBucketCommand,
  CreateMultipartUploadCommand,
  GetObjectTaggingCommand,
  HeadObjectCommand,
  ListMultipartUploadsCommand,
  PutObjectCommand,
  S3Client,
  UploadPartCommand,
} from '@aws-sdk/client-s3';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  COPY_OBJECT_LIMIT,
  copyObject,
  MAX_PARTS,
  PART_CONCURRENCY,
  PART_SIZE,
  partRanges,
  type Source,
  seeSource,
} from '../../core/copy.ts';
import { readObject } from '../../core/store.ts';
import { type Services, startServices } from '../support/services.ts';

const MiB = 2 ** 20;
const GiB = 2 ** 30;
const MAX_OBJECT = 48.8 * 2 ** 40;

describe('the parts of a copy', () => {
  it.each([
    [COPY_OBJECT_LIMIT + 1, 38],
    [PART_SIZE, 1],
    [PART_SIZE + 1, 2],
    [50 * 1000 ** 3, 373],
    [MAX_PARTS * PART_SIZE - 1, MAX_PARTS],
    [MAX_PARTS * PART_SIZE, MAX_PARTS],
    [MAX_PARTS * PART_SIZE + 1, 9_923],
    [MAX_OBJECT, 9_999],
  ])('of %d bytes are %d, and cover them all within the limits of S3', (size, count) => {
    const ranges = partRanges(size);
    expect(ranges).toHaveLength(count);
    expect(ranges[0]?.first).toBe(0);
    expect(ranges.at(-1)?.last).toBe(size - 1);
    for (const [index, { first, last }] of ranges.entries()) {
      if (index > 0) expect(first).toBe((ranges[index - 1]?.last ?? 0) + 1);
      expect(last - first + 1).toBeLessThanOrEqual(5 * GiB);
      if (index < ranges.length - 1) expect(last - first + 1).toBeGreaterThanOrEqual(5 * MiB);
    }
  });

  it('of a slide of 50 GB are copied well within 15 minutes, though S3 copies each at 5 MB/s only', () => {
    const rounds = Math.ceil(partRanges(50 * 1000 ** 3).length / PART_CONCURRENCY);
    expect((rounds * PART_SIZE) / 5e6).toBeLessThan(0.5 * 15 * 60);
  });
});

// --- with a client that records ---------------------------------------------------------------------------------

interface Call {
  command: string;
  input: Record<string, unknown>;
}

const named = (name: string) => Object.assign(new Error(name), { name });

/** S3 for objects of any size: what is copied has the source's checksum. `trouble` may fail a call. */
function recording(
  size: number,
  trouble: (call: Call, times: number) => Error | undefined = () => undefined,
) {
  const calls: Call[] = [];
  const parts = new Map<number, number>();
  let there = false;
  const client = new S3Client({
    region: 'us-east-1',
    credentials: { accessKeyId: 'a', secretAccessKey: 'b' },
  });
  const head = { ContentLength: size, ETag: '"e-2"', VersionId: 'v1', ChecksumCRC64NVME: 'crc', TagCount: 0 };
  const answer = ({ command, input }: Call): unknown => {
    switch (command) {
      case 'HeadObjectCommand':
        if (input.Bucket === 'landing') return head;
        if (!there) throw named('NotFound');
        return { ...head, VersionId: 'b1' };
      case 'CreateMultipartUploadCommand':
        parts.clear();
        return { UploadId: `u${calls.filter((call) => call.command === command).length}` };
      case 'UploadPartCopyCommand': {
        const [, first, last] = /^bytes=(\d+)-(\d+)$/.exec(String(input.CopySourceRange)) ?? [];
        parts.set(Number(input.PartNumber), Number(last) - Number(first) + 1);
        return {
          CopyPartResult: { ETag: `"p${input.PartNumber}"`, ChecksumCRC64NVME: `c${input.PartNumber}` },
        };
      }
      case 'ListPartsCommand':
        return {
          Parts: [...parts].map(([PartNumber, Size]) => ({
            PartNumber,
            Size,
            ETag: `"p${PartNumber}"`,
            ChecksumCRC64NVME: `c${PartNumber}`,
          })),
        };
      case 'CopyObjectCommand':
      case 'CompleteMultipartUploadCommand':
        there = true;
        return {};
      default:
        return {};
    }
  };
  client.middlewareStack.add(
    (_next, context) => async (args) => {
      const call = { command: context.commandName ?? '', input: args.input as Record<string, unknown> };
      calls.push(call);
      const times = calls.filter(({ command }) => command === call.command).length;
      const error = trouble(call, times);
      if (error) throw error;
      return { output: { $metadata: {}, ...(answer(call) as object) }, response: {} } as never;
    },
    { step: 'initialize', name: 'record' },
  );
  const count = (command: string) => calls.filter((call) => call.command === `${command}Command`).length;
  const last = (command: string) => calls.findLast((call) => call.command === `${command}Command`)?.input;
  return { client, calls, count, last };
}

const TARGET = { bucket: 'bronze', key: 'slides/s/S1/S1.svs', tags: { run: 'r', slide: 'S1', study: 's' } };
const source = (s3: S3Client): Promise<Source> => seeSource(s3, { bucket: 'landing', key: 's/x y+z.svs' });

describe('an object', () => {
  it.each([
    ['of no bytes', 0, 0],
    ['of 5 GB', COPY_OBJECT_LIMIT, 0],
    ['of one byte over 5 GB', COPY_OBJECT_LIMIT + 1, 38],
    ['of 10,000 parts', MAX_PARTS * PART_SIZE, MAX_PARTS],
    ['of one byte over them', MAX_PARTS * PART_SIZE + 1, 9_923],
    ['as large as S3 has them', MAX_OBJECT, 9_999],
  ])('%s is copied as S3 wants it, pinned, never over another', async (_, size, parts) => {
    const s3 = recording(size);
    const copied = await copyObject(s3.client, await source(s3.client), TARGET);
    expect(copied).toMatchObject({ size, versionId: 'b1', proof: 'crc64nvme', source: { versionId: 'v1' } });
    expect(s3.count('CopyObject')).toBe(parts === 0 ? 1 : 0);
    expect(s3.count('UploadPartCopy')).toBe(parts);
    for (const { command, input } of s3.calls) {
      if (/^(CopyObject|UploadPartCopy)/.test(command))
        expect(input).toMatchObject({
          CopySource: 'landing/s/x%20y%2Bz.svs?versionId=v1',
          CopySourceIfMatch: '"e-2"',
        });
      if (/^(CopyObject|Complete)/.test(command)) expect(input).toMatchObject({ IfNoneMatch: '*' });
    }
    if (parts > 0) {
      const { MultipartUpload, ...complete } = s3.last('CompleteMultipartUpload') ?? {};
      expect(complete).toMatchObject({
        MpuObjectSize: size,
        ChecksumType: 'FULL_OBJECT',
        ChecksumCRC64NVME: 'crc',
      });
      const { Parts } = MultipartUpload as { Parts: { PartNumber: number }[] };
      expect(Parts.map(({ PartNumber }) => PartNumber)).toEqual(
        Array.from({ length: parts }, (_, i) => i + 1),
      );
    }
    expect(s3.count('AbortMultipartUpload')).toBe(0);
  });

  it('that meets another write of its key starts again, and is aborted before', async () => {
    const s3 = recording(COPY_OBJECT_LIMIT + 1, ({ command }, times) =>
      command === 'CompleteMultipartUploadCommand' && times === 1
        ? named('ConditionalRequestConflict')
        : undefined,
    );
    await copyObject(s3.client, await source(s3.client), TARGET);
    expect([s3.count('CreateMultipartUpload'), s3.count('AbortMultipartUpload')]).toEqual([2, 1]);
    expect(s3.last('CompleteMultipartUpload')?.UploadId).toBe('u2');
  });

  it('that meets them again and again is given up, with nothing left', async () => {
    const s3 = recording(COPY_OBJECT_LIMIT + 1, ({ command }) =>
      command === 'CompleteMultipartUploadCommand' ? named('ConditionalRequestConflict') : undefined,
    );
    await expect(copyObject(s3.client, await source(s3.client), TARGET)).rejects.toThrow(
      'ConditionalRequestConflict',
    );
    expect(s3.count('AbortMultipartUpload')).toBe(s3.count('CreateMultipartUpload'));
  });

  it('is aborted when a part fails', async () => {
    const s3 = recording(COPY_OBJECT_LIMIT + 1, ({ command }, times) =>
      command === 'UploadPartCopyCommand' && times === 20 ? named('InternalError') : undefined,
    );
    await expect(copyObject(s3.client, await source(s3.client), TARGET)).rejects.toThrow('InternalError');
    expect(s3.last('AbortMultipartUpload')?.UploadId).toBe('u1');
  });

  it('goes in parts where the bucket takes no CopyObject', async () => {
    const s3 = recording(10, ({ command }) =>
      command === 'CopyObjectCommand' ? named('NotImplemented') : undefined,
    );
    await copyObject(s3.client, await source(s3.client), TARGET);
    expect(s3.count('UploadPartCopy')).toBe(1);
  });

  it.each([
    ['KeyTooLongError', 'NameRefused'],
    ['BadDigest', 'ChecksumMismatch'],
  ])('refused as %s is %s', async (error, name) => {
    const s3 = recording(COPY_OBJECT_LIMIT + 1, ({ command }) =>
      command === 'CompleteMultipartUploadCommand' ? named(error) : undefined,
    );
    await expect(copyObject(s3.client, await source(s3.client), TARGET)).rejects.toMatchObject({ name });
  });
});

describe('a copy without time left', () => {
  it('stops between parts and goes on with those that are missing', async () => {
    const size = 200 * PART_SIZE + 1;
    let left = 900_000;
    const s3 = recording(size, ({ command }) => {
      if (command === 'UploadPartCopyCommand') left -= 10_000;
      return undefined;
    });
    const seen = await source(s3.client);
    let answer = await copyObject(s3.client, seen, TARGET, { timeLeft: () => left });
    const rounds = [answer];
    while ('unfinished' in answer) {
      expect(s3.count('CompleteMultipartUpload') + s3.count('AbortMultipartUpload')).toBe(0);
      left = 900_000;
      answer = await copyObject(s3.client, seen, TARGET, { timeLeft: () => left, upload: answer.upload });
      rounds.push(answer);
    }
    expect(rounds.length).toBeGreaterThan(2);
    expect(s3.count('CreateMultipartUpload')).toBe(1);
    const numbers = s3.calls
      .filter(({ command }) => command === 'UploadPartCopyCommand')
      .map(({ input }) => input.PartNumber);
    expect(new Set(numbers).size).toBe(201);
    expect(numbers).toHaveLength(201);
    expect(s3.last('CompleteMultipartUpload')).toMatchObject({ MultipartUpload: { Parts: { length: 201 } } });
  });

  it('is not begun', async () => {
    const s3 = recording(COPY_OBJECT_LIMIT);
    expect(await copyObject(s3.client, await source(s3.client), TARGET, { timeLeft: () => 60_000 })).toEqual({
      unfinished: true,
    });
    expect(s3.count('CopyObject')).toBe(0);
  });

  it('whose upload is gone starts again; whose source is another is given up', async () => {
    const s3 = recording(COPY_OBJECT_LIMIT + 1, ({ command }) =>
      command === 'ListPartsCommand' ? named('NoSuchUpload') : undefined,
    );
    const seen = await source(s3.client);
    const upload = { uploadId: 'old', etag: seen.etag, versionId: 'v1' };
    await copyObject(s3.client, seen, TARGET, { upload });
    expect(s3.last('CompleteMultipartUpload')?.UploadId).toBe('u1');
    const changed = copyObject(s3.client, seen, TARGET, { upload: { ...upload, versionId: 'v0' } });
    await expect(changed).rejects.toMatchObject({ name: 'SlideChanged' });
    expect(s3.last('AbortMultipartUpload')?.UploadId).toBe('old');
  });
});

// --- for real -----------------------------------------------------------------------------------------------------

describe('on the local S3', () => {
  let services: Services;
  let s3: S3Client;
  beforeAll(async () => {
    services = await startServices();
    ({ s3 } = services);
    await services.createBucket('landing');
    await services.createBucket('bronze');
  });
  afterAll(() => services.close());

  const see = (key: string) => seeSource(s3, { bucket: 'landing', key });
  const to = (key: string) => ({ ...TARGET, key });
  const smallParts = { copyObjectLimit: 1, partSize: 5 * MiB };

  async function sha256(bucket: string, key: string): Promise<string> {
    const hash = createHash('sha256');
    for await (const chunk of (await readObject(s3, { bucket, key })) ?? []) hash.update(chunk as Buffer);
    return hash.digest('hex');
  }

  /** Uploads a body in parts, with one algorithm. */
  async function putInParts(
    key: string,
    parts: Buffer[],
    algorithm: 'CRC32' | 'CRC32C' | 'SHA256',
    type: 'FULL_OBJECT' | 'COMPOSITE',
  ) {
    const where = { Bucket: 'landing', Key: key };
    const { UploadId } = await s3.send(
      new CreateMultipartUploadCommand({ ...where, ChecksumAlgorithm: algorithm, ChecksumType: type }),
    );
    const Parts = [];
    for (const [index, Body] of parts.entries()) {
      const part = { PartNumber: index + 1 };
      const done = await s3.send(
        new UploadPartCommand({ ...where, ...part, UploadId, Body, ChecksumAlgorithm: algorithm }),
      );
      Parts.push({ ...part, ETag: done.ETag, [`Checksum${algorithm}`]: done[`Checksum${algorithm}`] });
    }
    await s3.send(
      new CompleteMultipartUploadCommand({
        ...where,
        UploadId,
        MultipartUpload: { Parts },
        ChecksumType: type,
      }),
    );
  }

  it('a slide of 300 MB is the same byte for byte, and is handed over on the way', async () => {
    const body = Buffer.alloc(300 * MiB);
    for (let at = 0; at < body.length; at += 4096) body.writeUInt32LE(at, at);
    await s3.send(
      new PutObjectCommand({
        Bucket: 'landing',
        Key: 's/large.svs',
        Body: body,
        ChecksumAlgorithm: 'CRC64NVME',
      }),
    );
    const seen = await see('s/large.svs');
    let left = 700_000;
    const timeLeft = () => {
      left -= 20_000;
      return left;
    };
    const options = { copyObjectLimit: 64 * MiB, partSize: 8 * MiB, timeLeft };
    let answer = await copyObject(s3, seen, to('slides/s/L/large.svs'), options);
    expect(answer).toMatchObject({ unfinished: true, upload: { etag: seen.etag } });
    let rounds = 1;
    for (; 'unfinished' in answer; rounds++) {
      left = 700_000;
      answer = await copyObject(s3, seen, to('slides/s/L/large.svs'), { ...options, upload: answer.upload });
    }
    expect(rounds).toBeGreaterThan(1);
    expect(answer.proof).toBe('crc64nvme');
    expect(await sha256('bronze', 'slides/s/L/large.svs')).toBe(
      createHash('sha256').update(body).digest('hex'),
    );
    const there = await s3.send(new HeadObjectCommand({ Bucket: 'bronze', Key: 'slides/s/L/large.svs' }));
    expect(there.ETag).toMatch(/-38"$/);
    const { Uploads } = await s3.send(new ListMultipartUploadsCommand({ Bucket: 'bronze' }));
    expect(Uploads ?? []).toEqual([]);
  }, 120_000);

  it.each([
    ['CRC32', 'FULL_OBJECT', 'crc32'],
    ['CRC32C', 'FULL_OBJECT', 'crc32c'],
    ['CRC32', 'COMPOSITE', 'crc32'],
    ['CRC32C', 'COMPOSITE', 'crc32c'],
    ['SHA256', 'COMPOSITE', 'size'],
  ] as const)('an upload in parts with %s, %s, is proved by %s', async (algorithm, type, proof) => {
    const key = `s/${algorithm}-${type}.svs`;
    await putInParts(
      key,
      [Buffer.alloc(6 * MiB, 1), Buffer.alloc(5 * MiB, 2), Buffer.from('last')],
      algorithm,
      type,
    );
    const copied = await copyObject(s3, await see(key), to(`slides/${key}`), smallParts);
    expect(copied).toMatchObject({ proof, checksum: expect.stringMatching(/^crc64nvme:/) });
    const { Uploads } = await s3.send(new ListMultipartUploadsCommand({ Bucket: 'bronze' }));
    expect(Uploads ?? []).toEqual([]);
  });

  it.each([
    ['CRC32', 'FULL_OBJECT'],
    ['CRC32C', 'COMPOSITE'],
  ] as const)('other bytes of the same length are told apart by %s, %s', async (algorithm, type) => {
    const key = `s/other-${algorithm}.svs`;
    const first = Buffer.alloc(5 * MiB, 1);
    await putInParts(key, [first, Buffer.from('last')], algorithm, type);
    await s3.send(
      new PutObjectCommand({
        Bucket: 'bronze',
        Key: `slides/${key}`,
        Body: Buffer.concat([first, Buffer.from('lost')]),
      }),
    );
    await expect(copyObject(s3, await see(key), to(`slides/${key}`), smallParts)).rejects.toMatchObject({
      name: 'NameTaken',
    });
  });

  it.each([
    ['whole', {}],
    ['in parts', smallParts],
  ])('metadata and tags are carried %s, ours first', async (_, options) => {
    const key = `s/tagged-${Object.keys(options).length}.svs`;
    const tags = Object.fromEntries(Array.from({ length: 9 }, (_, i) => [`t${i}`, `v ${i}`]));
    await s3.send(
      new PutObjectCommand({
        Bucket: 'landing',
        Key: key,
        Body: 'slide',
        Metadata: { scanner: 'a1' },
        ContentType: 'image/tiff',
        CacheControl: 'no-store',
        Tagging: new URLSearchParams({ ...tags, slide: 'theirs' }).toString(),
      }),
    );
    await copyObject(s3, await see(key), to(`slides/${key}`), options);
    const there = await s3.send(new HeadObjectCommand({ Bucket: 'bronze', Key: `slides/${key}` }));
    expect(there).toMatchObject({
      Metadata: { scanner: 'a1' },
      ContentType: 'image/tiff',
      CacheControl: 'no-store',
    });
    const { TagSet = [] } = await s3.send(
      new GetObjectTaggingCommand({ Bucket: 'bronze', Key: `slides/${key}` }),
    );
    expect(Object.fromEntries(TagSet.map(({ Key, Value }) => [Key, Value]))).toEqual({
      run: 'r',
      slide: 'S1',
      study: 's',
      ...Object.fromEntries(Object.entries(tags).slice(0, 7)),
    });
  });

  it('what is to be replaced becomes a new version, and the old one stays', async () => {
    const put = (Body: string) => s3.send(new PutObjectCommand({ Bucket: 'landing', Key: 's/r.svs', Body }));
    await put('old');
    const first = await copyObject(s3, await see('s/r.svs'), to('slides/s/R/r.svs'));
    await put('new content');
    const second = await copyObject(s3, await see('s/r.svs'), { ...to('slides/s/R/r.svs'), replace: true });
    if ('unfinished' in first || 'unfinished' in second) throw new Error('unfinished');
    expect(second.versionId).not.toBe(first.versionId);
    const old = await s3.send(
      new HeadObjectCommand({ Bucket: 'bronze', Key: first.key, VersionId: first.versionId }),
    );
    expect(old.ContentLength).toBe(3);
  });
});

it('a bucket without versions is copied from all the same', async () => {
  const services = await startServices();
  for (const Bucket of ['landing', 'bronze']) await services.s3.send(new CreateBucketCommand({ Bucket }));
  await services.s3.send(new PutObjectCommand({ Bucket: 'landing', Key: 'x', Body: 'x' }));
  const seen = await seeSource(services.s3, { bucket: 'landing', key: 'x' });
  expect(await copyObject(services.s3, seen, TARGET)).toMatchObject({ size: 1 });
  await services.close();
});
