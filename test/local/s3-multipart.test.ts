/** Multipart uploads and the arithmetic of their checksums. */
import { createHash, randomBytes } from 'node:crypto';
import { mkdtemp, readdir, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import {
  AbortMultipartUploadCommand,
  type CompletedPart,
  CompleteMultipartUploadCommand,
  CreateMultipartUploadCommand,
  type CreateMultipartUploadCommandInput,
  DeleteObjectCommand,
  GetObjectAttributesCommand,
  GetObjectCommand,
  HeadObjectCommand,
  ListMultipartUploadsCommand,
  ListPartsCommand,
  PutObjectCommand,
  type S3Client,
  UploadPartCommand,
  UploadPartCopyCommand,
} from '@aws-sdk/client-s3';
import { Upload } from '@aws-sdk/lib-storage';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createDigest, joinCrcs } from '../../local/s3/checksum.ts';
import { startS3, type TestS3 } from './s3-server.ts';

const Bucket = 'parts-bucket';
const MIB = 1024 ** 2;
const slide = randomBytes(17 * MIB + 123);

let folder: string;
let s3: TestS3;
let client: S3Client;
/** Sends no checksum of its own, as other SDKs and older ones do. */
let silent: S3Client;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'slideway-s3-'));
  s3 = await startS3(folder);
  await s3.service.createBucket(Bucket, { versioning: true, eventBridge: true });
  client = s3.client();
  silent = s3.client({ requestChecksumCalculation: 'WHEN_REQUIRED' });
  await client.send(new PutObjectCommand({ Bucket, Key: 'slide', Body: slide }));
});

afterAll(async () => {
  await s3.close();
  await rm(folder, { recursive: true });
});

async function begin(Key: string, more: Partial<CreateMultipartUploadCommandInput> = {}): Promise<string> {
  const { UploadId } = await silent.send(new CreateMultipartUploadCommand({ Bucket, Key, ...more }));
  if (!UploadId) throw new Error('no upload');
  return UploadId;
}

async function part(Key: string, UploadId: string, PartNumber: number, Body: Buffer): Promise<CompletedPart> {
  const { ETag } = await silent.send(new UploadPartCommand({ Bucket, Key, UploadId, PartNumber, Body }));
  return { PartNumber, ...(ETag && { ETag }) };
}

const complete = (Key: string, UploadId: string, Parts: CompletedPart[], more: object = {}) =>
  silent.send(
    new CompleteMultipartUploadCommand({ Bucket, Key, UploadId, MultipartUpload: { Parts }, ...more }),
  );

async function bytes(Key: string, more: object = {}): Promise<Buffer> {
  const { Body } = await client.send(new GetObjectCommand({ Bucket, Key, ...more }));
  return Buffer.from((await Body?.transformToByteArray()) ?? []);
}

const refused = (code: string) => expect.objectContaining({ name: code });
const crc64 = (content: Buffer) => {
  const digest = createDigest('CRC64NVME');
  digest.update(content);
  return digest.digest().toString('base64');
};

