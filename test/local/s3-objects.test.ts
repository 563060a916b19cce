/** What the local S3 does with single objects, asked by the AWS SDK over HTTP. */
import { createHash, randomBytes } from 'node:crypto';
import { mkdtemp, readdir, rm } from 'node:fs/promises';
import { request as httpRequest } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import { crc32 } from 'node:zlib';
import {
  type ChecksumAlgorithm,
  CopyObjectCommand,
  CreateBucketCommand,
  DeleteBucketCommand,
  DeleteObjectCommand,
  DeleteObjectsCommand,
  DeleteObjectTaggingCommand,
  GetBucketLocationCommand,
  GetBucketVersioningCommand,
  GetObjectAttributesCommand,
  GetObjectCommand,
  GetObjectTaggingCommand,
  HeadBucketCommand,
  HeadObjectCommand,
  ListBucketsCommand,
  ListObjectVersionsCommand,
  PutBucketVersioningCommand,
  PutObjectCommand,
  PutObjectTaggingCommand,
  type S3Client,
} from '@aws-sdk/client-s3';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { ChunkedBody } from '../../local/s3/chunked.ts';
import { startS3, type TestS3 } from './s3-server.ts';

const PLAIN = 'plain-bucket';
const VERSIONED = 'versioned-bucket';

let folder: string;
let s3: TestS3;
let client: S3Client;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'slideway-s3-'));
  s3 = await startS3(folder);
  await s3.service.createBucket(PLAIN, { versioning: false, eventBridge: false });
  await s3.service.createBucket(VERSIONED, { versioning: true, eventBridge: true });
  client = s3.client();
});

afterAll(async () => {
  await s3.close();
  await rm(folder, { recursive: true });
});

const put = (Key: string, Body: string | Buffer, more: object = {}, Bucket = PLAIN) =>
  client.send(new PutObjectCommand({ Bucket, Key, Body, ...more }));
const get = (Key: string, more: object = {}, Bucket = PLAIN) =>
  client.send(new GetObjectCommand({ Bucket, Key, ...more }));
const text = async (Key: string, more: object = {}, Bucket = PLAIN) =>
  (await get(Key, more, Bucket)).Body?.transformToString();

/** The name and status with which a request is refused. */
async function refusal(request: Promise<unknown>): Promise<[name: string, status: number | undefined]> {
  const error = await request.then(
    () => undefined,
    (reason: { name: string; $metadata?: { httpStatusCode?: number } }) => reason,
  );
  if (!error) throw new Error('the request was not refused');
  return [error.name, error.$metadata?.httpStatusCode];
}

/** A request as it is, for what the SDK would never send. */
function send(
  method: string,
  path: string,
  headers: Record<string, string | number>,
  body: string | Buffer = '',
) {
  return new Promise<{ status: number; body: string; headers: NodeJS.Dict<string | string[]> }>(
    (resolve, reject) => {
      const request = httpRequest(s3.endpoint + path, { method, headers }, async (response) => {
        const chunks: Buffer[] = [];
        for await (const chunk of response as AsyncIterable<Buffer>) chunks.push(chunk);
        resolve({
          status: response.statusCode ?? 0,
          body: Buffer.concat(chunks).toString(),
          headers: response.headers,
        });
      });
      request.on('error', reject);
      request.end(body);
    },
  );
}

const base64Crc32 = (bytes: Buffer) => {
  const out = Buffer.alloc(4);
  out.writeUInt32BE(crc32(bytes));
  return out.toString('base64');
};

