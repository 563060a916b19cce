import { PutObjectCommand } from '@aws-sdk/client-s3';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { choose } from '../../cli/commands/replay.ts';
import { claimManifest } from '../../core/claim.ts';
import type { BronzeSlide, PlannedSlide, SlideItem } from '../../core/contracts.ts';
import { canFollow, checkTaken, followUpManifest, takenIn, writeFollowUp } from '../../core/follow-up.ts';
import { slidesKey } from '../../core/keys.ts';
import { lineagePk } from '../../core/lineage.ts';
import { parseManifest } from '../../core/manifest.ts';
import { LineageReader } from '../../core/record.ts';
import { readBytes, writeLines } from '../../core/store.ts';
import { plannedSlide, RUN } from '../support/results.ts';
import { type Services, startServices } from '../support/services.ts';

let services: Services;
beforeAll(async () => {
  services = await startServices();
  await services.state.claimRun({ ...RUN, state: 'PARTIAL', executionArn: 'arn' });
});
afterAll(() => services.close());

const bronze: BronzeSlide = {
  ...{ bucket: 'bronze', key: 'slides/c/a/a.svs', files: [], size: 3, checksum: 'crc64nvme:x' },
};
const item = (slideId: string, state: SlideItem['state'], more: Partial<SlideItem> = {}): SlideItem => ({
  ...{ slideId, slide: slideId, state, updatedAt: '' },
  ...more,
});
const ended = (line: number, state: PlannedSlide['state'], error: string) =>
  plannedSlide(`${state}-${line}`, { line, state, reason: { error, message: '' } });

describe('the manifest of a follow-up', () => {
  it('says what the first one said of its slides, read by the same parser', () => {
    const lines = [
      plannedSlide('a', {
        slide: 'deep, "odd"/a.svs',
        ...{ mpp: 0.25, mppSource: 'manifest', wantedModels: ['one', 'two@2.0.0'] },
        metadata: { patient_id: 'P 1', note: 'two\nlines' },
      }),
      plannedSlide('b', { slide: 'b.svs', mpp: 0.5, mppSource: 'catalogue', metadata: { stain: 'HE' } }),
    ];
    const rows = parseManifest(Buffer.from(followUpManifest(lines)));
    expect(rows).toMatchObject([
      {
        ...{ slide: 'deep, "odd"/a.svs', slideId: 'a', mpp: 0.25, models: ['one', 'two@2.0.0'] },
        metadata: { patient_id: 'P 1', note: 'two\nlines' },
      },
      { slide: 'b.svs', slideId: 'b', metadata: { stain: 'HE' } },
    ]);
    // What the catalogue said is asked for again.
    expect(rows[1]?.mpp).toBeUndefined();
    expect(rows.map(({ reason }) => reason)).toEqual([undefined, undefined]);
    const other = parseManifest(Buffer.from(followUpManifest(lines, 'three@1.0.0')));
    expect(other.map(({ models }) => models)).toEqual([['three@1.0.0'], ['three@1.0.0']]);
  });

  it('is written once under its id', async () => {
    const { s3, silver } = services;
    const what = { kind: 'replay', of: RUN.runId, id: '0001', manifest: 'slide\na.svs\n' } as const;
    const [first, again] = [await writeFollowUp(s3, silver, what), await writeFollowUp(s3, silver, what)];
    expect(again).toEqual(first);
    expect(Buffer.from((await readBytes(s3, first.followUp.manifest)) ?? []).toString()).toBe(what.manifest);
    await expect(writeFollowUp(s3, silver, { ...what, manifest: 'slide\nb.svs\n' })).rejects.toMatchObject({
      name: 'FollowUpTaken',
    });
  });
});