describe('a multipart object', () => {
  it('is its parts laid end to end, with the ETag and full-object checksum of S3', async () => {
    const Key = 'joined';
    const pieces = [slide.subarray(0, 6 * MIB), slide.subarray(6 * MIB, 12 * MIB), slide.subarray(12 * MIB)];
    const id = await begin(Key, { Metadata: { a: '1' }, Tagging: 'b=2', ContentType: 'image/tiff' });
    const parts: CompletedPart[] = [];
    const before = await contentFiles();
    for (const [index, piece] of pieces.entries()) parts.push(await part(Key, id, index + 1, piece));
    const done = await complete(Key, id, parts);
    // A plain file, as if it had been put in one piece.
    expect(await contentFiles()).toBe(before + 1);
    const md5s = pieces.map((piece) => createHash('md5').update(piece).digest());
    expect(done.ETag).toBe(`"${createHash('md5').update(Buffer.concat(md5s)).digest('hex')}-3"`);
    expect(done).toMatchObject({ ChecksumCRC64NVME: crc64(slide), ChecksumType: 'FULL_OBJECT' });
    expect((await bytes(Key)).equals(slide)).toBe(true);
    expect(
      (await bytes(Key, { Range: `bytes=${6 * MIB - 5}-${6 * MIB + 4}` })).equals(
        slide.subarray(6 * MIB - 5, 6 * MIB + 5),
      ),
    ).toBe(true);
    expect((await bytes(Key, { PartNumber: 2 })).equals(pieces[1] ?? Buffer.alloc(0))).toBe(true);
    expect(await client.send(new HeadObjectCommand({ Bucket, Key }))).toMatchObject({
      ContentLength: slide.length,
      Metadata: { a: '1' },
      TagCount: 1,
      ContentType: 'image/tiff',
    });
    const { ObjectParts } = await client.send(
      new GetObjectAttributesCommand({ Bucket, Key, ObjectAttributes: ['ObjectParts'] }),
    );
    expect(ObjectParts?.Parts?.map(({ Size }) => Size)).toEqual(pieces.map(({ length }) => length));
  });

  it('takes its parts in any order, and copies none of them to complete', async () => {
    const Key = 'any-order';
    const id = await begin(Key);
    const third = await part(Key, id, 3, slide.subarray(10 * MIB, 10 * MIB + 77));
    const second = await part(Key, id, 2, slide.subarray(5 * MIB, 10 * MIB));
    const first = await part(Key, id, 1, slide.subarray(0, 5 * MIB));
    const before = await contentFiles();
    await complete(Key, id, [first, second, third]);
    // The short last part came before the layout was known, and so has its own.
    expect(await contentFiles()).toBe(before);
    expect((await bytes(Key)).equals(slide.subarray(0, 10 * MIB + 77))).toBe(true);
  });

  it('comes from lib-storage, from a stream of unknown length', async () => {
    for (const checksums of [{}, { ChecksumAlgorithm: 'SHA256' as const }]) {
      const Body = Readable.from([slide.subarray(0, 9 * MIB), slide.subarray(9 * MIB)]);
      const upload = new Upload({
        client,
        params: { Bucket, Key: 'streamed', Body, ...checksums },
        partSize: 6 * MIB,
      });
      await upload.done();
      expect((await bytes('streamed')).equals(slide)).toBe(true);
    }
  });

  it('takes a part that was sent again', async () => {
    const Key = 'again';
    const id = await begin(Key);
    await part(Key, id, 1, slide.subarray(MIB, 7 * MIB));
    const last = await part(Key, id, 2, slide.subarray(6 * MIB, 7 * MIB));
    const first = await part(Key, id, 1, slide.subarray(0, 6 * MIB));
    await complete(Key, id, [first, last]);
    expect((await bytes(Key)).equals(slide.subarray(0, 7 * MIB))).toBe(true);
  });

  it('may leave parts out, whose bytes are then let go', async () => {
    const Key = 'left-out';
    const id = await begin(Key);
    const first = await part(Key, id, 1, slide.subarray(0, 5 * MIB));
    await part(Key, id, 2, slide.subarray(5 * MIB, 10 * MIB));
    const third = await part(Key, id, 3, slide.subarray(10 * MIB, 11 * MIB));
    await complete(Key, id, [first, third]);
    expect(
      (await bytes(Key)).equals(
        Buffer.concat([slide.subarray(0, 5 * MIB), slide.subarray(10 * MIB, 11 * MIB)]),
      ),
    ).toBe(true);
  });

  it('is announced once, when it is complete', async () => {
    s3.events.length = 0;
    const id = await begin('announced');
    await complete('announced', id, [await part('announced', id, 1, Buffer.from('small'))]);
    await expect
      .poll(() => s3.events)
      .toMatchObject([{ key: 'announced', size: 5, reason: 'CompleteMultipartUpload' }]);
  });
});