describe('buckets', () => {
  it('are created, listed, found and deleted when empty', async () => {
    const Bucket = 'short-lived';
    await client.send(new CreateBucketCommand({ Bucket }));
    await client.send(new CreateBucketCommand({ Bucket }));
    await client.send(new HeadBucketCommand({ Bucket }));
    const { Buckets } = await client.send(new ListBucketsCommand({}));
    expect(Buckets?.map(({ Name }) => Name)).toEqual([PLAIN, Bucket, VERSIONED]);
    expect((await client.send(new GetBucketLocationCommand({ Bucket }))).LocationConstraint).toBeFalsy();
    await put('x', 'x', {}, Bucket);
    expect(await refusal(client.send(new DeleteBucketCommand({ Bucket })))).toEqual(['BucketNotEmpty', 409]);
    await client.send(new DeleteObjectCommand({ Bucket, Key: 'x' }));
    await client.send(new DeleteBucketCommand({ Bucket }));
    expect(await refusal(client.send(new HeadBucketCommand({ Bucket })))).toEqual(['NotFound', 404]);
    expect(await refusal(put('x', 'x', {}, Bucket))).toEqual(['NoSuchBucket', 404]);
    expect(await refusal(get('x', {}, Bucket))).toEqual(['NoSuchBucket', 404]);
  });

  it('refuse names that are none', async () => {
    expect(await refusal(client.send(new CreateBucketCommand({ Bucket: 'Upper_Case' })))).toEqual([
      'InvalidBucketName',
      400,
    ]);
  });

  it('refuse what the local S3 does not do, by name', async () => {
    const answer = await send('GET', `/${PLAIN}?lifecycle`, {});
    expect(answer.status).toBe(501);
    expect(answer.body).toContain('GET bucket ?lifecycle');
    expect((await send('PUT', `/${PLAIN}/x`, { 'x-amz-object-lock-legal-hold': 'ON' })).status).toBe(501);
    expect(await refusal(put('x', 'x', { ACL: 'public-read' }))).toEqual([
      'AccessControlListNotSupported',
      400,
    ]);
    expect(await refusal(get('x', { ExpectedBucketOwner: '111111111111' }))).toEqual(['AccessDenied', 403]);
  });
});

