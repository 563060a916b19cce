import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { RunContext } from '../../core/contracts.ts';
import { resultPrefix, runJsonKey } from '../../core/keys.ts';
import { chainsOf, findTarget, trace } from '../../core/trace.ts';
import { BUCKETS, IMAGE, type Rehearsal, startRehearsal } from '../support/rehearsal.ts';
import { MODEL } from '../support/results.ts';

let lab: Rehearsal;
let run: RunContext;
beforeAll(async () => {
  lab = await startRehearsal();
  run = await lab.run(
    { 'a.svs': 'slide a', 'm.mrxs': 'index', 'm/Data0.dat': 'one', 'm/Data1.dat': 'two' },
    'slide,slide_id\na.svs,A\nm.mrxs,M\ngone.svs,G\n',
  );
});
afterAll(() => lab.close());

const of = async (text: string) => {
  const target = await findTarget(text, lab.record);
  if (!target) throw new Error(`${text} is not known`);
  return trace(target, lab.record);
};
const key = (slideId: string, file: string) => `${resultPrefix(run.runId, slideId, MODEL.name)}${file}`;
const sha = expect.stringMatching(/^sha256:[0-9a-f]{64}$/);
const crc = expect.stringMatching(/^crc64nvme:/);
const version = expect.stringMatching(/^.{32}$/);

describe('a result', () => {
  it('is traced back to Landing: bytes, versions, parameters, digests, who and when', async () => {
    const { object, paths } = await of(`s3://${BUCKETS.silver}/${key('A', 'heatmap.png')}`);
    expect(object).toEqual({
      bucket: BUCKETS.silver,
      key: key('A', 'heatmap.png'),
      versionId: version,
      checksum: sha,
    });
    const [path] = paths;
    expect(paths).toHaveLength(1);
    expect(path?.missing).toEqual([]);
    expect(path?.steps.map(({ action }) => action)).toEqual([
      'SLIDE_AGGREGATED',
      'SLIDE_INFERRED',
      'JOB_SUCCEEDED',
      'INFERENCE_PLANNED',
      'SLIDE_INGESTED',
      'RUN_PLANNED',
      'RUN_CLAIMED',
    ]);
    const [aggregated, inferred, job, planned, ingested, plan, claimed] = path?.steps ?? [];
    for (const step of path?.steps ?? []) {
      expect(step.actor).not.toBe('');
      expect(step.codeVersion).not.toBe('');
      expect(step.time).toMatch(/^\d{4}-\d\d-\d\dT/);
    }
    // Each step's inputs are outputs of one before it, by version and checksum.
    const tiles = inferred?.outputs?.find((output) => output.key === key('A', 'tiles.parquet'));
    expect(tiles).toMatchObject({ versionId: version, checksum: sha });
    expect(aggregated?.inputs).toContainEqual(tiles);
    expect(aggregated?.outputs?.map((output) => output.key)).toEqual([
      key('A', 'result.json'),
      key('A', 'heatmap.png'),
    ]);
    const bronze = ingested?.outputs?.[0];
    expect(bronze).toEqual({
      bucket: BUCKETS.bronze,
      key: 'slides/colon/2026/A/A.svs',
      versionId: version,
      checksum: crc,
    });
    expect(inferred?.inputs).toEqual([
      bronze,
      {
        bucket: BUCKETS.models,
        key: `models/${MODEL.name}/${MODEL.version}/model.tar.gz`,
        versionId: version,
        checksum: sha,
      },
    ]);
    expect(inferred?.parameters).toMatchObject({
      ...run.parameters,
      modelDigest: inferred?.inputs?.[1]?.checksum,
      jobName: job?.parameters?.jobName,
      inferenceCodeVersion: '0.1.0',
    });
    expect(job?.parameters).toMatchObject({
      imageUri: IMAGE,
      imageDigest: IMAGE.split('@')[1],
      roleArn: 'arn:aws:iam::000000000000:role/slideway-test-job',
      modelDigest: inferred?.parameters?.modelDigest,
    });
    expect(planned?.outputs?.map((output) => output.key.split('/').slice(2).join('/'))).toEqual([
      'plan/inference.jsonl',
      `jobs/${MODEL.name}/shard-0000.json`,
    ]);
    expect(ingested?.inputs).toEqual([
      { bucket: BUCKETS.landing, key: 'colon/2026/a.svs', versionId: version, checksum: crc },
    ]);
    expect(ingested?.inputs?.[0]?.checksum).toBe(bronze?.checksum);
    expect(plan?.outputs).toEqual(
      ['plan.json', 'slides.jsonl'].map((file) => ({
        bucket: BUCKETS.silver,
        key: `runs/${run.runId}/plan/${file}`,
        versionId: version,
        checksum: sha,
      })),
    );
    expect(claimed?.inputs?.[0]).toMatchObject({
      key: 'colon/2026/repo.csv',
      versionId: run.manifest.versionId,
    });
    expect(claimed?.parameters).toMatchObject({ ...run.parameters, defaultModel: MODEL.name });
  });

  it('of several files is traced to every one of them', async () => {
    const { paths } = await of(key('M', 'result.json'));
    const ingested = paths[0]?.steps.find(({ action }) => action === 'SLIDE_INGESTED');
    expect(ingested?.inputs?.map((input) => input.key)).toEqual(
      ['m.mrxs', 'm/Data0.dat', 'm/Data1.dat'].map((name) => `colon/2026/${name}`),
    );
    expect(ingested?.outputs).toHaveLength(3);
  });

  it('that is not on record is said to be that', async () => {
    const { object, paths } = await of(key('A', 'forged.json'));
    expect(object).toBeUndefined();
    expect(paths[0]?.missing).toEqual([`${key('A', 'forged.json')} itself is not on record`]);
    const other = await of(`runs/nowhere-000000000000/run.json`);
    expect(other.paths[0]?.missing[0]).toBe('the run nowhere-000000000000 is not on record');
  });
});