it('a follow-up is claimed as a run of the first one’s study, under its parameters, and both records say so', async () => {
  const { s3, silver, state, lineage } = services;
  const event = await writeFollowUp(s3, silver, {
    ...{ kind: 'late', of: RUN.runId, id: 'x', manifest: 'slide\nc.svs\n' },
  });
  const config = {
    ...{ defaultModel: 'newer', codeVersion: '9' },
    parameters: { tissueMinFraction: 0.9, mppTolerance: 0 },
  };
  const ask = { event, executionArn: 'arn:2', startedAt: '2026-11-13T00:00:00.000Z' };
  const { claimed, run } = await claimManifest(ask, { state, lineage, config });
  expect(claimed).toBe(true);
  expect(run).toMatchObject({
    ...{ study: RUN.study, landing: 'landing', followUp: { kind: 'late', of: RUN.runId } },
    ...{ defaultModel: RUN.defaultModel, parameters: RUN.parameters },
  });
  expect(run.runId).not.toBe(RUN.runId);
  expect((await claimManifest({ ...ask, executionArn: 'arn:3' }, { state, lineage, config })).claimed).toBe(
    false,
  );
  const record = new LineageReader(services.documents, 'lineage');
  const actions: [string, unknown][] = [];
  for (const runId of [RUN.runId, run.runId]) {
    for (const { action, parameters } of (await record.chain(lineagePk({ runId }))).events) {
      actions.push([action, parameters]);
    }
  }
  expect(actions).toEqual([
    ['RUN_FOLLOWED', { kind: 'late', by: run.runId }],
    ['RUN_CLAIMED', expect.objectContaining({ followUp: { kind: 'late', of: RUN.runId } })],
  ]);
  const unknown = { followUp: { ...event.followUp, of: 'gone' } };
  await expect(claimManifest({ ...ask, event: unknown }, { state, lineage, config })).rejects.toMatchObject({
    name: 'RunNotFound',
  });
});

describe('what is replayed', () => {
  const planned = [
    plannedSlide('done', { line: 2 }),
    plannedSlide('failed', { line: 3 }),
    plannedSlide('under-way', { line: 4 }),
    ended(5, 'MISSING', 'SlideMissing'),
    ended(6, 'DUPLICATE', 'SlideDuplicate'),
    ended(7, 'QUARANTINED', 'MppInvalid'),
    ended(8, 'QUARANTINED', 'SlideUnopenable'),
  ];
  const items = new Map(
    [
      item('done', 'AGGREGATED', { bronze }),
      item('failed', 'FAILED', { bronze, reason: { error: 'JobFailed', message: '' } }),
      item('under-way', 'COPYING'),
    ].map((each) => [each.slideId, each]),
  );
  const lines = (choice: Parameters<typeof choose>[2]) =>
    choose(planned, items, choice).map(({ line }) => line);

  it('is what has no results and is not wrong in its row', () => {
    expect(lines({})).toEqual([3, 4, 5, 8]);
    expect(lines({ failed: true, model: 'm' })).toEqual([3, 4, 5, 8]);
    expect(planned.filter((line) => !canFollow(line)).map(({ line }) => line)).toEqual([6, 7]);
  });

  it('is with another model what lies in Bronze, or the one slide that is asked for', () => {
    expect(lines({ model: 'm' })).toEqual([2, 3]);
    expect(lines({ slide: 'done' })).toEqual([2]);
    expect(lines({ slide: 'MppInvalid' })).toEqual([]);
  });
});

it('what an earlier run took in is known by slide, and must still lie in Bronze as it did', async () => {
  const { s3, state, silver } = services;
  await services.createBucket('bronze');
  const { ChecksumCRC64NVME, VersionId } = await s3.send(
    new PutObjectCommand({ Bucket: 'bronze', Key: bronze.key, Body: 'abc', ChecksumAlgorithm: 'CRC64NVME' }),
  );
  const file = {
    ...{ key: bronze.key, size: 3, checksum: `crc64nvme:${ChecksumCRC64NVME}` },
    ...(VersionId && { versionId: VersionId }),
  };
  const there = { ...bronze, files: [file], checksum: file.checksum };
  await writeLines(s3, { bucket: silver, key: slidesKey(RUN.runId) }, [
    plannedSlide('a', { slide: 'a.svs' }),
    plannedSlide('b', { slide: 'b.svs' }),
  ]);
  await state.transition(RUN.runId, 'a', 'INGESTED', { slide: 'a.svs', bronze: there });
  const taken = await takenIn(s3, state, silver, RUN.runId);
  expect([...taken]).toEqual([['a', expect.objectContaining({ slide: 'a.svs', bronze: there })]]);

  await checkTaken(s3, there);
  // A newer version beside it changes nothing.
  await s3.send(new PutObjectCommand({ Bucket: 'bronze', Key: bronze.key, Body: 'other' }));
  await checkTaken(s3, there);
  for (const wrong of [{ checksum: 'crc64nvme:AAAAAAAAAAA=' }, { size: 4 }, { key: 'slides/gone' }]) {
    const changed = checkTaken(s3, { ...there, files: [{ ...file, ...wrong }] });
    await expect(changed).rejects.toMatchObject({ name: 'BronzeChanged' });
  }
});