describe('an object', () => {
  it('comes back with its content type, metadata, tags and ETag', async () => {
    const { ETag } = await put('described', 'hello', {
      ContentType: 'text/plain; charset=utf-8',
      CacheControl: 'no-store',
      Metadata: { 'slide-id': 'a b', stain: 'H&E' },
      Tagging: 'study=one%20two&x=',
    });
    expect(ETag).toBe(`"${createHash('md5').update('hello').digest('hex')}"`);
    const found = await get('described');
    expect(found).toMatchObject({
      ContentType: 'text/plain; charset=utf-8',
      CacheControl: 'no-store',
      ContentLength: 5,
      Metadata: { 'slide-id': 'a b', stain: 'H&E' },
      TagCount: 2,
      ETag,
    });
    expect(await found.Body?.transformToString()).toBe('hello');
    const head = await client.send(new HeadObjectCommand({ Bucket: PLAIN, Key: 'described' }));
    expect(head).toMatchObject({ ContentLength: 5, ETag, Metadata: { stain: 'H&E' } });
    const { TagSet } = await client.send(new GetObjectTaggingCommand({ Bucket: PLAIN, Key: 'described' }));
    expect(TagSet).toEqual([
      { Key: 'study', Value: 'one two' },
      { Key: 'x', Value: '' },
    ]);
  });

  it('may be empty', async () => {
    await put('empty', Buffer.alloc(0));
    expect(await text('empty')).toBe('');
    expect(await refusal(get('empty', { Range: 'bytes=0-0' }))).toEqual(['InvalidRange', 416]);
  });

  it('is not there under a key that nobody put', async () => {
    expect(await refusal(get('nowhere'))).toEqual(['NoSuchKey', 404]);
    expect(await refusal(client.send(new HeadObjectCommand({ Bucket: PLAIN, Key: 'nowhere' })))).toEqual([
      'NotFound',
      404,
    ]);
  });

  it('is replaced whole, and its old file goes', async () => {
    const files = async () => (await readdir(join(folder, 'content'), { recursive: true })).length;
    await put('replaced', 'one');
    const before = await files();
    await put('replaced', 'two');
    await put('replaced', 'three');
    expect(await text('replaced')).toBe('three');
    await expect.poll(async () => Math.abs((await files()) - before)).toBeLessThanOrEqual(2);
    await client.send(new DeleteObjectCommand({ Bucket: PLAIN, Key: 'replaced' }));
    expect(await refusal(get('replaced'))).toEqual(['NoSuchKey', 404]);
  });

  it('takes any key of up to 1024 bytes of UTF-8', async () => {
    const key = fc
      .oneof(
        fc.string({ unit: 'binary', minLength: 1, maxLength: 40 }),
        fc
          .array(fc.constantFrom('..', '.', '', 'a', ' ', '+', '%', '%2F', '?', '#', '&', 'é', '/'), {
            minLength: 1,
          })
          .map((segments) => segments.join('/')),
      )
      .filter((text) => text !== '' && Buffer.byteLength(text) <= 1024);
    await fc.assert(
      fc.asyncProperty(key, async (Key) => {
        await put(Key, Key);
        expect(await text(Key)).toBe(Key);
        const url = `${PLAIN}/${encodeURIComponent(Key)}`;
        await client.send(new CopyObjectCommand({ Bucket: PLAIN, Key: 'copied', CopySource: url }));
        expect(await text('copied')).toBe(Key);
        await client.send(new DeleteObjectCommand({ Bucket: PLAIN, Key }));
        expect(await refusal(get(Key))).toEqual(['NoSuchKey', 404]);
      }),
      { numRuns: 60 },
    );
    expect(await refusal(put('é'.repeat(513), 'x'))).toEqual(['KeyTooLongError', 400]);
    const inside = await readdir(folder);
    expect(inside.sort()).toEqual(['content', 'index']);
  });

  it('is read by range', async () => {
    await put('digits', '0123456789');
    const found = await get('digits', { Range: 'bytes=2-4' });
    expect(found).toMatchObject({ ContentRange: 'bytes 2-4/10', ContentLength: 3 });
    expect(await found.Body?.transformToString()).toBe('234');
    expect(await text('digits', { Range: 'bytes=7-' })).toBe('789');
    expect(await text('digits', { Range: 'bytes=-3' })).toBe('789');
    expect(await text('digits', { Range: 'bytes=-30' })).toBe('0123456789');
    expect(await text('digits', { Range: 'bytes=8-100' })).toBe('89');
    expect(await refusal(get('digits', { Range: 'bytes=10-' }))).toEqual(['InvalidRange', 416]);
    expect(await text('digits', { Range: 'lines=1-2' })).toBe('0123456789');
  });

  it('is read on conditions', async () => {
    const { ETag } = await put('conditional', 'x');
    const other = '"00000000000000000000000000000000"';
    const past = new Date(Date.now() - 3_600_000);
    const future = new Date(Date.now() + 3_600_000);
    expect(await text('conditional', { IfMatch: ETag })).toBe('x');
    expect(await refusal(get('conditional', { IfMatch: other }))).toEqual(['PreconditionFailed', 412]);
    expect(await text('conditional', { IfNoneMatch: other })).toBe('x');
    expect((await refusal(get('conditional', { IfNoneMatch: ETag })))[1]).toBe(304);
    expect((await refusal(get('conditional', { IfModifiedSince: future })))[1]).toBe(304);
    expect(await text('conditional', { IfModifiedSince: past })).toBe('x');
    expect(await refusal(get('conditional', { IfUnmodifiedSince: past }))).toEqual([
      'PreconditionFailed',
      412,
    ]);
    // The ETag outweighs the time.
    expect(await text('conditional', { IfMatch: ETag, IfUnmodifiedSince: past })).toBe('x');
  });

  it('is sent with the headers that the request asks for', async () => {
    await put('overridden', 'x', { ContentType: 'text/plain' });
    expect(
      await get('overridden', {
        ResponseContentType: 'image/png',
        ResponseContentDisposition: 'attachment; filename="x.png"',
      }),
    ).toMatchObject({ ContentType: 'image/png', ContentDisposition: 'attachment; filename="x.png"' });
  });

  it('changes its tags without changing its content', async () => {
    const { ETag } = await put('tagged', 'x', { Tagging: 'a=1' });
    const TagSet = [
      { Key: 'b', Value: '2 & <3>' },
      { Key: '__proto__', Value: '' },
    ];
    const where = { Bucket: PLAIN, Key: 'tagged' };
    await client.send(new PutObjectTaggingCommand({ ...where, Tagging: { TagSet } }));
    expect((await client.send(new GetObjectTaggingCommand(where))).TagSet).toEqual(TagSet);
    expect((await get('tagged')).ETag).toBe(ETag);
    await client.send(new DeleteObjectTaggingCommand(where));
    expect((await client.send(new GetObjectTaggingCommand(where))).TagSet).toEqual([]);
    const twice = [
      { Key: 'a', Value: '' },
      { Key: 'a', Value: '' },
    ];
    expect(
      await refusal(client.send(new PutObjectTaggingCommand({ ...where, Tagging: { TagSet: twice } }))),
    ).toEqual(['InvalidTag', 400]);
  });
});