describe('completing', () => {
  it('refuses what S3 refuses, and leaves the upload as it was', async () => {
    const Key = 'refused';
    const id = await begin(Key);
    const small = await part(Key, id, 1, slide.subarray(0, 100));
    const second = await part(Key, id, 2, slide.subarray(0, 5 * MIB));
    await expect(complete(Key, id, [small, second])).rejects.toEqual(refused('EntityTooSmall'));
    await expect(complete(Key, id, [second, small])).rejects.toEqual(refused('InvalidPartOrder'));
    await expect(complete(Key, id, [{ ...small, ETag: second.ETag ?? '' }])).rejects.toEqual(
      refused('InvalidPart'),
    );
    await expect(complete(Key, id, [{ PartNumber: 7, ETag: '"0"' }])).rejects.toEqual(refused('InvalidPart'));
    await expect(complete(Key, id, [])).rejects.toEqual(refused('MalformedXML'));
    await expect(complete(Key, id, [second], { MpuObjectSize: 1 })).rejects.toEqual(
      refused('InvalidRequest'),
    );
    await expect(complete(Key, id, [second], { ChecksumCRC64NVME: crc64(slide) })).rejects.toEqual(
      refused('BadDigest'),
    );
    await expect(part(Key, id, 10_001, Buffer.from('x'))).rejects.toEqual(refused('InvalidArgument'));
    await expect(complete(Key, 'none', [small])).rejects.toEqual(refused('NoSuchUpload'));
    await complete(Key, id, [second]);
    await expect(complete(Key, id, [second])).rejects.toEqual(refused('NoSuchUpload'));
  });

  it('with If-None-Match: * does not replace', async () => {
    const id = await begin('slide');
    const only = await part('slide', id, 1, Buffer.from('other'));
    await expect(complete('slide', id, [only], { IfNoneMatch: '*' })).rejects.toEqual(
      refused('PreconditionFailed'),
    );
    expect((await bytes('slide')).equals(slide)).toBe(true);
    await client.send(new AbortMultipartUploadCommand({ Bucket, Key: 'slide', UploadId: id }));
  });

  it('of SHA-256 makes a composite, of CRC32 what was asked for', async () => {
    const pieces = [slide.subarray(0, 5 * MIB), slide.subarray(5 * MIB, 6 * MIB)];
    const upload = async (more: Partial<CreateMultipartUploadCommandInput>) => {
      const Key = 'summed';
      const id = await begin(Key, more);
      const parts: CompletedPart[] = [];
      for (const [index, Body] of pieces.entries()) {
        const { $metadata: _, ...made } = await client.send(
          new UploadPartCommand({
            Bucket,
            Key,
            UploadId: id,
            PartNumber: index + 1,
            Body,
            ChecksumAlgorithm: more.ChecksumAlgorithm,
          }),
        );
        parts.push({ ...made, PartNumber: index + 1 });
      }
      const wrong = parts.map((one) => ({ ...one, ChecksumSHA256: `${'A'.repeat(43)}=` }));
      if (more.ChecksumAlgorithm === 'SHA256')
        await expect(complete(Key, id, wrong)).rejects.toEqual(refused('InvalidPart'));
      return complete(Key, id, parts);
    };
    const sha = createHash('sha256');
    for (const piece of pieces) sha.update(createHash('sha256').update(piece).digest());
    expect(await upload({ ChecksumAlgorithm: 'SHA256' })).toMatchObject({
      ChecksumSHA256: `${sha.digest('base64')}-2`,
      ChecksumType: 'COMPOSITE',
    });
    const whole = createDigest('CRC32');
    for (const piece of pieces) whole.update(piece);
    expect(await upload({ ChecksumAlgorithm: 'CRC32', ChecksumType: 'FULL_OBJECT' })).toMatchObject({
      ChecksumCRC32: whole.digest().toString('base64'),
      ChecksumType: 'FULL_OBJECT',
    });
    expect((await upload({ ChecksumAlgorithm: 'CRC32C' })).ChecksumCRC32C).toMatch(/-2$/);
    await expect(begin('x', { ChecksumAlgorithm: 'SHA1', ChecksumType: 'FULL_OBJECT' })).rejects.toEqual(
      refused('InvalidRequest'),
    );
  });
});