it('a run summary is traced through the run to its manifest', async () => {
  const { object, paths } = await of(runJsonKey(run.runId));
  expect(object).toMatchObject({ versionId: version, checksum: sha });
  expect(paths[0]?.steps.map(({ action }) => action)).toEqual([
    'RUN_PARTIAL',
    'JOB_SUCCEEDED',
    'INFERENCE_PLANNED',
    'RUN_PLANNED',
    'RUN_CLAIMED',
  ]);
});

describe('a name', () => {
  it('is that of a slide or of a run, or of nothing', async () => {
    expect(await findTarget('A', lab.record)).toEqual({ kind: 'slide', slideId: 'A' });
    expect(await findTarget(run.runId, lab.record)).toEqual({ kind: 'run', runId: run.runId });
    expect(await findTarget('G', lab.record)).toBeUndefined();
    expect(await chainsOf({ kind: 'slide', slideId: 'A' }, lab.record)).toEqual([
      'SLIDE#A',
      `RUN#${run.runId}`,
    ]);
  });

  it('of a slide gives a path for each run and model, the newest first', async () => {
    const again = await lab.run({}, 'slide,slide_id\na.svs,A\n');
    const { paths } = await of('A');
    expect(paths.map(({ runId, model }) => [runId, model])).toEqual([
      [again.runId, MODEL.name],
      [run.runId, MODEL.name],
    ]);
    expect(paths.flatMap(({ missing }) => missing)).toEqual([]);
    // The bytes were in Bronze already: the event that brought them there is part of the way.
    const ingested = paths[0]?.steps.filter(({ action }) => action === 'SLIDE_INGESTED');
    expect(ingested?.map(({ runId }) => runId)).toContain(run.runId);
  });

  it('of a slide whose ingestion is not on record is not passed over', async () => {
    await lab.lineage.append(
      { slideId: 'X' },
      {
        id: 'x',
        action: 'SLIDE_INFERRED',
        runId: run.runId,
        inputs: [{ bucket: BUCKETS.bronze, key: 'slides/colon/2026/X/x.svs', versionId: 'v' }],
        parameters: { model: MODEL.name, jobName: 'unknown-1' },
      },
    );
    const { paths } = await of('X');
    expect(paths[0]?.missing).toEqual([
      'the end of the job unknown-1 is not on record',
      'no event tells how slides/colon/2026/X/x.svs came into Bronze',
    ]);
  });
});
