import { createHash } from 'node:crypto';
import {
  CreateBucketCommand,
  GetObjectTaggingCommand,
  HeadObjectCommand,
  ListMultipartUploadsCommand,
  ListObjectsV2Command,
  PutObjectCommand,
} from '@aws-sdk/client-s3';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { PlannedSlide } from '../../core/contracts.ts';
import { bronzeName, ingestSlide } from '../../core/ingest.ts';
import { LandingListing } from '../../core/landing.ts';
import { parseManifest } from '../../core/manifest.ts';
import { planSlides, resolveModels } from '../../core/plan.ts';
import { readBytes } from '../../core/store.ts';
import { MODEL, RUN } from '../support/results.ts';
import { type Services, startServices } from '../support/services.ts';

const MiB = 2 ** 20;
const run = { ...RUN, study: 'study & co', defaultModel: MODEL.name };
let services: Services;

beforeAll(async () => {
  services = await startServices();
  for (const bucket of ['landing', 'bronze'])
    await services.s3.send(new CreateBucketCommand({ Bucket: bucket }));
});
afterAll(() => services.close());

const put = (path: string, body: string | Buffer) =>
  services.s3.send(
    new PutObjectCommand({
      Bucket: 'landing',
      Key: `${run.study}/${path}`,
      Body: body,
      Metadata: { scanner: 'a1' },
      ChecksumAlgorithm: 'CRC64NVME',
    }),
  );

async function plan(manifest: string): Promise<PlannedSlide[]> {
  const rows = parseManifest(Buffer.from(manifest));
  const resolved = { bucket: 'm', key: 'k', name: MODEL.name, version: '1', digest: 'd', model: MODEL };
  const landing = await LandingListing.read(services.s3, 'landing', run.study);
  return planSlides(rows, run, landing, await resolveModels(rows, run, async () => resolved));
}

const ingest = (slide: PlannedSlide, limits?: { copyObjectLimit: number; partSize: number }) =>
  ingestSlide(run, slide, {
    ...services,
    bronzeBucket: 'bronze',
    requests: () => ({ s3Put: 1 }),
    ...(limits && { limits }),
  });

const only = async (manifest: string) => {
  const [slide] = await plan(manifest);
  if (!slide) throw new Error('no slide');
  return slide;
};

