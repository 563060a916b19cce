/** Names and duplicates, as ingestion decides them: on the local S3 and tables. */
import {
  DeleteObjectCommand,
  ListObjectsV2Command,
  ListObjectVersionsCommand,
  PutObjectCommand,
} from '@aws-sdk/client-s3';
import { QueryCommand } from '@aws-sdk/lib-dynamodb';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { Continuation, DuplicatePolicy, PlannedSlide, RunContext } from '../../core/contracts.ts';
import { type Ingested, ingestSlide } from '../../core/ingest.ts';
import { LandingListing } from '../../core/landing.ts';
import { parseManifest } from '../../core/manifest.ts';
import { parseNameTemplate } from '../../core/names.ts';
import { planSlides, resolveModels } from '../../core/plan.ts';
import { readBytes } from '../../core/store.ts';
import { MODEL, RUN } from '../support/results.ts';
import { type Services, startServices } from '../support/services.ts';

let services: Services;
beforeAll(async () => {
  services = await startServices();
  await services.createBucket('landing');
  await services.createBucket('bronze');
});
afterAll(() => services.close());

let runs = 0;
const newRun = (study: string): RunContext => ({
  ...RUN,
  runId: `run-${++runs}`,
  study,
  defaultModel: MODEL.name,
});

const put = (key: string, body: string | Buffer, more: object = {}) =>
  services.s3.send(
    new PutObjectCommand({
      Bucket: 'landing',
      Key: key,
      Body: body,
      ChecksumAlgorithm: 'CRC64NVME',
      ...more,
    }),
  );

async function plan(run: RunContext, manifest: string, template?: string): Promise<PlannedSlide[]> {
  const rows = parseManifest(Buffer.from(manifest));
  const resolved = { bucket: 'm', key: 'k', name: MODEL.name, version: '1', digest: 'd', model: MODEL };
  const landing = await LandingListing.read(services.s3, 'landing', run.study);
  const models = await resolveModels(rows, run, async () => resolved);
  const names = template === undefined ? undefined : parseNameTemplate(template);
  return planSlides(rows, run, landing, models, undefined, undefined, names);
}

const ingest = (
  run: RunContext,
  slide: PlannedSlide | undefined,
  duplicates: DuplicatePolicy = 'skip',
  more: Partial<Parameters<typeof ingestSlide>[2]> = {},
  before?: Continuation,
): Promise<Ingested> => {
  if (!slide) throw new Error('no slide');
  return ingestSlide(
    run,
    slide,
    { ...services, bronzeBucket: 'bronze', requests: () => ({}), ...more, duplicates },
    before,
  );
};

/** A whole run of one slide. */
async function take(study: string, manifest: string, duplicates: DuplicatePolicy = 'skip') {
  const run = newRun(study);
  const [slide] = await plan(run, manifest);
  const { slideId, state } = await ingest(run, slide, duplicates);
  const item = await services.state.slide(run.runId, slideId);
  return { run, state, item, error: item?.reason?.error };
}

async function keysOf(prefix: string): Promise<string[]> {
  const { Contents = [] } = await services.s3.send(
    new ListObjectsV2Command({ Bucket: 'bronze', Prefix: `slides/${prefix}` }),
  );
  return Contents.map(({ Key = '' }) => Key.slice('slides/'.length));
}