describe('a client', () => {
  const files = async () =>
    (await readdir(join(folder, 'content'), { withFileTypes: true, recursive: true })).filter((one) =>
      one.isFile(),
    ).length;

  it('that goes away in the middle of a put leaves nothing', async () => {
    const before = await files();
    const upload = httpRequest(`${s3.endpoint}/${PLAIN}/half`, {
      method: 'PUT',
      headers: { 'content-length': 8_000_000 },
    });
    upload.on('error', () => {});
    upload.write(randomBytes(4_000_000));
    await expect.poll(files).toBe(before + 1);
    upload.destroy();
    await expect.poll(files).toBe(before);
    expect(await refusal(get('half'))).toEqual(['NoSuchKey', 404]);
  });

  it('that goes away in the middle of a get does not hold the content', async () => {
    await put('large', randomBytes(20_000_000));
    const before = await files();
    await new Promise<void>((resolve) => {
      httpRequest(`${s3.endpoint}/${PLAIN}/large`, (response) => {
        response.once('data', () => {
          response.destroy();
          resolve();
        });
      }).end();
    });
    await client.send(new DeleteObjectCommand({ Bucket: PLAIN, Key: 'large' }));
    await expect.poll(files).toBe(before - 1);
  });

  it('that reads while the object is replaced gets the whole of what it asked for', async () => {
    const old = randomBytes(20_000_000);
    await put('replaced-while-read', old);
    const { Body } = await get('replaced-while-read');
    await put('replaced-while-read', 'new');
    expect(Buffer.from((await Body?.transformToByteArray()) ?? []).equals(old)).toBe(true);
    expect(await text('replaced-while-read')).toBe('new');
  });
});

describe('conditional writes', () => {
  it('of If-None-Match: * let one of many writers win', async () => {
    const attempts = await Promise.allSettled(
      Array.from({ length: 8 }, (_, i) => put('claimed', `writer ${i}`, { IfNoneMatch: '*' })),
    );
    const winners = attempts.flatMap(({ status }, i) => (status === 'fulfilled' ? [i] : []));
    expect(winners).toHaveLength(1);
    expect(await text('claimed')).toBe(`writer ${winners[0]}`);
    expect(await refusal(put('claimed', 'x', { IfNoneMatch: '*' }))).toEqual(['PreconditionFailed', 412]);
  });

  it('of If-Match replace only what they know', async () => {
    const { ETag } = await put('known', 'one');
    await put('known', 'two', { IfMatch: ETag });
    expect(await refusal(put('known', 'three', { IfMatch: ETag }))).toEqual(['PreconditionFailed', 412]);
    expect(await refusal(put('unknown', 'x', { IfMatch: ETag }))).toEqual(['NoSuchKey', 404]);
    expect(await text('known')).toBe('two');
  });

  it('hold for copies', async () => {
    await put('from', 'from');
    await put('to', 'to');
    const copy = (more: object) =>
      client.send(new CopyObjectCommand({ Bucket: PLAIN, Key: 'to', CopySource: `${PLAIN}/from`, ...more }));
    expect(await refusal(copy({ IfNoneMatch: '*' }))).toEqual(['PreconditionFailed', 412]);
    expect(await text('to')).toBe('to');
  });
});

