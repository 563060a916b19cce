import { appendFileSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  CloudWatchLogsClient,
  DescribeLogStreamsCommand,
  FilterLogEventsCommand,
  GetLogEventsCommand,
  type GetLogEventsCommandInput,
  paginateFilterLogEvents,
} from '@aws-sdk/client-cloudwatch-logs';
import { afterAll, afterEach, beforeAll, beforeEach, expect, it, vi } from 'vitest';
import { Gateway } from '../../local/gateway.ts';
import { Logs } from '../../local/logs.ts';
import { type JsonOperation, ServiceError } from '../../local/types.ts';

const GROUP = '/aws/sagemaker/ProcessingJobs';

let folder: string;
let logs: Logs;
let gateway: Gateway;
let client: CloudWatchLogsClient;
let denied: string | undefined;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'logs-'));
  logs = new Logs({ folder });
  denied = undefined;
});
afterEach(() => {
  vi.useRealTimers();
  rmSync(folder, { recursive: true, force: true });
});
beforeAll(async () => {
  const forward =
    (name: string): JsonOperation =>
    (input, caller) =>
      logs.operations[name]?.(input, caller) ?? Promise.reject(new Error(name));
  const names = ['DescribeLogStreams', 'GetLogEvents', 'FilterLogEvents'];
  gateway = new Gateway({
    services: {
      logs: {
        protocol: 'json',
        service: { operations: Object.fromEntries(names.map((name) => [name, forward(name)])) },
      },
    },
    principals: () => ({
      caller: {
        arn: 'root',
        authorize(action, resource) {
          if (action === denied) throw new ServiceError('AccessDeniedException', `${action} on ${resource}`);
        },
      },
      secretAccessKey: 'secret',
    }),
  });
  await gateway.listen(0);
  client = new CloudWatchLogsClient({
    region: 'us-east-1',
    endpoint: gateway.endpoint,
    credentials: { accessKeyId: 'KEY', secretAccessKey: 'secret' },
  });
});
afterAll(() => gateway.close());

const get = (more: Partial<GetLogEventsCommandInput> = {}) =>
  client.send(new GetLogEventsCommand({ logGroupName: GROUP, logStreamName: 'job/algo-1', ...more }));
const messages = ({ events = [] }: { events?: { message?: string | undefined }[] | undefined }) =>
  events.map((event) => event.message);

it('gives back the lines of a stream in order, whatever they hold', async () => {
  const lines = ['first', '{"level":"INFO"}', 'µm — 切片', 'a\tb', ''];
  logs.append(GROUP, 'job/algo-1', lines.slice(0, 2));
  logs.append(GROUP, 'job/algo-1', lines.slice(2));
  const { events = [] } = await get({ startFromHead: true });
  expect(messages({ events })).toEqual(lines);
  expect(events[0]?.timestamp).toBeGreaterThan(Date.now() - 60_000);
});

it('reads forward from the head until the token stays the same', async () => {
  logs.append(GROUP, 'job/algo-1', ['1', '2', '3', '4', '5']);
  const read: (string | undefined)[][] = [];
  let token: string | undefined;
  for (;;) {
    const page = await get({ startFromHead: true, limit: 2, ...(token && { nextToken: token }) });
    read.push(messages(page));
    if (page.nextForwardToken === token) break;
    token = page.nextForwardToken;
  }
  expect(read).toEqual([['1', '2'], ['3', '4'], ['5'], []]);
  logs.append(GROUP, 'job/algo-1', ['6']);
  expect(messages(await get({ nextToken: token }))).toEqual(['6']);
});

it('reads the newest first page, and backward from there', async () => {
  logs.append(GROUP, 'job/algo-1', ['1', '2', '3']);
  const newest = await get({ limit: 2 });
  expect(messages(newest)).toEqual(['2', '3']);
  const older = await get({ limit: 2, nextToken: newest.nextBackwardToken });
  expect(messages(older)).toEqual(['1']);
  const none = await get({ limit: 2, nextToken: older.nextBackwardToken });
  expect(messages(none)).toEqual([]);
  expect(none.nextBackwardToken).toBe(older.nextBackwardToken);
});

it('keeps lines over an end of the engine, also one that came within a line', async () => {
  logs.append(GROUP, 'job/algo-1', ['before']);
  const [group = ''] = readdirSync(folder);
  const [stream = ''] = readdirSync(join(folder, group));
  appendFileSync(join(folder, group, stream), '{"timestamp":1,"mess');
  logs = new Logs({ folder });
  logs.append(GROUP, 'job/algo-1', ['after']);
  expect(messages(await get({ startFromHead: true }))).toEqual(['before', 'after']);
});

