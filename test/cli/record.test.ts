/** How trace and verify speak to a person. */
import { describe, expect, it } from 'vitest';
import { describeTrace } from '../../cli/commands/trace.ts';
import { describeVerification } from '../../cli/commands/verify.ts';
import { plain } from '../../cli/terminal.ts';
import type { LineageItem } from '../../core/lineage.ts';
import type { Verification } from '../../core/verify.ts';

const step = (change: Partial<LineageItem> = {}): LineageItem => ({
  pk: 'SLIDE#S1',
  sk: '000000000001',
  id: 'i',
  action: 'SLIDE_INGESTED',
  actor: 'ingest-slide',
  codeVersion: '0.1.0',
  runId: 'r',
  time: '2026-11-20T10:00:00.000Z',
  prevHash: '0'.repeat(64),
  hash: 'ab'.repeat(32),
  ...change,
});

describe('a trace', () => {
  const object = { bucket: 'silver', key: 'runs/r/x', versionId: 'v', checksum: 'sha256:1' };
  const shown = (change: Partial<LineageItem>, missing: string[] = []) =>
    describeTrace(
      {
        target: { kind: 'slide', slideId: 'S1' },
        paths: [{ runId: 'r', slideId: 'S1', model: 'm', steps: [step(change)], missing }],
      },
      plain,
    ).join('\n');

  it('says who, when, from what, what came of it and with which parameters', () => {
    const text = shown({ inputs: [object], outputs: [object], parameters: { mpp: 0.5, of: ['a'] } });
    expect(text).toBe(`Slide S1

slide S1, model m, run r

▸ Slide taken into Bronze  SLIDE_INGESTED
  when     2026-11-20T10:00:00.000Z
  who      ingest-slide, code version 0.1.0
  from     s3://silver/runs/r/x
           version v  sha256:1
  made     s3://silver/runs/r/x
           version v  sha256:1
  with     mpp = 0.5
           of = ["a"]
  event    SLIDE#S1 000000000001  ${'ab'.repeat(32)}

Whole: every link back to Landing is on record.`);
  });

  it('says what is missing, and leaves a long list to --json', () => {
    const text = shown({ outputs: Array.from({ length: 30 }, () => object) }, ['the run is not on record']);
    expect(text).toContain('Not whole: the run is not on record.');
    expect(text).toContain('… and 10 more; --json has all');
    expect(text).not.toContain('Whole: every');
  });
});

describe('a verification', () => {
  const result: Verification = {
    ...{ chains: 2, events: 7, objects: 20, bytes: 5_000_000, gone: 1, findings: [] },
    anchor: { date: '2026-11-20', key: 'k', root: 'beef', heads: 2 },
  };

  it('that found nothing says how much it has looked at', () => {
    expect(describeVerification(result, plain)).toEqual([
      'Whole: 2 chains, 7 events, 20 objects, 5.0 MB read.',
      'Held against the anchor of 2026-11-20 (2 chains, root beef).',
      '1 file on record no longer in Landing, where files need not stay.',
    ]);
  });

  it('names the broken link, what was expected and what was found', () => {
    const lines = describeVerification(
      {
        ...result,
        gone: 0,
        anchor: null,
        findings: [
          {
            kind: 'object-changed',
            chain: 'SLIDE#S1',
            event: { sk: '000000000001', action: 'SLIDE_INGESTED' },
            object: { bucket: 'bronze', key: 'k', versionId: 'v' },
            message: 'k does not hold the bytes that are on record.',
            expected: 'crc64nvme:a',
            found: 'crc64nvme:b',
          },
        ],
      },
      plain,
    );
    expect(lines).toEqual([
      'Broken: 1 finding in 2 chains, 7 events, 20 objects, 5.0 MB read.',
      '',
      'object-changed  k does not hold the bytes that are on record.',
      '  where     SLIDE#S1 000000000001 SLIDE_INGESTED',
      '  object    s3://bronze/k version v',
      '  expected  crc64nvme:a',
      '  found     crc64nvme:b',
      '',
      'There is no anchor yet, so the end of a chain could have been taken away unseen.',
    ]);
  });
});