describe('content that Bronze has already', () => {
  /** How S3 tells of it: with its own CRC64NVME, or with no checksum but the ETag. */
  const tellings = [
    ['by CRC64NVME', { ChecksumAlgorithm: 'CRC64NVME' }],
    ['by ETag', { ChecksumAlgorithm: 'CRC32' }],
  ] as const;

  describe.each(tellings)('known %s', (telling, algorithm) => {
    const study = `seen ${telling}`;
    const body = `content ${telling}`;

    it.each([
      ['skip', 'INGESTED', undefined],
      ['replace', 'INGESTED', undefined],
      ['error', 'QUARANTINED', 'ContentSeen'],
    ] as const)('under %s is %s for another slide', async (policy, state, error) => {
      await put(`${study}/${policy}/a.svs`, `${body} ${policy}`, algorithm);
      await put(`${study} elsewhere/${policy}/b.svs`, `${body} ${policy}`, algorithm);
      const first = await take(study, `slide,slide_id\n${policy}/a.svs,A-${policy}\n`, policy);
      expect(first.state).toBe('INGESTED');
      const second = await take(
        `${study} elsewhere`,
        `slide,slide_id\n${policy}/b.svs,B-${policy}\n`,
        policy,
      );
      expect([second.state, second.error]).toEqual([state, error]);
      expect(await keysOf(`${study} elsewhere/B-${policy}/`)).toEqual([]);
      if (state !== 'INGESTED') return;
      expect(second.item?.bronze).toEqual(first.item?.bronze);
      expect(second.item?.duplicateOf).toEqual({ runId: first.run.runId, study, slideId: `A-${policy}` });
    });

    it.each(['skip', 'replace', 'error'] as const)('under %s is used for the same slide', async (policy) => {
      await put(`again ${study}/${policy}.svs`, `${body} again ${policy}`, algorithm);
      const manifest = `slide,slide_id\n${policy}.svs,S-${policy}\n`;
      const first = await take(`again ${study}`, manifest, policy);
      const second = await take(`again ${study}`, manifest, policy);
      expect(second).toMatchObject({ state: 'INGESTED', item: { bronze: first.item?.bronze } });
      expect(second.item?.duplicateOf).toBeUndefined();
      expect(await keysOf(`again ${study}/S-${policy}/`)).toHaveLength(1);
    });
  });

  it('found out only after the copy, is the first one’s all the same', async () => {
    // Uploaded in other ways: nothing that S3 says of the two is the same.
    await put('late seen/a.svs', 'told apart by nothing', { ChecksumAlgorithm: 'CRC32' });
    const first = await take('late seen', 'slide,slide_id\na.svs,A\n');
    await put('late seen/b.svs', 'told apart by nothing', { ChecksumAlgorithm: 'CRC32' });
    const run = newRun('late seen');
    const [slide] = await plan(run, 'slide,slide_id\nb.svs,B\n');
    services.s3.middlewareStack.add(
      (next) => async (args) => {
        const answer = await next(args);
        const { output } = answer as { output: { ETag?: string } };
        const { Bucket, Key } = args.input as { Bucket?: string; Key?: string };
        if (Bucket === 'landing' && Key === 'late seen/b.svs' && output.ETag) output.ETag = '"another-2"';
        return answer;
      },
      { step: 'initialize', name: 'otherwise' },
    );
    // The copy must not be pinned to an ETag that the service does not know.
    services.s3.middlewareStack.add(
      (next) => async (args) => {
        const input = args.input as { CopySourceIfMatch?: string };
        if (input.CopySourceIfMatch === '"another-2"') delete input.CopySourceIfMatch;
        return next(args);
      },
      { step: 'initialize', name: 'unpinned' },
    );
    const planned = { ...slide, source: { ...slide?.source, etag: '"another-2"' } } as PlannedSlide;
    await ingest(run, planned);
    for (const name of ['otherwise', 'unpinned']) services.s3.middlewareStack.remove(name);
    expect(await services.state.slide(run.runId, 'B')).toMatchObject({
      state: 'INGESTED',
      bronze: first.item?.bronze,
      duplicateOf: { slideId: 'A' },
    });
  });

  it('of several files is known by all of them, under any name', async () => {
    for (const study of ['many', 'many more']) {
      await put(`${study}/x-${study}.mrxs`, 'main');
      await put(`${study}/x-${study}/Data.dat`, 'data');
      await put(`${study}/x-${study}/sub/Index.dat`, 'index');
    }
    const first = await take('many', 'slide,slide_id\nx-many.mrxs,A\n');
    expect(first.item?.bronze?.files).toHaveLength(3);
    expect(await keysOf('many/A/')).toEqual(['many/A/A.mrxs', 'many/A/A/Data.dat', 'many/A/A/sub/Index.dat']);
    const second = await take('many more', 'slide,slide_id\nx-many more.mrxs,B\n');
    expect(second.item).toMatchObject({ bronze: first.item?.bronze, duplicateOf: { slideId: 'A' } });
    await put('many more/x-many more/sub/Index.dat', 'other');
    const third = await take('many more', 'slide,slide_id\nx-many more.mrxs,C\n');
    expect(third.item?.duplicateOf).toBeUndefined();
  });

  it('is copied again when Bronze has lost it', async () => {
    await put('lost/x.svs', 'to be lost');
    const first = await take('lost', 'slide,slide_id\nx.svs,X\n');
    const [file] = first.item?.bronze?.files ?? [];
    await services.s3.send(
      new DeleteObjectCommand({ Bucket: 'bronze', Key: file?.key, VersionId: file?.versionId }),
    );
    const second = await take('lost', 'slide,slide_id\nx.svs,X\n');
    expect(second.state).toBe('INGESTED');
    expect(await readBytes(services.s3, { bucket: 'bronze', key: file?.key ?? '' })).toEqual(
      Buffer.from('to be lost'),
    );
  });
});