describe('checksums', () => {
  const body = randomBytes(300_001);
  const expected: Record<string, string> = {
    SHA1: createHash('sha1').update(body).digest('base64'),
    SHA256: createHash('sha256').update(body).digest('base64'),
    CRC32: base64Crc32(body),
  };

  it.each(['CRC32', 'CRC32C', 'CRC64NVME', 'SHA1', 'SHA256'])(
    'of %s are checked in header and trailer, and come back',
    async (name) => {
      const ChecksumAlgorithm = name as ChecksumAlgorithm;
      const field = `Checksum${name}` as 'ChecksumCRC32';
      const inHeader = await put('summed', body, { ChecksumAlgorithm });
      const streamed = await client.send(
        new PutObjectCommand({
          Bucket: PLAIN,
          Key: 'summed',
          Body: Readable.from([body.subarray(0, 70_000), body.subarray(70_000)]),
          ContentLength: body.length,
          ChecksumAlgorithm,
        }),
      );
      expect(inHeader[field]).toBeTruthy();
      expect(streamed[field]).toBe(inHeader[field]);
      if (expected[name]) expect(inHeader[field]).toBe(expected[name]);
      const found = await get('summed', { ChecksumMode: 'ENABLED' });
      expect(found[field]).toBe(inHeader[field]);
      expect(Buffer.from((await found.Body?.transformToByteArray()) ?? []).equals(body)).toBe(true);
    },
  );

  it('are CRC64NVME of the full object where the client sends none', async () => {
    const silent = s3.client({ requestChecksumCalculation: 'WHEN_REQUIRED' });
    // The check value of CRC-64/NVME, from the catalogue of parametrised CRC algorithms.
    const made = await silent.send(new PutObjectCommand({ Bucket: PLAIN, Key: 'crc', Body: '123456789' }));
    const value = Buffer.from('ae8b14860a799888', 'hex').toString('base64');
    expect(made).toMatchObject({ ChecksumCRC64NVME: value, ChecksumType: 'FULL_OBJECT' });
    const attributes = await client.send(
      new GetObjectAttributesCommand({
        Bucket: PLAIN,
        Key: 'crc',
        ObjectAttributes: ['Checksum', 'ETag', 'ObjectSize', 'StorageClass'],
      }),
    );
    expect(attributes).toMatchObject({
      Checksum: { ChecksumCRC64NVME: value, ChecksumType: 'FULL_OBJECT' },
      ETag: createHash('md5').update('123456789').digest('hex'),
      ObjectSize: 9,
      StorageClass: 'STANDARD',
    });
  });

  it.each([
    ['x-amz-checksum-crc32', 'AAAAAA==', 'BadDigest'],
    ['x-amz-checksum-crc64nvme', 'AAAAAAAAAAA=', 'BadDigest'],
    ['x-amz-checksum-sha256', `${'A'.repeat(43)}=`, 'BadDigest'],
    ['x-amz-checksum-crc32', 'nonsense', 'InvalidRequest'],
    ['content-md5', 'AAAAAAAAAAAAAAAAAAAAAA==', 'BadDigest'],
    ['content-md5', 'nonsense', 'InvalidDigest'],
    ['x-amz-content-sha256', '0'.repeat(64), 'XAmzContentSHA256Mismatch'],
    ['x-amz-checksum-sha512', 'AAAA', 'NotImplemented'],
  ])('that are wrong (%s: %s) store nothing and say %s', async (header, value, code) => {
    await put('kept', 'kept');
    const body = 'something else';
    const answer = await send(
      'PUT',
      `/${PLAIN}/kept`,
      { [header]: value, 'content-length': body.length },
      body,
    );
    expect(answer.body).toContain(`<Code>${code}</Code>`);
    expect(await text('kept')).toBe('kept');
  });
});

