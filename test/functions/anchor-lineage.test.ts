import { afterAll, beforeAll, expect, it } from 'vitest';
import { anchoredHeads, listAnchors, readAnchor } from '../../core/anchor.ts';
import { CREDENTIALS, type Services, startServices } from '../support/services.ts';

let services: Services;
beforeAll(async () => {
  services = await startServices();
  await services.createBucket('anchors', 'GOVERNANCE');
  for (const slideId of ['a', 'b', 'b']) {
    const id = `${slideId}${Math.random()}`;
    await services.lineage.append({ slideId }, { id, action: 'SLIDE_INGESTED', runId: 'r' });
  }
  Object.assign(process.env, {
    AWS_ENDPOINT_URL: services.endpoint,
    AWS_REGION: 'us-east-1',
    AWS_ACCESS_KEY_ID: CREDENTIALS.accessKeyId,
    AWS_SECRET_ACCESS_KEY: CREDENTIALS.secretAccessKey,
    LINEAGE_TABLE: 'lineage',
    ANCHORS_BUCKET: 'anchors',
    STAGE: 'test',
    CODE_VERSION: '0.1.0',
    POWERTOOLS_SERVICE_NAME: 'anchor-lineage',
    POWERTOOLS_METRICS_NAMESPACE: 'Slideway',
    POWERTOOLS_LOG_LEVEL: 'SILENT',
  });
});
afterAll(() => services.close());

it('a scheduled event anchors the last event of every chain, and a repeated one adds nothing', async () => {
  const { handler } = await import('../../functions/anchor-lineage/handler.ts');
  const context = { functionName: 'anchor-lineage', awsRequestId: '1' } as never;
  const event = { 'detail-type': 'Scheduled Event', source: 'aws.events', time: '2026-11-20T02:15:00Z' };
  const first = await handler(event, context);
  expect(first).toMatchObject({ chains: 2, broken: 0, taken: true });
  expect(await handler(event, context)).toEqual({ ...first, taken: false });

  const [placed, ...more] = await listAnchors(services.s3, 'anchors');
  expect(more).toEqual([]);
  if (!placed) throw new Error('there is no anchor');
  const anchor = await readAnchor(services.s3, placed);
  expect(anchor).toMatchObject({ actor: 'anchor-lineage', codeVersion: '0.1.0', previous: null });
  const heads = await Array.fromAsync(anchoredHeads(services.s3, 'anchors', anchor));
  expect(heads.map(({ pk, sk }) => `${pk} ${Number(sk)}`).sort()).toEqual(['SLIDE#a 1', 'SLIDE#b 2']);
});