describe('one content twice in a run', () => {
  it.each([1, 5])('is done once, whoever is first (%d)', async (round) => {
    const study = `twins ${round}`;
    const names = ['a', 'b', 'c', 'd'];
    for (const name of names) await put(`${study}/${name}.svs`, `the same in ${study}`);
    const run = newRun(study);
    const slides = await plan(
      run,
      `slide,slide_id\n${names.map((name) => `${name}.svs,${name}`).join('\n')}\n`,
    );
    const ends = await Promise.all(slides.map((slide) => ingest(run, slide)));
    expect(ends.map(({ state }) => state).sort()).toEqual([
      'DUPLICATE',
      'DUPLICATE',
      'DUPLICATE',
      'INGESTED',
    ]);
    const done = ends.find(({ state }) => state === 'INGESTED')?.slideId;
    const keys = await Promise.all(names.map((name) => keysOf(`${study}/${name}/`)));
    expect(keys.flat()).toHaveLength(1);
    for (const { slideId, state } of ends) {
      if (state !== 'DUPLICATE') continue;
      const item = await services.state.slide(run.runId, slideId);
      expect(item?.reason).toMatchObject({
        error: 'SlideDuplicate',
        message: expect.stringContaining(`slide ${done} `),
      });
    }
    const again = await Promise.all(slides.map((slide) => ingest(run, slide)));
    expect(again).toEqual(ends);
  });

  it('is done for each that asks for something else', async () => {
    await put('asks/a.svs', 'asked twice');
    await put('asks/b.svs', 'asked twice');
    const run = newRun('asks');
    const slides = await plan(run, 'slide,slide_id,mpp\na.svs,a,0.25\nb.svs,b,0.5\n');
    const ends = await Promise.all(slides.map((slide) => ingest(run, slide)));
    expect(ends.map(({ state }) => state)).toEqual(['INGESTED', 'INGESTED']);
    expect((await Promise.all(['asks/a/', 'asks/b/'].map(keysOf))).flat()).toHaveLength(1);
  });

  it('is brought by the other one when the first is given up', async () => {
    await put('given up/a.svs', 'given up');
    await put('given up/b.svs', 'given up');
    const run = newRun('given up');
    const [a, b] = await plan(run, 'slide,slide_id\na.svs,a\nb.svs,b\n');
    const busy = await ingest(run, a, 'skip', { timeLeft: () => 0 });
    expect(busy.continue?.round).toBe(1);
    const waiting = await ingest(run, b, 'skip', { timeLeft: () => 46_000 });
    expect(waiting.continue).toBeDefined();
    await services.state.transition(run.runId, 'a', 'FAILED', { reason: { error: 'X', message: 'x' } });
    expect(await ingest(run, b, 'skip', {}, waiting.continue)).toEqual({ slideId: 'b', state: 'INGESTED' });
  });
});