it('keeps names apart that look alike as files, and within its folder', async () => {
  const names = ['job/algo-1', 'job_algo-1', '../../escape', `${'x'.repeat(400)}/1`, `${'x'.repeat(400)}/2`];
  for (const name of names) logs.append(GROUP, name, [name]);
  for (const name of names) expect(messages(await get({ logStreamName: name }))).toEqual([name]);
  const files = readdirSync(folder, { recursive: true, withFileTypes: true }).filter((entry) =>
    entry.isFile(),
  );
  expect(files).toHaveLength(names.length);
  for (const file of files)
    expect(names).toContain(
      JSON.parse(readFileSync(join(file.parentPath, file.name), 'utf8').split('\n')[0] ?? '').logStreamName,
    );
});

it('lists streams by prefix and by their last event, a page at a time', async () => {
  vi.useFakeTimers({ toFake: ['Date'] });
  for (const [name, time] of [
    ['a/1', 1000],
    ['a/2', 3000],
    ['b/1', 2000],
  ] as const) {
    vi.setSystemTime(time);
    logs.append(GROUP, name, ['line']);
  }
  vi.useRealTimers();
  const list = async (more: object) => {
    const page = await client.send(new DescribeLogStreamsCommand({ logGroupName: GROUP, ...more }));
    return [page.logStreams?.map((stream) => stream.logStreamName), page.nextToken];
  };
  expect(await list({ logStreamNamePrefix: 'a/' })).toEqual([['a/1', 'a/2'], undefined]);
  expect(await list({ orderBy: 'LastEventTime', descending: true })).toEqual([
    ['a/2', 'b/1', 'a/1'],
    undefined,
  ]);
  const [names, nextToken] = await list({ limit: 2 });
  expect(names).toEqual(['a/1', 'a/2']);
  expect(await list({ limit: 2, nextToken })).toEqual([['b/1'], undefined]);
  await expect(list({ orderBy: 'LastEventTime', logStreamNamePrefix: 'a' })).rejects.toMatchObject({
    name: 'InvalidParameterException',
  });
});

it('filters over streams by terms, time and prefix', async () => {
  vi.useFakeTimers({ toFake: ['Date'] });
  vi.setSystemTime(1000);
  logs.append(GROUP, 'a/1', ['ERROR reading tile', 'INFO reading tile']);
  vi.setSystemTime(2000);
  logs.append(GROUP, 'a/2', ['ERROR no pixel size']);
  logs.append(GROUP, 'b/1', ['ERROR elsewhere']);
  vi.useRealTimers();
  const filter = async (more: object) =>
    messages(await client.send(new FilterLogEventsCommand({ logGroupName: GROUP, ...more })));
  expect(await filter({ logStreamNamePrefix: 'a/', filterPattern: 'ERROR' })).toEqual([
    'ERROR reading tile',
    'ERROR no pixel size',
  ]);
  expect(await filter({ filterPattern: 'ERROR -elsewhere ?pixel ?tile' })).toHaveLength(2);
  expect(await filter({ filterPattern: '"pixel size"' })).toEqual(['ERROR no pixel size']);
  expect(await filter({ startTime: 2000, logStreamNames: ['a/1', 'a/2'] })).toEqual(['ERROR no pixel size']);
  expect(await filter({ endTime: 2000 })).toHaveLength(2);
  await expect(filter({ filterPattern: '{ $.level = "ERROR" }' })).rejects.toMatchObject({
    name: 'InvalidParameterException',
  });
  const paged: unknown[] = [];
  for await (const page of paginateFilterLogEvents({ client, pageSize: 3 }, { logGroupName: GROUP }))
    paged.push(messages(page).length);
  expect(paged).toEqual([3, 1]);
});

it('says so when there is no such group, stream or right', async () => {
  await expect(get()).rejects.toMatchObject({ name: 'ResourceNotFoundException' });
  await expect(client.send(new DescribeLogStreamsCommand({ logGroupName: 'none' }))).rejects.toMatchObject({
    name: 'ResourceNotFoundException',
  });
  logs.append(GROUP, 'job/algo-1', ['line']);
  await expect(get({ nextToken: 'x/y' })).rejects.toMatchObject({ name: 'InvalidParameterException' });
  denied = 'logs:GetLogEvents';
  await expect(get()).rejects.toMatchObject({ name: 'AccessDeniedException' });
});
