import { QueryCommand } from '@aws-sdk/lib-dynamodb';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { canonicalJson, hashEvent, type LineageItem } from '../../core/lineage.ts';
import { type Services, startServices } from '../support/services.ts';

let services: Services;
beforeAll(async () => {
  services = await startServices();
});
afterAll(() => services.close());

async function chain(pk: string): Promise<LineageItem[]> {
  const { Items } = await services.documents.send(
    new QueryCommand({
      TableName: 'lineage',
      KeyConditionExpression: 'pk = :pk',
      ExpressionAttributeValues: { ':pk': pk },
    }),
  );
  return (Items ?? []) as LineageItem[];
}

function expectWhole(items: LineageItem[]): void {
  let previous = '0'.repeat(64);
  for (const [index, { hash, ...rest }] of items.entries()) {
    expect(Number(rest.sk)).toBe(index + 1);
    expect(rest.prevHash).toBe(previous);
    expect(hashEvent(rest)).toBe(hash);
    previous = hash;
  }
}

describe('the lineage of a slide', () => {
  it('is a chain: each event holds the hash of the one before', async () => {
    for (const action of ['SLIDE_INGESTED', 'SLIDE_INFERRED', 'SLIDE_AGGREGATED']) {
      await services.lineage.append(
        { slideId: 'a' },
        { id: action, action, runId: 'r', parameters: { z: 1, a: [undefined, 'ü'] } },
      );
    }
    const items = await chain('SLIDE#a');
    expect(items.map(({ action, actor }) => [action, actor])).toEqual([
      ['SLIDE_INGESTED', 'test'],
      ['SLIDE_INFERRED', 'test'],
      ['SLIDE_AGGREGATED', 'test'],
    ]);
    expectWhole(items);
  });

  it('holds an event once, however often it is appended', async () => {
    const event = { id: 'once', action: 'SLIDE_INGESTED', runId: 'r' };
    for (let i = 0; i < 3; i++) await services.lineage.append({ slideId: 'b' }, event);
    expect(await chain('SLIDE#b')).toHaveLength(1);
  });

  it('stays a chain when many write at once', async () => {
    await Promise.all(
      Array.from({ length: 10 }, (_, i) =>
        services.lineage.append({ runId: 'busy' }, { id: `e${i}`, action: 'X', runId: 'busy' }),
      ),
    );
    const items = await chain('RUN#busy');
    expect(items).toHaveLength(10);
    expectWhole(items);
  });

  it('shows an altered event', async () => {
    await services.lineage.append(
      { slideId: 'c' },
      { id: '1', action: 'SLIDE_INGESTED', runId: 'r', reason: 'true' },
    );
    const [item] = await chain('SLIDE#c');
    const { hash, ...rest } = item as LineageItem;
    expect(hashEvent({ ...rest, reason: 'false' })).not.toBe(hash);
  });
});

it('canonical JSON does not depend on the order of members', () => {
  expect(canonicalJson({ b: 1, a: { d: null, c: [1, 'x'] }, e: undefined })).toBe(
    '{"a":{"c":[1,"x"],"d":null},"b":1}',
  );
  expect(canonicalJson({ a: { c: [1, 'x'], d: null }, b: 1 })).toBe('{"a":{"c":[1,"x"],"d":null},"b":1}');
});