describe('other content under a slide id', () => {
  describe.each(['CRC64NVME', 'CRC32'] as const)('with %s', (ChecksumAlgorithm) => {
    it.each([
      ['skip', 'QUARANTINED', 'NameTaken', 1],
      ['error', 'QUARANTINED', 'NameTaken', 1],
      ['replace', 'INGESTED', undefined, 2],
    ] as const)('under %s is %s', async (policy, state, error, versions) => {
      const study = `changed ${policy} ${ChecksumAlgorithm}`;
      const manifest = 'slide,slide_id\nx.svs,S\n';
      await put(`${study}/x.svs`, `first of ${study}`, { ChecksumAlgorithm });
      const first = await take(study, manifest, policy);
      await put(`${study}/x.svs`, `other of ${study}`, { ChecksumAlgorithm });
      const second = await take(study, manifest, policy);
      expect([second.state, second.error]).toEqual([state, error]);
      const { Versions = [] } = await services.s3.send(
        new ListObjectVersionsCommand({ Bucket: 'bronze', Prefix: `slides/${study}/` }),
      );
      expect(Versions).toHaveLength(versions);
      const kept = await readBytes(services.s3, {
        bucket: 'bronze',
        ...first.item?.bronze?.files[0],
      } as never);
      expect(Buffer.from(kept ?? []).toString()).toBe(`first of ${study}`);
      if (policy === 'replace') expect(second.item?.bronze?.key).toBe(first.item?.bronze?.key);
    });
  });
});

describe('a name', () => {
  it('that another slide of the study has gives way to the slide id, with the reason', async () => {
    const run = newRun('names');
    await put('names/a.svs', 'a');
    await put('names/b.svs', 'b');
    const slides = await plan(run, 'slide,slide_id,case_id\na.svs,A,C7\nb.svs,B,c7\n', '{case_id}');
    for (const slide of slides) expect((await ingest(run, slide)).state).toBe('INGESTED');
    expect(await keysOf('names/')).toEqual(['names/A/C7.svs', 'names/B/B.svs']);
    expect((await services.state.slide(run.runId, 'A'))?.name).toEqual({ name: 'C7.svs' });
    expect((await services.state.slide(run.runId, 'B'))?.name).toEqual({
      name: 'B.svs',
      wanted: 'c7.svs',
      reason: { error: 'NameTaken', message: expect.stringContaining('c7.svs') },
    });
    const { Items = [] } = await services.documents.send(
      new QueryCommand({
        TableName: 'lineage',
        KeyConditionExpression: 'pk = :pk',
        ExpressionAttributeValues: { ':pk': 'SLIDE#B' },
      }),
    );
    expect(Items.at(-1)?.parameters.name).toMatchObject({ name: 'B.svs', reason: { error: 'NameTaken' } });
  });

  it('that S3 refuses does so too', async () => {
    const run = newRun('refused');
    await put('refused/a.svs', 'refused by name');
    const [slide] = await plan(run, 'slide,slide_id,case_id\na.svs,A,C7\n');
    services.s3.middlewareStack.add(
      (next, { commandName }) =>
        async (args) => {
          const { Key } = args.input as { Key?: string };
          if (commandName === 'CopyObjectCommand' && Key?.endsWith('C7_A.svs'))
            throw Object.assign(new Error('too long'), { name: 'KeyTooLongError' });
          return next(args);
        },
      { step: 'initialize', name: 'refuse' },
    );
    await ingest(run, slide);
    services.s3.middlewareStack.remove('refuse');
    expect((await services.state.slide(run.runId, 'A'))?.name).toMatchObject({
      name: 'A.svs',
      wanted: 'C7_A.svs',
      reason: { error: 'NameRefused' },
    });
  });

  it('under which a broken attempt left other content gives way, and nothing is overwritten', async () => {
    const run = newRun('leftover');
    await put('leftover/a.svs', 'whole');
    for (const name of ['C7_A.svs', 'A.svs'])
      await services.s3.send(
        new PutObjectCommand({ Bucket: 'bronze', Key: `slides/leftover/A/${name}`, Body: 'left behind' }),
      );
    const [slide] = await plan(run, 'slide,slide_id,case_id\na.svs,A,C7\n');
    expect((await ingest(run, slide)).state).toBe('INGESTED');
    const { bronze } = (await services.state.slide(run.runId, 'A')) ?? {};
    expect(bronze?.key).toMatch(/A-[0-9a-f]{8}\.svs$/);
    expect(await readBytes(services.s3, { bucket: 'bronze', key: bronze?.key ?? '' })).toEqual(
      Buffer.from('whole'),
    );
  });
});

