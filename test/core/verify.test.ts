import { readdirSync, renameSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { DeleteObjectCommand, S3Client } from '@aws-sdk/client-s3';
import { DeleteCommand, PutCommand } from '@aws-sdk/lib-dynamodb';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { listAnchors, takeAnchor } from '../../core/anchor.ts';
import type { RunContext } from '../../core/contracts.ts';
import { resultPrefix, resultsCsvKey, runJsonKey } from '../../core/keys.ts';
import { hashEvent, type LineageItem } from '../../core/lineage.ts';
import { readBytes } from '../../core/store.ts';
import { type Scope, verify } from '../../core/verify.ts';
import { BUCKETS, type Rehearsal, startRehearsal } from '../support/rehearsal.ts';
import { MODEL } from '../support/results.ts';

/** A size that no other object has, so that its file can be found on the disk. */
const ODD_SIZE = 54_321;

let lab: Rehearsal;
let run: RunContext;

beforeAll(async () => {
  lab = await startRehearsal();
  run = await lab.run(
    { 'a.svs': Buffer.alloc(ODD_SIZE, 'slide a'), 'b.svs': 'slide b' },
    'slide,slide_id\na.svs,A\nb.svs,B\n',
  );
  await takeAnchor(new Date(), anchoring());
});
afterAll(() => lab.close());

const anchoring = () => ({ ...lab, bucket: BUCKETS.anchors, actor: 'anchor-lineage', codeVersion: '0.1.0' });
const check = (scope: Scope = {}) =>
  verify(scope, { ...lab, landingBucket: BUCKETS.landing, anchorsBucket: BUCKETS.anchors });
const kinds = async (scope?: Scope) => (await check(scope)).findings.map(({ kind }) => kind);
const pkOf = (slideId: string) => `SLIDE#${slideId}`;

const putItem = (Item: object) =>
  lab.documents.send(new PutCommand({ TableName: 'lineage', Item: Item as Record<string, unknown> }));
const removeItem = ({ pk, sk }: LineageItem) =>
  lab.documents.send(new DeleteCommand({ TableName: 'lineage', Key: { pk, sk } }));
const sign = (item: LineageItem): LineageItem => {
  const { hash: _, ...rest } = item;
  return { ...rest, hash: hashEvent(rest) };
};

/** Tampers with slide A's chain, verifies, and puts the chain back as it was. */
async function tampered(change: (events: LineageItem[]) => Promise<unknown>) {
  const { events } = await lab.record.chain(pkOf('A'));
  await change(events);
  try {
    return await check();
  } finally {
    for (const event of (await lab.record.chain(pkOf('A'))).events) await removeItem(event);
    for (const event of events) await putItem(event);
  }
}

const at = <T>(items: readonly T[], index: number): T => {
  const item = items.at(index);
  if (item === undefined) throw new Error(`nothing at ${index}`);
  return item;
};

describe('a record that nobody touched', () => {
  it('is whole: every event, every object, and the newest anchor', async () => {
    const progress: number[] = [];
    const result = await verify(
      {},
      {
        ...lab,
        landingBucket: BUCKETS.landing,
        anchorsBucket: BUCKETS.anchors,
        onProgress: ({ objects }) => progress.push(objects),
      },
    );
    expect(result.findings).toEqual([]);
    expect(result).toMatchObject({ chains: 3, gone: 0, anchor: { heads: 3 } });
    // Both chains of slides have three events; the run's has claim, plan, inference, job and publication.
    expect(result.events).toBe(3 + 3 + 5);
    expect(result.objects).toBeGreaterThan(20);
    expect(result.bytes).toBeGreaterThan(ODD_SIZE);
    expect(progress.length).toBeGreaterThan(10);
  });

  it('is whole when the run was done again without a change, and when Landing has been emptied', async () => {
    const before = await check();
    await lab.run({}, 'slide,slide_id\na.svs,A\nb.svs,B\n');
    expect((await check()).findings).toEqual([]);
    const emptied = ['a.svs', 'b.svs'].map((name) => `colon/2026/${name}`);
    for (const Key of emptied) {
      await lab.s3.send(new DeleteObjectCommand({ Bucket: BUCKETS.landing, Key }));
    }
    const after = await check();
    expect(after.findings).toEqual([]);
    expect(after.events).toBeGreaterThan(before.events);
  });

  it('is whole where slides share their bytes, and where one was replaced since', async () => {
    const other = await startRehearsal();
    try {
      const manifest = (...ids: string[]) =>
        `slide,slide_id\n${ids.map((id) => `${id}.svs,${id}\n`).join('')}`;
      await other.run({ 'A.svs': 'one', 'B.svs': 'two' }, manifest('A', 'B'));
      await other.run({ 'C.svs': 'one' }, manifest('A', 'C'));
      await other.run({ 'A.svs': 'three' }, manifest('A'), 'replace');
      const result = await verify({}, { ...other, landingBucket: BUCKETS.landing });
      expect(result).toMatchObject({ findings: [], chains: 6 });
    } finally {
      await other.close();
    }
  });

  it('is looked at by slide with the runs it was in', async () => {
    const result = await check({ chains: [pkOf('B'), `RUN#${run.runId}`] });
    expect(result).toMatchObject({ chains: 2, findings: [] });
  });
});

describe('in the record, what is found is', () => {
  it('an altered event', async () => {
    const { findings } = await tampered((events) => putItem({ ...at(events, 1), actor: 'somebody else' }));
    expect(findings).toHaveLength(1);
    expect(findings[0]).toMatchObject({
      kind: 'event-altered',
      chain: 'SLIDE#A',
      event: { sk: '000000000002', action: 'SLIDE_INFERRED' },
    });
    expect(findings[0]?.expected).not.toBe(findings[0]?.found);
  });

  it('an altered event whose hash was made to fit, by the event after it and by the anchor', async () => {
    const { findings } = await tampered((events) => putItem(sign({ ...at(events, 0), reason: 'none' })));
    expect(findings[0]).toMatchObject({ kind: 'event-out-of-place', event: { sk: '000000000002' } });
  });

  it('a chain that was written anew from an event on, by the anchor', async () => {
    const { findings } = await tampered(async (events) => {
      let prevHash = at(events, 0).prevHash;
      for (const event of events) {
        const forged = sign({ ...event, codeVersion: '9.9.9', prevHash });
        prevHash = forged.hash;
        await putItem(forged);
      }
    });
    expect(findings.map(({ kind, chain }) => [kind, chain])).toEqual([['anchored-event-altered', 'SLIDE#A']]);
  });

  it('a removed event', async () => {
    const { findings } = await tampered((events) => removeItem(at(events, 1)));
    expect(findings[0]).toMatchObject({
      kind: 'event-removed',
      expected: 'event 000000000002',
      found: 'event 000000000003',
    });
  });

  it('a removed first event', async () => {
    const { findings } = await tampered((events) => removeItem(at(events, 0)));
    expect(findings[0]).toMatchObject({ kind: 'event-removed', expected: 'event 000000000001' });
  });

  it('the removed end of a chain, and a removed chain, by the anchor', async () => {
    const last = await tampered(async (events) => {
      const anchored = at(events, 2);
      for (const event of events.filter(({ sk }) => sk >= anchored.sk)) await removeItem(event);
    });
    expect(last.findings.map(({ kind, chain }) => [kind, chain])).toEqual([
      ['anchored-event-removed', 'SLIDE#A'],
    ]);
    const all = await tampered(async (events) => {
      for (const event of events) await removeItem(event);
    });
    expect(all.findings.map(({ kind, chain }) => [kind, chain])).toEqual([
      ['anchored-event-removed', 'SLIDE#A'],
    ]);
  });

  it('events in another order', async () => {
    const { findings } = await tampered(async (events) => {
      const [first, second] = [at(events, 0), at(events, 1)];
      await putItem(sign({ ...second, sk: first.sk }));
      await putItem(sign({ ...first, sk: second.sk }));
    });
    expect(findings[0]).toMatchObject({ kind: 'event-out-of-place', event: { sk: '000000000001' } });
  });

  it('an inserted event, also one that has a good hash and follows well', async () => {
    const inserted = await tampered(async (events) => {
      for (const event of events.slice(1).reverse()) {
        await removeItem(event);
        await putItem({ ...event, sk: String(Number(event.sk) + 1).padStart(12, '0') });
      }
      const first = at(events, 0);
      await putItem(sign({ ...first, sk: '000000000002', id: 'forged', prevHash: first.hash }));
    });
    expect(inserted.findings[0]).toMatchObject({ kind: 'event-altered', event: { sk: '000000000003' } });
    const between = await tampered((events) =>
      putItem(sign({ ...at(events, 0), sk: '0000000000015', id: 'forged', prevHash: at(events, 0).hash })),
    );
    expect(between.findings[0]).toMatchObject({ kind: 'event-out-of-place' });
  });
});

/** The files on disk that hold content of this size. */
function contentFiles(size: number): string[] {
  const root = join(lab.folder, 's3', 'content');
  return readdirSync(root, { recursive: true })
    .map((name) => join(root, String(name)))
    .filter((path) => statSync(path).isFile() && statSync(path).size === size);
}

describe('in what the record points at, what is found is', () => {
  it('bytes of a slide in Bronze that changed on the disk', async () => {
    const whole = Buffer.alloc(ODD_SIZE, 'slide a');
    const changed = Buffer.from(whole);
    changed[40_000] = 0;
    const files = contentFiles(ODD_SIZE);
    expect(files.length).toBeGreaterThan(0);
    for (const file of files) writeFileSync(file, changed);
    const { findings } = await check();
    for (const file of files) writeFileSync(file, whole);
    expect(findings[0]).toMatchObject({
      kind: 'object-changed',
      chain: 'SLIDE#A',
      event: { sk: '000000000001', action: 'SLIDE_INGESTED' },
      object: { bucket: BUCKETS.bronze, key: 'slides/colon/2026/A/A.svs' },
      expected: expect.stringMatching(/^crc64nvme:/),
      found: expect.stringMatching(/^crc64nvme:/),
    });
  });

  it('no link at all where S3 does not answer, but the verification fails', async () => {
    const s3 = new S3Client({
      endpoint: 'http://127.0.0.1:9',
      region: 'us-east-1',
      credentials: { accessKeyId: 'x', secretAccessKey: 'x' },
      maxAttempts: 1,
    });
    await expect(verify({}, { ...lab, s3, landingBucket: BUCKETS.landing })).rejects.toThrow(/ECONNREFUSED/);
    s3.destroy();
  });

  it('a slide in Bronze whose file is gone from the disk', async () => {
    const files = contentFiles(ODD_SIZE);
    for (const file of files) renameSync(file, `${file}.away`);
    const { findings } = await check({ chains: [pkOf('A')] });
    for (const file of files) renameSync(`${file}.away`, file);
    expect(findings[0]).toMatchObject({ kind: 'object-unreadable', chain: 'SLIDE#A' });
  });

  it('a slide in Bronze that was cut short on the disk', async () => {
    const files = contentFiles(ODD_SIZE);
    for (const file of files) writeFileSync(file, Buffer.alloc(10));
    const { findings } = await check();
    for (const file of files) writeFileSync(file, Buffer.alloc(ODD_SIZE, 'slide a'));
    expect(findings[0]).toMatchObject({ kind: 'object-unreadable', chain: 'SLIDE#A' });
    expect(await kinds()).toEqual([]);
  });

  const silver = (slideId: string, file: string) => ({
    Bucket: BUCKETS.silver,
    Key: `${resultPrefix(run.runId, slideId, MODEL.name)}${file}`,
  });

  it.each(['result.json', 'heatmap.png', 'tiles.parquet', 'complete.json', 'thumbnail.jpg'])(
    '%s that was overwritten, though the version on record is kept',
    async (file) => {
      const where = silver('B', file);
      const before = await readBytes(lab.s3, { bucket: where.Bucket, key: where.Key });
      await lab.put(where.Bucket, where.Key, 'other');
      const { findings } = await check();
      await lab.put(where.Bucket, where.Key, before ?? '');
      expect(findings).toHaveLength(1);
      expect(findings[0]).toMatchObject({
        kind: 'object-changed',
        chain: 'SLIDE#B',
        object: { key: where.Key },
      });
      expect(findings[0]?.message).toContain('overwritten');
      // The same bytes again are what is on record.
      expect(await kinds()).toEqual([]);
    },
  );

  it('a result that was deleted, by marker or by version', async () => {
    const where = silver('B', 'heatmap.png');
    const { VersionId } = await lab.s3.send(new DeleteObjectCommand(where));
    const { findings } = await check();
    expect(findings[0]).toMatchObject({ kind: 'object-missing', found: 'a delete marker' });
    await lab.s3.send(new DeleteObjectCommand({ ...where, VersionId }));
    expect(await kinds()).toEqual([]);
  });

  it('the run summary and table', async () => {
    for (const key of [runJsonKey(run.runId), resultsCsvKey(run.runId)]) {
      const before = await readBytes(lab.s3, { bucket: BUCKETS.silver, key });
      await lab.put(BUCKETS.silver, key, '{}');
      const { findings } = await check();
      await lab.put(BUCKETS.silver, key, before ?? '');
      expect(findings.map(({ kind, chain }) => [kind, chain])).toEqual([
        ['object-changed', `RUN#${run.runId}`],
      ]);
    }
  });

  it('a version on record that is gone for good', async () => {
    const { events } = await lab.record.chain(pkOf('B'));
    const object = at(events, 1).outputs?.find(({ key }) => key.endsWith('thumbnail.jpg'));
    const bytes = await readBytes(lab.s3, { bucket: BUCKETS.silver, key: object?.key ?? '' });
    await lab.s3.send(
      new DeleteObjectCommand({ Bucket: BUCKETS.silver, Key: object?.key, VersionId: object?.versionId }),
    );
    await lab.put(BUCKETS.silver, object?.key ?? '', bytes ?? '');
    const { findings } = await check({ chains: [pkOf('B')] });
    expect(findings[0]).toMatchObject({ kind: 'object-missing', found: `no version ${object?.versionId}` });
  });
});

describe('anchors', () => {
  it('are taken once a day, and cannot be deleted or silently replaced', async () => {
    const [first] = await listAnchors(lab.s3, BUCKETS.anchors);
    expect(first).toMatchObject({ date: new Date().toISOString().slice(0, 10), later: 0 });
    expect((await takeAnchor(new Date(), anchoring())).taken).toBe(false);
    const { bucket: Bucket, key: Key, versionId: VersionId } = first ?? {};
    await expect(lab.s3.send(new DeleteObjectCommand({ Bucket, Key, VersionId }))).rejects.toThrow(
      /object lock/,
    );
    await lab.put(BUCKETS.anchors, Key ?? '', '{}');
    const result = await check({ chains: [pkOf('A')] });
    expect(result.findings).toEqual([
      expect.objectContaining({ kind: 'anchor-broken', message: expect.stringContaining('later versions') }),
    ]);
    // The first version is the anchor, whatever was put over it.
    expect(result.anchor?.root).toMatch(/^[0-9a-f]{64}$/);
  });

  it('tell which heads of the anchor before were no longer in the record', async () => {
    const other = await startRehearsal();
    try {
      await other.run({ 'a.svs': 'a' }, 'slide,slide_id\na.svs,A\n');
      const deps = { ...other, bucket: BUCKETS.anchors, actor: 'anchor-lineage', codeVersion: '1' };
      const yesterday = new Date(Date.now() - 24 * 3600 * 1000);
      const first = await takeAnchor(yesterday, deps);
      expect(first.anchor).toMatchObject({ previous: null, broken: { count: 0 } });
      const { events } = await other.record.chain(pkOf('A'));
      const { pk, sk } = at(events, -1);
      await other.documents.send(new DeleteCommand({ TableName: 'lineage', Key: { pk, sk } }));
      const second = await takeAnchor(new Date(), deps);
      expect(second.anchor).toMatchObject({
        previous: { root: first.anchor.root },
        broken: { count: 1, first: [{ pk: 'SLIDE#A', sk }] },
      });
      const verifying = { ...other, landingBucket: BUCKETS.landing, anchorsBucket: BUCKETS.anchors };
      // The newest anchor holds the shortened chain; it says itself that the one before did not.
      const newest = await verify({}, verifying);
      expect(newest.findings.map(({ kind, chain }) => [kind, chain])).toEqual([
        ['anchored-event-removed', 'SLIDE#A'],
      ]);
      const older = await verify({ anchor: first.anchor.date }, verifying);
      expect(older.anchor?.root).toBe(first.anchor.root);
      expect(older.findings[0]).toMatchObject({ kind: 'anchored-event-removed', found: 'no such event' });
    } finally {
      await other.close();
    }
  });
});
