import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { claimManifest, runIdOf, studyOf } from '../../core/claim.ts';
import { SLIDE_STATES, type SlideState } from '../../core/contracts.ts';
import { isFinal } from '../../core/state.ts';
import { RUN } from '../support/results.ts';
import { type Services, startServices } from '../support/services.ts';

let services: Services;
beforeAll(async () => {
  services = await startServices();
});
afterAll(() => services.close());

const config = { defaultModel: 'm', codeVersion: '1', parameters: RUN.parameters };
const event = (etag: string, version?: string) => ({
  detail: {
    bucket: { name: 'landing' },
    object: { key: 'Colon 2026/repo.csv', etag, ...(version && { 'version-id': version }) },
  },
});

describe('a manifest version', () => {
  const claim = (executionArn: string, version: string) =>
    claimManifest(
      { event: event('e', version), executionArn, startedAt: '2026-11-12T08:00:00.000Z' },
      { state: services.state, lineage: services.lineage, config },
    );

  it('is claimed by one execution, which may ask again', async () => {
    const first = await claim('arn:a', 'v1');
    expect(first).toMatchObject({
      claimed: true,
      run: { study: 'Colon 2026', runId: expect.stringMatching(/^colon-2026-[0-9a-f]{12}$/) },
    });
    expect(await claim('arn:b', 'v1')).toEqual({ ...first, claimed: false });
    expect((await claim('arn:a', 'v1')).claimed).toBe(true);
    expect((await services.state.run(first.run.runId))?.executionArn).toBe('arn:a');
  });

  it('gives one run however many executions ask at once', async () => {
    const claims = await Promise.all(Array.from({ length: 8 }, (_, i) => claim(`arn:${i}`, 'v2')));
    expect(claims.filter(({ claimed }) => claimed)).toHaveLength(1);
  });

  it('another version, parameter or model gives another run', () => {
    const manifest = { bucket: 'b', key: 'k', versionId: 'v', etag: 'e' };
    const ids = [
      runIdOf('s', manifest, config),
      runIdOf('s', { ...manifest, versionId: 'w' }, config),
      runIdOf('s', manifest, { ...config, defaultModel: 'n' }),
      runIdOf('s', manifest, { ...config, parameters: { ...RUN.parameters, tissueMinFraction: 0.6 } }),
    ];
    expect(new Set(ids).size).toBe(4);
    expect(runIdOf('s', manifest, config)).toBe(ids[0]);
    expect(runIdOf('ÄÖ 東京', manifest, config)).toMatch(/^ao-[0-9a-f]{12}$/);
  });

  it('belongs to a study', () => {
    expect(studyOf('a/b/repo.csv')).toBe('a/b');
    expect(() => studyOf('repo.csv')).toThrow(/<study>\/repo.csv/);
  });
});

describe('a slide', () => {
  it('never moves backwards, whatever events come in whatever order', async () => {
    const order: SlideState[] = ['COPYING', 'INGESTED', 'INFERRING', 'INFERRED', 'AGGREGATED'];
    let n = 0;
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.constantFrom(...SLIDE_STATES), { minLength: 1, maxLength: 8 }),
        async (events) => {
          const slideId = `s${n++}`;
          let before: SlideState | undefined;
          for (const state of events) {
            await services.state.transition('r', slideId, state, { slide: 'x.svs' });
            const now = (await services.state.slide('r', slideId))?.state;
            if (before && isFinal(before)) expect(now).toBe(before);
            if (before && now && order.includes(before) && order.includes(now)) {
              expect(order.indexOf(now)).toBeGreaterThanOrEqual(order.indexOf(before));
            }
            before = now;
          }
        },
      ),
      { numRuns: 60 },
    );
  });

  it('says whether it moved, and a copy may begin again', async () => {
    const move = (state: SlideState) => services.state.transition('r', 'again', state, { slide: 'x.svs' });
    expect([await move('COPYING'), await move('COPYING'), await move('INGESTED')]).toEqual([
      true,
      true,
      true,
    ]);
    expect([await move('COPYING'), await move('INGESTED')]).toEqual([false, false]);
  });

  it('is found with all others of its run', async () => {
    await Promise.all(
      Array.from({ length: 60 }, (_, i) =>
        services.state.transition('many', `s${i}`, 'COPYING', { slide: 'x' }),
      ),
    );
    const found = await Array.fromAsync(services.state.slides('many'));
    expect(new Set(found.map(({ slideId }) => slideId)).size).toBe(60);
  });
});