describe('aws-chunked bodies', () => {
  const chunked = (framing: string, length: number, more: Record<string, string> = {}) =>
    send(
      'PUT',
      `/${PLAIN}/framed`,
      {
        'content-encoding': 'gzip,aws-chunked',
        'x-amz-content-sha256': 'STREAMING-UNSIGNED-PAYLOAD-TRAILER',
        'x-amz-decoded-content-length': length,
        'content-length': framing.length,
        ...more,
      },
      framing,
    );
  const crc = base64Crc32(Buffer.from('hello world'));
  const trailer = { 'x-amz-trailer': 'x-amz-checksum-crc32' };

  it('are stored without their framing, with their own content encoding', async () => {
    const framing = `5\r\nhello\r\n6\r\n world\r\n0\r\nx-amz-checksum-crc32:${crc}\r\n\r\n`;
    expect((await chunked(framing, 11, trailer)).status).toBe(200);
    expect(await text('framed')).toBe('hello world');
    expect((await get('framed')).ContentEncoding).toBe('gzip');
  });

  it('may have signed chunks', async () => {
    const signature = `;chunk-signature=${'0'.repeat(64)}`;
    const framing = `b${signature}\r\nhello world\r\n0${signature}\r\n\r\n`;
    const more = { 'x-amz-content-sha256': 'STREAMING-AWS4-HMAC-SHA256-PAYLOAD' };
    expect((await chunked(framing, 11, more)).status).toBe(200);
    expect(await text('framed')).toBe('hello world');
  });

  it.each([
    [
      'a wrong checksum in the trailer',
      '5\r\nhellO\r\n6\r\n world\r\n0\r\nx-amz-checksum-crc32:CRC\r\n\r\n',
      'BadDigest',
    ],
    ['no trailer where one was announced', '5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n', 'MalformedTrailer'],
    ['fewer bytes than announced', '5\r\nhello\r\n0\r\nx-amz-checksum-crc32:CRC\r\n\r\n', 'IncompleteBody'],
    ['an end in the middle of a chunk', '5\r\nhello\r\n6\r\n wo', 'IncompleteBody'],
    ['no framing at all', 'hello world', 'IncompleteBody'],
    ['a chunk longer than its size', '4\r\nhello\r\n0\r\n\r\n', 'IncompleteBody'],
  ])('with %s store nothing', async (_, framing, code) => {
    await put('framed', 'before');
    const answer = await chunked(framing.replace('CRC', crc), 11, trailer);
    expect(answer.status).toBe(400);
    expect(answer.body).toContain(`<Code>${code}</Code>`);
    expect(await text('framed')).toBe('before');
  });

  it('are read the same however the network cuts them', async () => {
    const whole = Buffer.from(`5\r\nhello\r\n6\r\n world\r\n0\r\nx-amz-checksum-crc32:${crc}\r\n\r\n`);
    await fc.assert(
      fc.asyncProperty(fc.array(fc.integer({ min: 0, max: whole.length })), async (cuts) => {
        const ends = [...cuts.sort((a, b) => a - b), whole.length];
        const pieces = ends.map((end, i) => whole.subarray(ends[i - 1] ?? 0, end));
        const body = new ChunkedBody(Readable.from(pieces));
        const got: Buffer[] = [];
        for await (const bytes of body) got.push(bytes);
        expect(Buffer.concat(got).toString()).toBe('hello world');
        expect(body.trailers.get('x-amz-checksum-crc32')).toBe(crc);
      }),
    );
  });
});

describe('copies', () => {
  const copy = (Key: string, CopySource: string, more: object = {}) =>
    client.send(new CopyObjectCommand({ Bucket: PLAIN, Key, CopySource, ...more }));

  it('keep metadata and tags unless they are replaced', async () => {
    await put('origin', 'bytes', { Metadata: { a: '1' }, Tagging: 'a=1', ContentType: 'text/plain' });
    await copy('same', `${PLAIN}/origin`);
    expect(await get('same')).toMatchObject({ Metadata: { a: '1' }, TagCount: 1, ContentType: 'text/plain' });
    await copy('other', `${PLAIN}/origin`, {
      MetadataDirective: 'REPLACE',
      Metadata: { b: '2' },
      TaggingDirective: 'REPLACE',
      Tagging: 'b=2&c=3',
    });
    expect(await get('other')).toMatchObject({ Metadata: { b: '2' }, TagCount: 2 });
    expect(await text('other')).toBe('bytes');
  });

  it('outlive their source', async () => {
    await put('mortal', 'bytes');
    await copy('heir', `${PLAIN}/mortal`);
    await client.send(new DeleteObjectCommand({ Bucket: PLAIN, Key: 'mortal' }));
    expect(await text('heir')).toBe('bytes');
  });

  it('ask for the source as it was seen', async () => {
    const { ETag } = await put('seen', 'bytes');
    const { CopyObjectResult } = await copy('seen-copy', `${PLAIN}/seen`, { CopySourceIfMatch: ETag });
    expect(CopyObjectResult?.ETag).toBe(ETag);
    const past = new Date(Date.now() - 3_600_000);
    for (const condition of [
      { CopySourceIfMatch: '"0"' },
      { CopySourceIfNoneMatch: ETag },
      { CopySourceIfUnmodifiedSince: past },
    ])
      expect(await refusal(copy('seen-copy', `${PLAIN}/seen`, condition))).toEqual([
        'PreconditionFailed',
        412,
      ]);
  });

  it('get the checksum that is asked for', async () => {
    await put('to-sum', 'bytes');
    const { CopyObjectResult } = await copy('summed-copy', `${PLAIN}/to-sum`, {
      ChecksumAlgorithm: 'SHA256',
    });
    expect(CopyObjectResult?.ChecksumSHA256).toBe(createHash('sha256').update('bytes').digest('base64'));
    expect((await get('summed-copy', { ChecksumMode: 'ENABLED' })).ChecksumSHA256).toBeTruthy();
  });

  it('onto themselves must change something', async () => {
    await put('self', 'bytes');
    expect(await refusal(copy('self', `${PLAIN}/self`))).toEqual(['InvalidRequest', 400]);
    await copy('self', `${PLAIN}/self`, { MetadataDirective: 'REPLACE', Metadata: { new: 'yes' } });
    expect(await get('self')).toMatchObject({ Metadata: { new: 'yes' } });
    expect(await text('self')).toBe('bytes');
  });

  it('of a version take that version', async () => {
    const { VersionId } = await put('aged', 'old', {}, VERSIONED);
    await put('aged', 'new', {}, VERSIONED);
    const { CopySourceVersionId } = await copy('young', `${VERSIONED}/aged?versionId=${VersionId}`);
    expect(CopySourceVersionId).toBe(VersionId);
    expect(await text('young')).toBe('old');
  });
});

