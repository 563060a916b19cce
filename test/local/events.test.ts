import { readdirSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { type Bury, type Deliver, Events, objectCreatedEvent } from '../../local/events.ts';
import { compilePattern } from '../../local/patterns.ts';
import { temporaryFolder, until } from './kit.ts';

const MACHINE = 'arn:aws:states:us-east-1:000000000000:stateMachine:slide-run';
const created = {
  bucket: 'landing',
  key: 'study/repo.csv',
  size: 12,
  etag: '"abc"',
  versionId: 'v1',
  sequencer: '0001',
  reason: 'PutObject' as const,
  requester: 'arn:aws:iam::000000000000:root',
};
const target = { Id: 'run', Arn: MACHINE, RoleArn: 'arn:aws:iam::000000000000:role/start' };
const rule = (detail: unknown, targets: object[] = [target], more = {}) => ({
  EventPattern: { source: ['aws.s3'], 'detail-type': ['Object Created'], detail },
  State: 'ENABLED' as const,
  Targets: targets as (typeof target)[],
  ...more,
});
const manifests = rule({
  bucket: { name: ['landing'] },
  object: { key: ['repo.csv', { suffix: '/repo.csv' }] },
});

/** Events whose target fails as often as told, what it got, and what was given up. */
function eventsTo(folder = temporaryFolder(), failures = 0, error = new Error('not now')) {
  const got: Parameters<Deliver>[0][] = [];
  const buried: Parameters<Bury>[0][] = [];
  let left = failures;
  const events = new Events({
    folder,
    deliver: async (delivery) => {
      if (left-- > 0) throw error;
      got.push(delivery);
    },
    bury: async (dead) => {
      buried.push(dead);
    },
  });
  return { events, got, buried, folder };
}

it('an object’s event has the shape that S3 gives it', () => {
  const event = objectCreatedEvent(created);
  expect(event).toEqual({
    version: '0',
    id: expect.stringMatching(/^[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-a[0-9a-f]{3}-[0-9a-f]{12}$/),
    'detail-type': 'Object Created',
    source: 'aws.s3',
    account: '000000000000',
    time: expect.stringMatching(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$/),
    region: 'us-east-1',
    resources: ['arn:aws:s3:::landing'],
    detail: {
      version: '0',
      bucket: { name: 'landing' },
      object: { key: 'study/repo.csv', size: 12, etag: 'abc', 'version-id': 'v1', sequencer: '0001' },
      'request-id': expect.stringMatching(/^[0-9A-F]{16}$/),
      requester: '000000000000',
      'source-ip-address': '127.0.0.1',
      reason: 'PutObject',
    },
  });
  expect(objectCreatedEvent(created).id).toBe(event.id);
  expect(objectCreatedEvent({ ...created, versionId: 'v2' }).id).not.toBe(event.id);
});

describe('delivery', () => {
  it('reaches the targets of rules that match, and no others', async () => {
    const { events, got } = eventsTo();
    events.putRule('manifests', manifests);
    events.putRule('others', rule({ bucket: { name: ['silver'] } }));
    events.putRule('off', rule({ bucket: { name: ['landing'] } }, [target], { State: 'DISABLED' }));
    await events.objectCreated(created);
    await events.objectCreated({ ...created, key: 'study/slide.svs' });
    await until(() => got.length === 1);
    expect(got[0]).toMatchObject({ targetArn: MACHINE, roleArn: target.RoleArn });
    expect(JSON.parse(got[0]?.input ?? '')).toMatchObject({ detail: { object: { key: 'study/repo.csv' } } });
    expect(events.pending()).toEqual([]);
    await events.close();
  });

  it('is tried again until the target accepts', async () => {
    const { events, got } = eventsTo(undefined, 2);
    events.putRule('manifests', manifests);
    await events.objectCreated(created);
    await until(() => events.pending()[0]?.lastError === 'Error: not now');
    await until(() => got.length === 1);
    await until(() => events.pending().length === 0);
    await events.close();
  });

  describe('that its target does not take', () => {
    const queue = 'arn:aws:sqs:us-east-1:000000000000:dead-events';
    const buriedRule = (RetryPolicy: object) =>
      rule({ bucket: { name: ['landing'] } }, [
        { ...target, DeadLetterConfig: { Arn: queue }, RetryPolicy } as typeof target,
      ]);

    it('goes to the dead-letter queue once its retries are used up, with what happened', async () => {
      const { events, buried } = eventsTo(undefined, Number.POSITIVE_INFINITY);
      events.putRule('manifests', buriedRule({ MaximumRetryAttempts: 1, MaximumEventAgeInSeconds: 3600 }));
      await events.objectCreated(created);
      await until(() => buried.length === 1);
      await until(() => events.pending().length === 0);
      expect(buried[0]).toMatchObject({
        queueArn: queue,
        ruleArn: 'arn:aws:events:us-east-1:000000000000:rule/manifests',
        attributes: {
          TARGET_ARN: MACHINE,
          ERROR_CODE: 'Error',
          ERROR_MESSAGE: 'not now',
          RETRY_ATTEMPTS: '1',
          EXHAUSTED_RETRY_CONDITION: 'MaximumRetryAttempts',
        },
      });
      expect(JSON.parse(buried[0]?.input ?? '')).toMatchObject({
        detail: { object: { key: 'study/repo.csv' } },
      });
      await events.close();
    });

    it('goes there at once where no retry can help', async () => {
      const denied = Object.assign(new Error('not authorized'), { name: 'AccessDenied' });
      const { events, buried } = eventsTo(undefined, Number.POSITIVE_INFINITY, denied);
      events.putRule('manifests', buriedRule({ MaximumRetryAttempts: 100, MaximumEventAgeInSeconds: 3600 }));
      await events.objectCreated(created);
      await until(() => buried.length === 1);
      expect(buried[0]?.attributes).toMatchObject({ ERROR_CODE: 'AccessDenied', RETRY_ATTEMPTS: '0' });
      await events.close();
    });
  });

  it('survives the end of the engine at any moment, under the same id', async () => {
    const dead = eventsTo(undefined, Number.POSITIVE_INFINITY);
    dead.events.putRule('manifests', manifests);
    await dead.events.objectCreated(created);
    const [waiting] = dead.events.pending();
    await dead.events.close();

    const { events, got } = eventsTo(dead.folder);
    events.recover();
    await until(() => got.length === 1);
    expect(got[0]?.id).toBe(waiting?.id);
    await until(() => readdirSync(dead.folder).length === 0);
    await events.objectCreated(created);
    expect(got).toHaveLength(1);
    await events.close();
  });

  it('of the same object version twice has the same id, so that the target can tell', async () => {
    const { events, got } = eventsTo();
    events.putRule('manifests', manifests);
    await events.objectCreated(created);
    await until(() => events.pending().length === 0);
    await events.objectCreated(created);
    await until(() => got.length === 2);
    expect(got[0]?.id).toBe(got[1]?.id);
    await events.close();
  });

  it.each([
    ['Input', { Input: '{"fixed":1}' }, { fixed: 1 }],
    ['InputPath', { InputPath: '$.detail.object.key' }, 'study/repo.csv'],
    [
      'InputTransformer',
      {
        InputTransformer: {
          InputPathsMap: { key: '$.detail.object.key', size: '$.detail.object.size', none: '$.no' },
          InputTemplate: '{"key": <key>, "text": "at <key>: <size>", "size": <size>, "none": <none>}',
        },
      },
      { key: 'study/repo.csv', text: 'at study/repo.csv: 12', size: 12, none: null },
    ],
  ])('shapes what the target gets by %s', async (_, shaping, expected) => {
    const { events, got } = eventsTo();
    events.putRule('manifests', rule({ bucket: { name: ['landing'] } }, [{ ...target, ...shaping }]));
    await events.objectCreated(created);
    await until(() => got.length === 1);
    expect(JSON.parse(got[0]?.input ?? '')).toEqual(expected);
    await events.close();
  });
});

describe('patterns', () => {
  const event = { s: 'abc', n: 5, list: ['x', 'y'], deep: { flag: true, none: null }, S: 'ABC' };
  it.each([
    [{ s: ['abc'] }, true],
    [{ s: ['ab'] }, false],
    [{ n: [5] }, true],
    [{ n: ['5'] }, false],
    [{ deep: { flag: [true], none: [null] } }, true],
    [{ deep: { other: { more: ['x'] } } }, false],
    [{ list: ['y'] }, true],
    [{ list: ['z'] }, false],
    [{ s: [{ prefix: 'ab' }] }, true],
    [{ s: [{ suffix: 'bc' }] }, true],
    [{ S: [{ prefix: { 'equals-ignore-case': 'aB' } }] }, true],
    [{ S: [{ 'equals-ignore-case': 'abc' }] }, true],
    [{ s: [{ wildcard: 'a*c' }] }, true],
    [{ s: [{ wildcard: 'a*d' }] }, false],
    [{ s: [{ wildcard: 'a.c' }] }, false],
    [{ s: [{ 'anything-but': 'abc' }] }, false],
    [{ s: [{ 'anything-but': ['x', 'y'] }] }, true],
    [{ s: [{ 'anything-but': { prefix: 'x' } }] }, true],
    [{ s: [{ 'anything-but': { suffix: ['bc', 'x'] } }] }, false],
    [{ gone: [{ 'anything-but': 'x' }] }, false],
    [{ s: [{ exists: true }] }, true],
    [{ gone: [{ exists: false }] }, true],
    [{ s: [{ exists: false }] }, false],
    [{ n: [{ numeric: ['>', 4, '<=', 5] }] }, true],
    [{ n: [{ numeric: ['<', 5] }] }, false],
    [{ s: [{ numeric: ['=', 5] }] }, false],
    [{ $or: [{ s: ['x'] }, { n: [5] }] }, true],
    [{ $or: [{ s: ['x'] }, { n: [6] }] }, false],
    [{ s: ['abc'], n: [6] }, false],
  ])('%j', (pattern, expected) => {
    expect(compilePattern(pattern, 'test')(event)).toBe(expected);
  });

  it.each([
    [{ s: [{ cidr: '10.0.0.0/8' }] }, 'cidr'],
    [{ s: [{ prefix: 1 }] }, 'prefix'],
    [{ s: 'abc' }, 's'],
    [{ n: [{ numeric: ['~', 1] }] }, 'numeric'],
    [{ s: [{ prefix: 'a', suffix: 'b' }] }, 'several operators'],
  ])('%j is refused', (pattern, named) => {
    expect(() => compilePattern(pattern, 'rule r')).toThrow(
      expect.objectContaining({ name: 'UnsupportedLocally' }),
    );
    expect(() => compilePattern(pattern, 'rule r')).toThrow(named);
  });
});

describe('a rule that would never fire here is refused', () => {
  it.each([
    [
      'a schedule that is none',
      { State: 'ENABLED' as const, Targets: [], ScheduleExpression: 'rate(1 fortnight)' },
      'rate(1 fortnight)',
    ],
    ['a schedule with a pattern', { ...manifests, ScheduleExpression: 'rate(1 day)' }, 'both'],
    [
      'a function with a role',
      rule({}, [{ ...target, Arn: 'arn:aws:lambda:us-east-1:000000000000:function:f' }]),
      'AWS::Lambda::Permission',
    ],
    [
      'another source',
      { ...manifests, EventPattern: { source: ['aws.states'], 'detail-type': ['x'] } },
      'aws.states',
    ],
    ['any source', { ...manifests, EventPattern: { 'detail-type': ['Object Created'] } }, 'source'],
    [
      'another event of S3',
      { ...manifests, EventPattern: { source: ['aws.s3'], 'detail-type': ['Object Deleted'] } },
      'Object Deleted',
    ],
    ['another target', rule({}, [{ ...target, Arn: 'arn:aws:sqs:us-east-1:1:q' }]), 'arn:aws:sqs'],
    ['a machine without role', rule({}, [{ Id: 'a', Arn: MACHINE }]), 'RoleArn'],
    ['two shapes of input', rule({}, [{ ...target, Input: '1', InputPath: '$.a' }]), 'more than one of'],
    ['a path that is not one', rule({}, [{ ...target, InputPath: '$..a' }]), '$..a'],
  ])('%s', (_, properties, named) => {
    const { events } = eventsTo();
    expect(() => events.putRule('r', properties)).toThrow(named);
    expect(() => events.putRule('r', properties)).toThrow(
      expect.objectContaining({ name: 'UnsupportedLocally' }),
    );
  });
});