describe('copied parts', () => {
  const copyPart = (Key: string, UploadId: string, PartNumber: number, more: object = {}) =>
    silent.send(
      new UploadPartCopyCommand({
        Bucket,
        Key,
        UploadId,
        PartNumber,
        CopySource: `${Bucket}/slide`,
        ...more,
      }),
    );

  it('make the same object as the source, with the same checksum, and take no space', async () => {
    const Key = 'copied';
    const before = await contentFiles();
    const id = await begin(Key, { ChecksumAlgorithm: 'CRC64NVME' });
    const Parts: CompletedPart[] = [];
    for (let start = 0, PartNumber = 1; start < slide.length; start += 8 * MIB, PartNumber++) {
      const CopySourceRange = `bytes=${start}-${Math.min(start + 8 * MIB, slide.length) - 1}`;
      const { CopyPartResult } = await copyPart(Key, id, PartNumber, { CopySourceRange });
      expect(CopyPartResult?.ChecksumCRC64NVME).toBe(crc64(slide.subarray(start, start + 8 * MIB)));
      const { LastModified: _, ...sums } = CopyPartResult ?? {};
      Parts.push({ ...sums, PartNumber });
    }
    const done = await complete(Key, id, Parts, {
      ChecksumCRC64NVME: crc64(slide),
      MpuObjectSize: slide.length,
    });
    expect(done.ChecksumCRC64NVME).toBe(crc64(slide));
    expect(await contentFiles()).toBe(before);
    expect((await bytes(Key)).equals(slide)).toBe(true);
  });

  it('outlive their source', async () => {
    await client.send(new PutObjectCommand({ Bucket, Key: 'mortal', Body: 'mortal bytes' }));
    const id = await begin('heir');
    const { CopyPartResult } = await copyPart('heir', id, 1, {
      CopySource: `${Bucket}/mortal`,
      CopySourceRange: 'bytes=7-11',
    });
    const { VersionId } = await client.send(new HeadObjectCommand({ Bucket, Key: 'mortal' }));
    await client.send(new DeleteObjectCommand({ Bucket, Key: 'mortal', VersionId }));
    await complete('heir', id, [{ PartNumber: 1, ETag: CopyPartResult?.ETag ?? '' }]);
    expect((await bytes('heir')).toString()).toBe('bytes');
  });

  it('ask for the source as it was seen', async () => {
    const { ETag, VersionId } = await client.send(new HeadObjectCommand({ Bucket, Key: 'slide' }));
    const id = await begin('seen');
    const CopySource = `${Bucket}/slide?versionId=${VersionId}`;
    const made = await copyPart('seen', id, 1, { CopySource, CopySourceIfMatch: ETag });
    expect(made.CopySourceVersionId).toBe(VersionId);
    await expect(copyPart('seen', id, 1, { CopySourceIfMatch: '"0"' })).rejects.toEqual(
      refused('PreconditionFailed'),
    );
    await expect(copyPart('seen', id, 1, { CopySourceRange: `bytes=0-${slide.length}` })).rejects.toEqual(
      refused('InvalidArgument'),
    );
    await expect(copyPart('seen', id, 1, { CopySource: `${Bucket}/none` })).rejects.toEqual(
      refused('NoSuchKey'),
    );
    await client.send(new AbortMultipartUploadCommand({ Bucket, Key: 'seen', UploadId: id }));
  });
});