describe('versions', () => {
  const Bucket = VERSIONED;

  it('are kept, read, hidden by delete markers and removed for good', async () => {
    const Key = 'history';
    const first = await put(Key, 'first', {}, Bucket);
    const second = await put(Key, 'second', {}, Bucket);
    expect(first.VersionId).not.toBe(second.VersionId);
    expect(await text(Key, {}, Bucket)).toBe('second');
    expect(await text(Key, { VersionId: first.VersionId }, Bucket)).toBe('first');

    const marker = await client.send(new DeleteObjectCommand({ Bucket, Key }));
    expect(marker).toMatchObject({ DeleteMarker: true });
    expect(await refusal(get(Key, {}, Bucket))).toEqual(['NoSuchKey', 404]);
    expect(await refusal(get(Key, { VersionId: marker.VersionId }, Bucket))).toEqual([
      'MethodNotAllowed',
      405,
    ]);
    expect(await text(Key, { VersionId: second.VersionId }, Bucket)).toBe('second');

    await client.send(new DeleteObjectCommand({ Bucket, Key, VersionId: marker.VersionId }));
    expect(await text(Key, {}, Bucket)).toBe('second');
    await client.send(new DeleteObjectCommand({ Bucket, Key, VersionId: second.VersionId }));
    expect(await text(Key, {}, Bucket)).toBe('first');
    expect(await refusal(get(Key, { VersionId: second.VersionId }, Bucket))).toEqual(['NoSuchVersion', 404]);
  });

  it('are null while versioning is suspended, and absent where it never was', async () => {
    const name = 'suspended-bucket';
    await client.send(new CreateBucketCommand({ Bucket: name }));
    const versioning = async (Status: 'Enabled' | 'Suspended') => {
      await client.send(
        new PutBucketVersioningCommand({ Bucket: name, VersioningConfiguration: { Status } }),
      );
      expect((await client.send(new GetBucketVersioningCommand({ Bucket: name }))).Status).toBe(Status);
    };
    expect((await put('x', 'plain', {}, name)).VersionId).toBeUndefined();
    await versioning('Enabled');
    const real = await put('x', 'versioned', {}, name);
    expect(await text('x', { VersionId: 'null' }, name)).toBe('plain');
    await versioning('Suspended');
    expect((await put('x', 'suspended', {}, name)).VersionId).toBe('null');
    expect(await text('x', { VersionId: 'null' }, name)).toBe('suspended');
    expect(await text('x', { VersionId: real.VersionId }, name)).toBe('versioned');
    const { Versions } = await client.send(new ListObjectVersionsCommand({ Bucket: name }));
    expect(Versions?.map(({ VersionId, IsLatest }) => [VersionId, IsLatest])).toEqual([
      ['null', true],
      [real.VersionId, false],
    ]);
  });

  it('are deleted many at a time, each with its own outcome', async () => {
    await put('many/a', 'a', {}, Bucket);
    const { VersionId } = await put('many/b', 'b', {}, Bucket);
    s3.denied.add('s3:DeleteObjectVersion');
    const { Deleted, Errors } = await client.send(
      new DeleteObjectsCommand({
        Bucket,
        Delete: { Objects: [{ Key: 'many/a' }, { Key: 'many/b', VersionId }, { Key: 'many/<none>&\r\n' }] },
      }),
    );
    s3.denied.clear();
    expect(Deleted?.map(({ Key, DeleteMarker }) => [Key, DeleteMarker])).toEqual([
      ['many/a', true],
      ['many/<none>&\r\n', true],
    ]);
    expect(Errors).toMatchObject([{ Key: 'many/b', VersionId, Code: 'AccessDenied' }]);
    expect(await text('many/b', {}, Bucket)).toBe('b');
  });
});