describe('a slide is taken in', () => {
  it('byte for byte, with tags, metadata and checksum, and once', async () => {
    const body = Buffer.from('not really a slide');
    await put('a b/x+1.svs', body);
    const slide = await only('slide,slide_id\na b/x+1.svs,S 1\n');
    expect(await ingest(slide)).toEqual({ slideId: 'S 1', state: 'INGESTED' });

    const key = 'slides/study & co/S 1/S-1.svs';
    expect(await readBytes(services.s3, { bucket: 'bronze', key })).toEqual(body);
    const { TagSet } = await services.s3.send(new GetObjectTaggingCommand({ Bucket: 'bronze', Key: key }));
    expect(Object.fromEntries((TagSet ?? []).map((tag) => [tag.Key, tag.Value]))).toEqual({
      run: run.runId,
      slide: 'S 1',
      study: 'study _ co',
    });
    const there = await services.s3.send(
      new HeadObjectCommand({ Bucket: 'bronze', Key: key, ChecksumMode: 'ENABLED' }),
    );
    expect(there.Metadata).toEqual({ scanner: 'a1' });
    const item = await services.state.slide(run.runId, 'S 1');
    expect(item?.bronze).toMatchObject({
      key,
      size: body.length,
      checksum: `crc64nvme:${there.ChecksumCRC64NVME}`,
    });

    expect(await ingest(slide)).toEqual({ slideId: 'S 1', state: 'INGESTED' });
    const again = await services.s3.send(new HeadObjectCommand({ Bucket: 'bronze', Key: key }));
    expect(again.LastModified).toEqual(there.LastModified);
  });

  it('in parts when it is large, with the checksum of a plain upload', async () => {
    const body = Buffer.alloc(12 * MiB + 1, 'slide');
    await put('big.svs', body);
    const slide = await only('slide,slide_id\nbig.svs,big\n');
    await ingest(slide, { copyObjectLimit: 10 * MiB, partSize: 5 * MiB });
    const [source, target] = await Promise.all(
      [
        { Bucket: 'landing', Key: `${run.study}/big.svs` },
        { Bucket: 'bronze', Key: 'slides/study & co/big/big.svs' },
      ].map((where) => services.s3.send(new HeadObjectCommand({ ...where, ChecksumMode: 'ENABLED' }))),
    );
    expect(target?.ETag).toMatch(/-3"$/);
    expect(target?.ChecksumCRC64NVME).toBe(source?.ChecksumCRC64NVME);
    expect(target?.Metadata).toEqual({ scanner: 'a1' });
  });

  it('with all its files', async () => {
    await put('series/1.dcm', 'one');
    await put('series/2.dcm', 'two');
    const slide = await only('slide,slide_id\nseries,D1\n');
    expect(await ingest(slide)).toMatchObject({ state: 'INGESTED' });
    const { bronze } = (await services.state.slide(run.runId, 'D1')) ?? {};
    expect(bronze?.files.map(({ key }) => key)).toEqual([
      'slides/study & co/D1/D1/1.dcm',
      'slides/study & co/D1/D1/2.dcm',
    ]);
    const lines = bronze?.files.map(({ key, checksum }) => `D1/${key.at(-5)}.dcm ${checksum}\n`).join('');
    expect(bronze?.checksum).toBe(
      `sha256:${createHash('sha256')
        .update(lines ?? '')
        .digest('hex')}`,
    );
  });
});

describe('a slide of very many files', () => {
  const folder = async (name: string, files: number) => {
    for (let from = 0; from < files; from += 50)
      await Promise.all(
        Array.from({ length: Math.min(50, files - from) }, (_, i) =>
          put(`${name}/1.2.840.113619.2.55.3.604688119.${1_000_000 + from + i}.dcm`, 'x'),
        ),
      );
  };

  it('is on record with all of them', { timeout: 60_000 }, async () => {
    await folder('many', 500);
    const slide = await only('slide,slide_id\nmany,many\n');
    expect(await ingest(slide)).toMatchObject({ state: 'INGESTED' });
    const { bronze } = (await services.state.slide(run.runId, 'many')) ?? {};
    expect(bronze?.files).toHaveLength(500);
  });

  it('is set aside where they are more than a record holds', { timeout: 60_000 }, async () => {
    await folder('too-many', 700);
    expect(await only('slide,slide_id\ntoo-many,too-many\n')).toMatchObject({
      state: 'QUARANTINED',
      reason: { error: 'SlideTooManyFiles', message: expect.stringContaining('700 files') },
    });
  });
});

describe('a slide is set aside with its reason', () => {
  it('when its file changed after the plan', async () => {
    await put('late.svs', 'half');
    const slide = await only('slide,slide_id\nlate.svs,late\n');
    await put('late.svs', 'half and the rest');
    expect(await ingest(slide)).toEqual({ slideId: 'late', state: 'QUARANTINED' });
    expect((await services.state.slide(run.runId, 'late'))?.reason?.error).toBe('SlideChanged');
  });

  it('and stays aside, whatever an invocation finds that is made because nobody heard of the first', async () => {
    await put('once.svs', 'half');
    const slide = await only('slide,slide_id\nonce.svs,once\n');
    await put('once.svs', 'half and the rest');
    await ingest(slide);
    await put('once.svs', 'half');
    expect(await ingest(slide)).toEqual({ slideId: 'once', state: 'QUARANTINED' });
    const { KeyCount } = await services.s3.send(
      new ListObjectsV2Command({ Bucket: 'bronze', Prefix: 'slides/study & co/once/' }),
    );
    expect(KeyCount).toBe(0);
  });

  it('when a file of several came or went after the plan', async () => {
    await put('grow/1.dcm', 'one');
    const slide = await only('slide,slide_id\ngrow,grow\n');
    await put('grow/2.dcm', 'two');
    await ingest(slide);
    expect((await services.state.slide(run.runId, 'grow'))?.reason?.error).toBe('SlideChanged');
  });

  it('when Bronze holds other content under its name, which stays', async () => {
    await put('y.svs', 'first');
    await ingest(await only('slide,slide_id\ny.svs,Y\n'));
    await put('y.svs', 'other');
    const other = { ...run, runId: 'other-run' };
    await ingestSlide(other, await only('slide,slide_id\ny.svs,Y\n'), {
      ...services,
      bronzeBucket: 'bronze',
      requests: () => ({}),
    });
    expect(await services.state.slide('other-run', 'Y')).toMatchObject({
      state: 'QUARANTINED',
      reason: { error: 'NameTaken' },
    });
    const kept = await readBytes(services.s3, { bucket: 'bronze', key: 'slides/study & co/Y/Y.svs' });
    expect(Buffer.from(kept ?? []).toString()).toBe('first');
  });

  it('and nothing half done is left', async () => {
    await put('torn.svs', Buffer.alloc(11 * MiB));
    const slide = await only('slide,slide_id\ntorn.svs,torn\n');
    // The source changes while its parts are copied: every request after the first part meets another ETag.
    let changed = false;
    services.s3.middlewareStack.add(
      (next, context) => async (args) => {
        if (context.commandName === 'UploadPartCopyCommand' && !changed) {
          changed = true;
          await put('torn.svs', Buffer.alloc(11 * MiB, 1));
        }
        return next(args);
      },
      { step: 'initialize', name: 'change' },
    );
    await ingest(slide, { copyObjectLimit: 1, partSize: 5 * MiB });
    services.s3.middlewareStack.remove('change');
    expect((await services.state.slide(run.runId, 'torn'))?.reason?.error).toBe('SlideChanged');
    const { Uploads } = await services.s3.send(new ListMultipartUploadsCommand({ Bucket: 'bronze' }));
    expect(Uploads ?? []).toEqual([]);
    const { KeyCount } = await services.s3.send(
      new ListObjectsV2Command({ Bucket: 'bronze', Prefix: 'slides/study & co/torn/' }),
    );
    expect(KeyCount).toBe(0);
  });
});

it('companions keep their places beside the renamed file', () => {
  const source = { bucket: 'b', files: 2, size: 2 };
  const mrxs = { ...source, kind: 'mrxs' as const, key: 's/x.mrxs', folder: 's/x/' };
  expect(bronzeName(mrxs, 'y.mrxs', 's/x.mrxs')).toBe('y.mrxs');
  expect(bronzeName(mrxs, 'y.mrxs', 's/x/sub/Data.dat')).toBe('y/sub/Data.dat');
  const vsi = { ...source, kind: 'vsi' as const, key: 's/x.vsi', folder: 's/_x_/' };
  expect(bronzeName(vsi, 'y.vsi', 's/_x_/stack1/frame.ets')).toBe('_y_/stack1/frame.ets');
});
