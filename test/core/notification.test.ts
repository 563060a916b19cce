import { describe, expect, it } from 'vitest';

import { costOf } from '../../core/cost.ts';
import {
  claimMessage,
  linkTo,
  type Problem,
  runMessage,
  withoutPatientData,
} from '../../core/notification.ts';
import type { RunHead } from '../../core/results.ts';
import { RUN } from '../support/results.ts';

const HEAD: RunHead = {
  ...{ runId: RUN.runId, study: RUN.study, manifest: RUN.manifest, startedAt: RUN.startedAt },
  state: 'PARTIAL',
  reason: null,
  endedAt: '2026-11-12T09:00:00.000Z',
  models: [],
  parameters: null,
  codeVersion: '0.1.0',
  counts: { AGGREGATED: 5, MISSING: 1, FAILED: 60, DUPLICATE: 2 },
  jobs: [],
  cost: costOf({ rows: 0, expected: 0, inferred: 0, jobs: [], requests: {} }),
};
const PLACES = { report: 's3://silver/report', results: 's3://silver/csv', summary: 's3://silver/json' };

describe('the message of a run', () => {
  const failed: Problem[] = Array.from({ length: 60 }, (_, i) => ({
    slideId: `slide-${i}`,
    line: i + 2,
    state: 'FAILED',
    reason: { error: 'JobFailed', message: 'the job failed' },
  }));
  const missing: Problem = { slideId: 'late', line: 99, state: 'MISSING', reason: null };
  const { subject, text } = runMessage(HEAD, [...failed, missing], PLACES);

  it('says how it went, where everything is, and what to do about what did not go well', () => {
    expect(subject).toBe('Slideway: Colon 2026 is done, but not for every slide, 5 of 66 slides');
    expect(text).toContain('5 result ready, 1 not found, 60 failed, 2 listed twice');
    for (const place of Object.values(PLACES)) expect(text).toContain(place);
    expect(text).toContain('slide-3 (line 5): the job failed (JobFailed)');
    expect(text).toMatch(/Not found: 1\n {2}late \(line 99\)/);
    expect(text.match(/What to do:/g)).toHaveLength(2);
  });

  it('says how many slides it does not name', () => {
    const { text } = runMessage(HEAD, failed.slice(0, 49), PLACES);
    expect(text).toContain('12 more slides are named in the report');
  });

  it('keeps its subject to what SNS takes, whatever the study is called', () => {
    const { subject } = runMessage({ ...HEAD, study: `Étude ${'Ü'.repeat(120)} 大腸` }, [], PLACES);
    expect(subject).toMatch(/^[\x20-\x7e]{1,100}$/);
    expect(subject).toContain('Etude UUU');
  });

  it('says of each reason what to do, and of a step that was ended nothing that only engineers read', () => {
    const problem = (line: number, error: string, message: string): Problem => ({
      ...{ slideId: `s${line}`, line, state: 'FAILED' },
      reason: { error, message },
    });
    const { text } = runMessage(
      { ...HEAD, counts: { FAILED: 3 } },
      [
        problem(2, 'Runtime.OutOfMemory', 'RequestId: 1f Error: signal: killed'),
        problem(3, 'ModelNotFound', 'No model `x` is registered.'),
        problem(4, 'JobCapacity', 'No instance was free for long.'),
      ],
      PLACES,
    );
    expect(text).not.toContain('RequestId');
    expect(text).toMatch(/s2 \(line 2\): a step of the pipeline was ended .*\(Runtime.OutOfMemory\)/);
    const [first, second] = text.split('What to do:').slice(1);
    expect(first).toMatch(/^ Nothing is known to be wrong with the slide.*replay/);
    expect(second).toMatch(/^ Ask whoever runs Slideway in your lab to put the model right/);
    expect(text.match(/What to do:/g)).toHaveLength(2);
  });

  it('names the run that it follows', () => {
    const of = 'colon-0000';
    const text = (kind: 'late' | 'replay') =>
      runMessage({ ...HEAD, followUp: { kind, of } }, [], PLACES).text;
    expect(text('replay')).toMatch(/Replays +colon-0000/);
    expect(text('late')).toMatch(/Follows +colon-0000, for slides of it that came late/);
  });

  it('points at objects as the stage wants it', () => {
    const key = 'runs/r 1/report/index.html';
    expect(linkTo('s3://{bucket}/{key}', 'silver', key)).toBe(`s3://silver/${key}`);
    expect(linkTo('https://x/{bucket}?prefix={key}', 'silver', key)).toBe(
      'https://x/silver?prefix=runs%2Fr%201%2Freport%2Findex.html',
    );
  });

  it('gives the reason of a run that failed', () => {
    const reason = { error: 'ManifestInvalid', message: 'PlanRun: no header row' };
    const { text } = runMessage({ ...HEAD, state: 'FAILED', counts: {}, reason }, [], PLACES);
    expect(text).toContain('Reason: PlanRun: no header row (ManifestInvalid)');
    expect(claimMessage('s3://landing/x/repo.csv', reason).text).toContain('s3://landing/x/repo.csv');
  });
});

describe('a slide in a message', () => {
  const row = {
    slideId: 'colon-12',
    line: 7,
    state: 'MISSING' as const,
    slide: 'Meier (1960)/meier_HE.svs',
    reason: {
      error: 'SlideMissing',
      message: 'Meier (1960)/meier_HE.svs is not in Landing; patient P-77, HE.',
    },
  };

  it('is not named by its file, nor by anything of the manifest', () => {
    const { slideId, line, reason } = withoutPatientData(row, { patient_id: 'P-77', stain: 'HE', note: '' });
    expect({ slideId, line }).toEqual({ slideId: 'colon-12', line: 7 });
    expect(reason).toEqual({ error: 'SlideMissing', message: '… is not in Landing; patient …, ….' });
  });

  it('is not named by an id that was made of its file’s name, nor by one that holds the patient’s', () => {
    const made = withoutPatientData(
      {
        ...row,
        slideId: 'Meier-1960-meier_HE-0a1b2c3d',
        reason: { error: 'E', message: 'Meier-1960-meier_HE-0a1b2c3d is torn' },
      },
      {},
      true,
    );
    expect(made).toMatchObject({ slideId: '…-0a1b2c3d', line: 7, reason: { message: '… is torn' } });
    const named = withoutPatientData({ ...row, slideId: 'P-77-HE-1' }, { patient_id: 'P-77' });
    expect(named.slideId).toBe('…-HE-1');
  });

  it('keeps words that only contain a value', () => {
    const { reason } = withoutPatientData(
      { ...row, reason: { error: 'E', message: 'the sheet says HE' } },
      { stain: 'he' },
    );
    expect(reason?.message).toBe('the sheet says HE');
  });
});