describe('a slide that takes longer than one invocation', () => {
  const MiB = 2 ** 20;
  const limits = { copyObjectLimit: 1, partSize: 5 * MiB };

  it('is handed over with its uploads, small, and goes on', async () => {
    const body = Buffer.alloc(23 * MiB, 'slide');
    await put('handed/x.mrxs', Buffer.alloc(6 * MiB, 'main'));
    await put('handed/x/Data.dat', body);
    const run = newRun('handed');
    const [slide] = await plan(run, 'slide,slide_id\nx.mrxs,X\n');
    let answer: Ingested = { slideId: 'X', state: 'COPYING' };
    let rounds = 0;
    do {
      let calls = 0;
      const timeLeft = () => (calls++ < 6 ? 100_000 : 40_000);
      answer = await ingest(run, slide, 'skip', { limits, timeLeft }, answer.continue);
      expect(JSON.stringify(answer).length).toBeLessThan(1024);
      rounds += 1;
    } while (answer.continue && rounds < 20);
    expect(answer).toEqual({ slideId: 'X', state: 'INGESTED' });
    expect(rounds).toBeGreaterThan(1);
    const copy = await readBytes(services.s3, { bucket: 'bronze', key: 'slides/handed/X/X/Data.dat' });
    expect(Buffer.compare(copy ?? Buffer.alloc(0), body)).toBe(0);
  });

  it('and changes meanwhile is set aside', async () => {
    await put('unsteady/x.mrxs', 'main');
    await put('unsteady/x/Data.dat', Buffer.alloc(11 * MiB, 'a'));
    const run = newRun('unsteady');
    const [slide] = await plan(run, 'slide,slide_id\nx.mrxs,X\n');
    let calls = 0;
    const timeLeft = () => (calls++ < 4 ? 100_000 : 40_000);
    const { continue: next } = await ingest(run, slide, 'skip', { limits, timeLeft });
    expect(next).toBeDefined();
    await put('unsteady/x/Data.dat', Buffer.alloc(11 * MiB, 'b'));
    expect((await ingest(run, slide, 'skip', { limits }, next)).state).toBe('QUARANTINED');
    expect((await services.state.slide(run.runId, 'X'))?.reason?.error).toBe('SlideChanged');
  });

  it('a file of several that changes after it was copied is noticed', async () => {
    await put('moving/x.mrxs', 'main');
    await put('moving/x/Data.dat', 'before');
    const run = newRun('moving');
    const [slide] = await plan(run, 'slide,slide_id\nx.mrxs,X\n');
    let changed = false;
    services.s3.middlewareStack.add(
      (next, { commandName }) =>
        async (args) => {
          const answer = await next(args);
          const { Key } = args.input as { Key?: string };
          if (commandName === 'CopyObjectCommand' && Key?.endsWith('Data.dat') && !changed) {
            changed = true;
            await put('moving/x/Data.dat', 'behind');
          }
          return answer;
        },
      { step: 'initialize', name: 'move' },
    );
    expect((await ingest(run, slide)).state).toBe('QUARANTINED');
    services.s3.middlewareStack.remove('move');
    // What the attempt left is no hindrance for the next.
    const again = await take('moving', 'slide,slide_id\nx.mrxs,X\n');
    expect(again.state).toBe('INGESTED');
    const data = again.item?.bronze?.files[1];
    expect(
      Buffer.from((await readBytes(services.s3, { bucket: 'bronze', ...data } as never)) ?? []).toString(),
    ).toBe('behind');
  });

  it('is given up after too many', async () => {
    await put('endless/x.svs', 'endless');
    const run = newRun('endless');
    const [slide] = await plan(run, 'slide,slide_id\nx.svs,X\n');
    const before = { round: 99, uploads: {}, requests: {} };
    expect((await ingest(run, slide, 'skip', { timeLeft: () => 0 }, before)).state).toBe('FAILED');
    expect((await services.state.slide(run.runId, 'X'))?.reason?.error).toBe('CopyTooSlow');
  });
});