describe('uploads under way', () => {
  it('are listed with their parts, page by page, until they are aborted', async () => {
    const ids = [await begin('listed/b'), await begin('listed/a'), await begin('listed/b')];
    const first = await client.send(
      new ListMultipartUploadsCommand({ Bucket, Prefix: 'listed/', MaxUploads: 2 }),
    );
    expect(first.Uploads?.map(({ Key, UploadId }) => [Key, UploadId])).toEqual([
      ['listed/a', ids[1]],
      ['listed/b', ids[0]],
    ]);
    expect(first.IsTruncated).toBe(true);
    const second = await client.send(
      new ListMultipartUploadsCommand({
        Bucket,
        Prefix: 'listed/',
        KeyMarker: first.NextKeyMarker,
        UploadIdMarker: first.NextUploadIdMarker,
      }),
    );
    expect(second.Uploads?.map(({ UploadId }) => UploadId)).toEqual([ids[2]]);

    const UploadId = ids[1] ?? '';
    const where = { Bucket, Key: 'listed/a', UploadId };
    for (const number of [2, 1, 30]) await part('listed/a', UploadId, number, Buffer.from(`part ${number}`));
    const page = await client.send(new ListPartsCommand({ ...where, MaxParts: 2 }));
    expect(page.Parts?.map(({ PartNumber, Size }) => [PartNumber, Size])).toEqual([
      [1, 6],
      [2, 6],
    ]);
    const rest = await client.send(
      new ListPartsCommand({ ...where, PartNumberMarker: page.NextPartNumberMarker }),
    );
    expect(rest.Parts?.map(({ PartNumber }) => PartNumber)).toEqual([30]);

    const before = await contentFiles();
    await client.send(new AbortMultipartUploadCommand(where));
    await expect.poll(contentFiles).toBe(before - 3);
    await expect(client.send(new ListPartsCommand(where))).rejects.toEqual(refused('NoSuchUpload'));
    await expect(part('listed/a', UploadId, 1, Buffer.from('x'))).rejects.toEqual(refused('NoSuchUpload'));
  });
});

describe('checksums of parts', () => {
  it('join into the checksum of the whole, wherever it is cut', () => {
    fc.assert(
      fc.property(
        fc.constantFrom('CRC32' as const, 'CRC32C' as const, 'CRC64NVME' as const),
        fc.array(fc.uint8Array({ maxLength: 70 }), { maxLength: 8 }),
        (algorithm, pieces) => {
          const whole = createDigest(algorithm);
          const parts = pieces.map((piece) => {
            whole.update(piece);
            const digest = createDigest(algorithm);
            digest.update(piece);
            return { crc: digest.digest(), size: piece.length };
          });
          expect(joinCrcs(algorithm, parts)).toEqual(whole.digest());
        },
      ),
    );
  });

  it('do not depend on where bytes lie in memory', () => {
    const digest = (content: Uint8Array) => {
      const sum = createDigest('CRC64NVME');
      sum.update(content);
      return sum.digest().toString('hex');
    };
    for (let shift = 0; shift < 8; shift++) {
      const moved = Buffer.alloc(1008);
      slide.copy(moved, shift, 0, 1000);
      expect(digest(moved.subarray(shift, shift + 1000))).toBe(digest(slide.subarray(0, 1000)));
    }
  });

  it.each([
    // Check values ("123456789") of the catalogue of parametrised CRC algorithms.
    ['CRC32', 'cbf43926'],
    ['CRC32C', 'e3069283'],
    ['CRC64NVME', 'ae8b14860a799888'],
  ] as const)('of %s are the published ones', (algorithm, expected) => {
    const digest = createDigest(algorithm);
    digest.update(Buffer.from('123456789'));
    expect(digest.digest().toString('hex')).toBe(expected);
  });
});

async function contentFiles(): Promise<number> {
  const paths = (await readdir(join(folder, 'content'), { recursive: true })).map((name) =>
    join(folder, 'content', name),
  );
  const found = await Promise.all(paths.map((path) => stat(path)));
  return found.filter((one) => one.isFile()).length;
}