describe('authorisation', () => {
  async function asks(request: Promise<unknown>): Promise<string[]> {
    s3.asked.length = 0;
    await request;
    return [...s3.asked];
  }

  it('asks for the actions that IAM knows', async () => {
    const object = `arn:aws:s3:::${VERSIONED}/asked`;
    const where = { Bucket: VERSIONED, Key: 'asked' };
    let VersionId: string | undefined;
    const putting = put('asked', 'x', { Tagging: 'a=1' }, VERSIONED).then((made) => {
      VersionId = made.VersionId;
    });
    expect(await asks(putting)).toEqual([`s3:PutObject ${object}`, `s3:PutObjectTagging ${object}`]);
    expect(await asks(client.send(new HeadObjectCommand(where)))).toEqual([`s3:GetObject ${object}`]);
    expect(await asks(get('asked', { VersionId }, VERSIONED))).toEqual([`s3:GetObjectVersion ${object}`]);
    expect(await asks(client.send(new ListObjectVersionsCommand({ Bucket: VERSIONED })))).toEqual([
      `s3:ListBucketVersions arn:aws:s3:::${VERSIONED}`,
    ]);
    const copy = new CopyObjectCommand({ Bucket: PLAIN, Key: 'copied', CopySource: `${VERSIONED}/asked` });
    expect(await asks(client.send(copy))).toEqual([
      `s3:PutObject arn:aws:s3:::${PLAIN}/copied`,
      `s3:GetObject ${object}`,
      `s3:GetObjectTagging ${object}`,
      `s3:PutObjectTagging arn:aws:s3:::${PLAIN}/copied`,
    ]);
    expect(await asks(client.send(new DeleteObjectCommand(where)))).toEqual([`s3:DeleteObject ${object}`]);
  });

  it('refuses with AccessDenied, and hides what may not be listed', async () => {
    s3.denied.add('s3:PutObject').add('s3:ListBucket');
    const refused = await refusal(put('denied', randomBytes(4_000_000)));
    const hidden = await refusal(get('no-such-key-here'));
    s3.denied.clear();
    expect(refused).toEqual(['AccessDenied', 403]);
    expect(hidden).toEqual(['AccessDenied', 403]);
    expect(await refusal(get('denied'))).toEqual(['NoSuchKey', 404]);
  });
});

describe('events', () => {
  it('tell of every object created in a bucket that announces them, and of no other', async () => {
    s3.events.length = 0;
    const made = await put('announced', 'hello', {}, VERSIONED);
    await client.send(
      new CopyObjectCommand({
        Bucket: VERSIONED,
        Key: 'announced-copy',
        CopySource: `${VERSIONED}/announced`,
      }),
    );
    await put('silent', 'x');
    await expect.poll(() => s3.events.length).toBe(2);
    const [first, second] = s3.events;
    expect(first).toEqual({
      bucket: VERSIONED,
      key: 'announced',
      size: 5,
      etag: made.ETag?.replaceAll('"', ''),
      versionId: made.VersionId,
      sequencer: expect.stringMatching(/^[0-9A-F]{16}$/),
      reason: 'PutObject',
      requester: 'arn:aws:iam::000000000000:role/test',
    });
    expect(second).toMatchObject({ key: 'announced-copy', reason: 'CopyObject' });
    expect(String(second?.sequencer) > String(first?.sequencer)).toBe(true);
  });
});
