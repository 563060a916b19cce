/** Distributed Maps over a real S3: where items come from, what children do, and what is left of them. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { GetObjectCommand, ListObjectsV2Command, PutObjectCommand } from '@aws-sdk/client-s3';
import {
  DescribeMapRunCommand,
  GetExecutionHistoryCommand,
  ListMapRunsCommand,
  StartExecutionCommand,
} from '@aws-sdk/client-sfn';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { functionArn, type Host, machineArn, ROLE, startHost } from './stepfunctions-host.ts';

type Payload = Record<string, unknown>;

const folder = mkdtempSync(join(tmpdir(), 'slideway-map-'));
const calls: Payload[] = [];
let atOnce = 0;
let mostAtOnce = 0;
let host: Host;

const functions = {
  /** Fails where the item says so. */
  work: async (payload: Payload & { item?: { error?: string } }) => {
    calls.push(payload);
    atOnce += 1;
    mostAtOnce = Math.max(mostAtOnce, atOnce);
    await new Promise((resolve) => setTimeout(resolve, 5));
    atOnce -= 1;
    const error = payload.item?.error;
    if (error) throw Object.assign(new Error('it broke'), { name: error });
    return { done: payload.item ?? payload };
  },
  quick: (payload: unknown) => payload,
  big: () => 'x'.repeat(100_000),
};

beforeAll(async () => {
  host = await startHost({ folder, functions, timeScale: 0.01 });
});
afterAll(async () => {
  await host.close();
  rmSync(folder, { recursive: true, force: true });
});
beforeEach(() => {
  calls.length = 0;
  mostAtOnce = 0;
  host.asked.length = 0;
  host.denied.clear();
});

const put = (key: string, text: string) =>
  host.s3.send(new PutObjectCommand({ Bucket: 'silver', Key: key, Body: text }));
const get = async (key: string) => {
  const object = await host.s3.send(new GetObjectCommand({ Bucket: 'silver', Key: key }));
  return (await object.Body?.transformToString()) ?? '';
};
const jsonl = (items: unknown[]) => items.map((item) => `${JSON.stringify(item)}\n`).join('');

const WORK = { Work: { Type: 'Task', Resource: functionArn('work'), End: true } };
const WRITER = {
  Resource: 'arn:aws:states:::s3:putObject',
  Parameters: { Bucket: 'silver', 'Prefix.$': "States.Format('runs/{}/maps', $.run)" },
};
const reader = (
  config: Payload,
  parameters: Payload = { 'Bucket.$': '$.items.bucket', 'Key.$': '$.items.key' },
) => ({
  Resource: 'arn:aws:states:::s3:getObject',
  ReaderConfig: config,
  Parameters: parameters,
});
const SELECTOR = { 'run.$': '$.run', 'item.$': '$$.Map.Item.Value', 'index.$': '$$.Map.Item.Index' };
const map = (more: Payload = {}, states: Payload = WORK, type = 'STANDARD'): Payload => ({
  Type: 'Map',
  Label: 'Ingest',
  ItemProcessor: {
    ProcessorConfig: { Mode: 'DISTRIBUTED', ExecutionType: type },
    StartAt: Object.keys(states)[0],
    States: states,
  },
  ...('Next' in more ? {} : { End: true }),
  ...more,
});

let machines = 0;
async function start(states: Record<string, Payload>, input: unknown = {}): Promise<string> {
  machines += 1;
  const arn = machineArn(`map-${machines}`);
  const definition = { StartAt: Object.keys(states)[0], States: states };
  host.stepFunctions.createStateMachine({ name: `map-${machines}`, arn, roleArn: ROLE, definition });
  const started = await host.sfn.send(
    new StartExecutionCommand({ stateMachineArn: arn, name: 'one', input: JSON.stringify(input) }),
  );
  return started.executionArn ?? '';
}
const run = async (states: Record<string, Payload>, input: unknown = {}) =>
  host.outcome(await start(states, input));
const INPUT = { run: 'r1', items: { bucket: 'silver', key: 'items' } };

describe('items', () => {
  test('JSONL: one child a line, selected with the state input and its index', async () => {
    await put('items', '{"a":1}\n\n{"a":2}\r\n{"a":3}');
    const { output } = await run(
      { M: map({ ItemReader: reader({ InputType: 'JSONL' }), ItemSelector: SELECTOR }) },
      INPUT,
    );
    expect(output).toEqual([{ done: { a: 1 } }, { done: { a: 2 } }, { done: { a: 3 } }]);
    expect(calls).toContainEqual({ run: 'r1', item: { a: 2 }, index: 1 });
    expect(host.asked).toContain('slide-run s3:GetObject');
  });

  test('the version that is named is read', async () => {
    const { VersionId } = await put('items', '1\n');
    await put('items', '2\n3\n');
    const parameters = { Bucket: 'silver', Key: 'items', 'VersionId.$': '$.version' };
    const { output } = await run(
      { M: map({ ItemReader: reader({ InputType: 'JSONL' }, parameters) }) },
      { version: VersionId },
    );
    expect(output).toEqual([{ done: 1 }]);
  });

  test('JSON: the elements of an array, at most MaxItems', async () => {
    await put('items', '[1, 2, 3]');
    const { output } = await run(
      { M: map({ ItemReader: reader({ InputType: 'JSON', MaxItems: 2 }) }) },
      INPUT,
    );
    expect(output).toEqual([{ done: 1 }, { done: 2 }]);
  });

  test('CSV: rows by the header of the first row, or by given headers', async () => {
    await put('items', 'slide;stain\n"a;b.svs";HE\n');
    const first = { InputType: 'CSV', CSVHeaderLocation: 'FIRST_ROW', CSVDelimiter: 'SEMICOLON' };
    expect((await run({ M: map({ ItemReader: reader(first) }) }, INPUT)).output).toEqual([
      { done: { slide: 'a;b.svs', stain: 'HE' } },
    ]);
    const given = {
      InputType: 'CSV',
      CSVHeaderLocation: 'GIVEN',
      CSVHeaders: ['x', 'y'],
      CSVDelimiter: 'SEMICOLON',
    };
    expect((await run({ M: map({ ItemReader: reader(given) }) }, INPUT)).output).toHaveLength(2);
  });

  test('a listing: key, size, ETag and time of each object under the prefix', async () => {
    await put('listed/a', 'one');
    await put('listed/b', 'three');
    const ItemReader = {
      Resource: 'arn:aws:states:::s3:listObjectsV2',
      Parameters: { Bucket: 'silver', Prefix: 'listed/' },
    };
    const { output } = await run({ M: map({ ItemReader }) });
    expect(output).toMatchObject([
      { done: { Key: 'listed/a', Size: 3 } },
      { done: { Key: 'listed/b', Size: 5 } },
    ]);
    expect(output[0].done).toMatchObject({ Etag: expect.any(String), LastModified: expect.any(Number) });
  });

  test('the array of the state input, by ItemsPath', async () => {
    const { output } = await run({ M: map({ ItemsPath: '$.slides' }) }, { slides: ['a', 'b'] });
    expect(output).toEqual([{ done: 'a' }, { done: 'b' }]);
  });

  test('none at all is a success', async () => {
    await put('items', '\n');
    expect((await run({ M: map({ ItemReader: reader({ InputType: 'JSONL' }) }) }, INPUT)).output).toEqual([]);
  });

  test.each([
    ['is not there', 'nowhere', () => undefined],
    ['may not be read', 'items', () => host.denied.add('s3:GetObject')],
    ['is not JSON', 'broken', () => undefined],
  ])('an object that %s is States.ItemReaderFailed, which the state can catch', async (_, key, prepare) => {
    await put('items', '1\n');
    await put('broken', '{"a":\n');
    prepare();
    const { output } = await run(
      {
        M: map({
          ItemReader: reader({ InputType: 'JSONL' }),
          Catch: [{ ErrorEquals: ['States.ItemReaderFailed'], Next: 'Caught' }],
        }),
        Caught: { Type: 'Succeed' },
      },
      { items: { bucket: 'silver', key } },
    );
    expect(output.Error).toBe('States.ItemReaderFailed');
    expect(output.Cause).not.toBe('');
  });
});

describe('children', () => {
  test('are executions of their own, at most MaxConcurrency at once', async () => {
    const look = {
      Look: {
        Type: 'Pass',
        Parameters: {
          'id.$': '$$.Execution.Id',
          'input.$': '$$.Execution.Input',
          'name.$': '$$.Execution.Name',
        },
        Next: 'Work',
      },
      ...WORK,
    };
    const { output } = await run(
      { M: map({ ItemsPath: '$.slides', MaxConcurrency: 3 }, look) },
      { slides: [...'abcdefghij'] },
    );
    expect(mostAtOnce).toBe(3);
    const ids = output.map(({ done }: { done: { id: string } }) => done.id);
    expect(new Set(ids).size).toBe(10);
    expect(ids[0]).toMatch(
      new RegExp(`^arn:aws:states:us-east-1:000000000000:execution:map-${machines}/Ingest:[0-9a-f-]{36}$`),
    );
    expect(output[4].done.input).toBe('e');
  });

  test('transitions of EXPRESS children are counted apart', async () => {
    const standard = await start({ M: map({ ItemsPath: '$.slides' }) }, { slides: [1, 2] });
    await host.outcome(standard);
    expect(host.stepFunctions.transitions(standard)).toEqual({ standard: 3, express: 0 });
    const express = await start({ M: map({ ItemsPath: '$.slides' }, WORK, 'EXPRESS') }, { slides: [1, 2] });
    await host.outcome(express);
    expect(host.stepFunctions.transitions(express)).toEqual({ standard: 1, express: 2 });
  });

  test('a child with an input above 256 KiB fails with States.DataLimitExceeded, the others go on', async () => {
    await put('items', jsonl([{ text: 'x'.repeat(300_000) }, { text: 'y' }]));
    const { output } = await run(
      {
        M: map({
          ItemReader: reader({ InputType: 'JSONL' }),
          ToleratedFailureCount: 1,
          ResultWriter: WRITER,
        }),
      },
      INPUT,
    );
    const manifest = JSON.parse(await get(output.ResultWriterDetails.Key));
    const failed = JSON.parse(await get(manifest.ResultFiles.FAILED[0].Key));
    expect(failed).toMatchObject([{ Error: 'States.DataLimitExceeded', Status: 'FAILED' }]);
    expect(calls).toEqual([{ text: 'y' }]);
  });

  test('outputs that are together above 256 KiB need a ResultWriter', async () => {
    const big = { Big: { Type: 'Task', Resource: functionArn('big'), End: true } };
    const without = await start({ M: map({ ItemsPath: '$.slides' }, big) }, { slides: [1, 2, 3] });
    expect(await host.outcome(without)).toMatchObject({
      status: 'FAILED',
      error: 'States.DataLimitExceeded',
    });
    const withWriter = await start(
      { M: map({ ItemsPath: '$.slides', ResultWriter: WRITER }, big) },
      { run: 'r', slides: [1, 2, 3] },
    );
    expect((await host.outcome(withWriter)).status).toBe('SUCCEEDED');
    expect(host.stepFunctions.largestPayload(withWriter)).toBe(100_002);
  });
});

describe('results', () => {
  const items = [{ id: 1 }, { id: 2, error: 'Broken' }, { id: 3 }];

  test('tolerated failures: both result files and the manifest are as AWS documents them', async () => {
    const arn = await start(
      {
        M: map({
          ItemsPath: '$.slides',
          ItemSelector: SELECTOR,
          ToleratedFailurePercentage: 50,
          ResultWriter: WRITER,
          ResultSelector: { 'manifest.$': '$.ResultWriterDetails' },
          ResultPath: '$.ingest',
        }),
      },
      { run: 'r1', slides: items },
    );
    const { output } = await host.outcome(arn);
    expect(output.run).toBe('r1');
    const { Bucket, Key } = output.ingest.manifest;
    expect(Bucket).toBe('silver');
    expect(Key).toMatch(/^runs\/r1\/maps\/[0-9a-f-]{36}\/manifest\.json$/);
    const base = Key.slice(0, -'manifest.json'.length);
    const manifest = JSON.parse(await get(Key));
    expect(manifest).toEqual({
      DestinationBucket: 'silver',
      MapRunArn: expect.stringMatching(`:mapRun:map-${machines}/Ingest:`),
      ResultFiles: {
        FAILED: [{ Key: `${base}FAILED_0.json`, Size: (await get(`${base}FAILED_0.json`)).length }],
        PENDING: [],
        SUCCEEDED: [{ Key: `${base}SUCCEEDED_0.json`, Size: (await get(`${base}SUCCEEDED_0.json`)).length }],
      },
    });
    const succeeded = JSON.parse(await get(`${base}SUCCEEDED_0.json`));
    expect(succeeded.map(({ Output }: { Output: string }) => JSON.parse(Output).done.id).sort()).toEqual([
      1, 3,
    ]);
    expect(succeeded[0]).toMatchObject({
      ExecutionArn: expect.stringContaining('/Ingest:'),
      Input: expect.stringContaining('"run":"r1"'),
      Name: expect.any(String),
      StateMachineArn: `${machineArn(`map-${machines}`)}/Ingest`,
      Status: 'SUCCEEDED',
      StartDate: expect.stringMatching(/Z$/),
    });
    const [failed] = JSON.parse(await get(`${base}FAILED_0.json`));
    expect(failed).toMatchObject({ Error: 'Broken', Status: 'FAILED' });
    expect(JSON.parse(failed.Cause).errorMessage).toBe('it broke');

    const { mapRuns } = await host.sfn.send(new ListMapRunsCommand({ executionArn: arn }));
    const mapRunArn = mapRuns?.[0]?.mapRunArn;
    expect(mapRunArn).toBe(manifest.MapRunArn);
    const described = await host.sfn.send(new DescribeMapRunCommand({ mapRunArn }));
    expect(described).toMatchObject({
      status: 'SUCCEEDED',
      toleratedFailurePercentage: 50,
      startDate: expect.any(Date),
      itemCounts: { total: 3, succeeded: 2, failed: 1, pending: 0, running: 0, resultsWritten: 3 },
    });
    const history = await host.sfn.send(new GetExecutionHistoryCommand({ executionArn: arn }));
    expect(history.events?.map(({ type }) => type)).toEqual([
      'ExecutionStarted',
      'MapStateEntered',
      'MapRunStarted',
      'MapRunSucceeded',
      'MapStateExited',
      'ExecutionSucceeded',
    ]);
  });

  test.each([
    ['no tolerance', {}],
    ['a count that is exceeded', { ToleratedFailureCount: 0 }],
    ['a percentage that is exceeded', { ToleratedFailurePercentagePath: '$.percentage' }],
  ])('%s ends the map with States.ExceedToleratedFailureThreshold', async (_, tolerance) => {
    const slides = [{ error: 'Broken' }, ...Array.from({ length: 9 }, (_unused, id) => ({ id }))];
    const { output } = await run(
      {
        M: map({
          ItemsPath: '$.slides',
          ItemSelector: SELECTOR,
          MaxConcurrency: 1,
          ResultWriter: WRITER,
          ...tolerance,
          Catch: [
            {
              ErrorEquals: ['States.ExceedToleratedFailureThreshold'],
              ResultPath: '$.failure',
              Next: 'Caught',
            },
          ],
        }),
        Caught: { Type: 'Succeed' },
      },
      { run: `threshold-${machines}`, percentage: 5, slides },
    );
    expect(output.failure.Cause).toContain('tolerated failure threshold was exceeded');
    expect(calls).toHaveLength(1);
    const { Contents = [] } = await host.s3.send(
      new ListObjectsV2Command({ Bucket: 'silver', Prefix: `runs/threshold-${machines - 1}/maps/` }),
    );
    const file = (name: string) => Contents.find(({ Key = '' }) => Key.endsWith(name))?.Key ?? '';
    expect(JSON.parse(await get(file('FAILED_0.json')))).toHaveLength(1);
    expect(JSON.parse(await get(file('PENDING_0.json')))).toHaveLength(9);
  });

  test('Retry of the Map state runs it anew', async () => {
    let reads = 0;
    host.denied.add('s3:GetObject');
    await put('items', '1\n');
    const arn = await start(
      {
        M: map({
          ItemReader: reader({ InputType: 'JSONL' }),
          Retry: [{ ErrorEquals: ['States.ItemReaderFailed'], IntervalSeconds: 20, MaxAttempts: 2 }],
        }),
      },
      INPUT,
    );
    while (reads === 0) {
      await new Promise((resolve) => setTimeout(resolve, 10));
      reads = host.asked.filter((action) => action === 'slide-run s3:GetObject').length;
    }
    host.denied.clear();
    expect(await host.outcome(arn)).toMatchObject({ status: 'SUCCEEDED', output: [{ done: 1 }] });
  });

  test.each([
    ['COMPACT', 'JSON', [[1], [2]]],
    ['FLATTEN', 'JSONL', [1, 2]],
  ])('WriterConfig %s as %s', async (Transformation, OutputType, expected) => {
    const list = {
      List: { Type: 'Pass', Parameters: { 'v.$': 'States.Array($)' }, OutputPath: '$.v', End: true },
    };
    const { output } = await run(
      {
        M: map(
          {
            ItemsPath: '$.slides',
            MaxConcurrency: 1,
            ResultWriter: { ...WRITER, WriterConfig: { Transformation, OutputType } },
          },
          list,
        ),
      },
      { run: 'r', slides: [1, 2] },
    );
    const { SUCCEEDED } = JSON.parse(await get(output.ResultWriterDetails.Key)).ResultFiles;
    const text = await get(SUCCEEDED[0].Key);
    expect(
      OutputType === 'JSON'
        ? JSON.parse(text)
        : text
            .trim()
            .split('\n')
            .map((line) => JSON.parse(line)),
    ).toEqual(expected);
    expect(SUCCEEDED[0].Key).toMatch(OutputType === 'JSON' ? /\.json$/ : /\.jsonl$/);
  });

  test('a bucket that may not be written is States.ResultWriterFailed', async () => {
    host.denied.add('s3:PutObject');
    const { error } = await run(
      { M: map({ ItemsPath: '$.slides', ResultWriter: WRITER }) },
      { run: 'r', slides: [1] },
    );
    expect(error).toBe('States.ResultWriterFailed');
  });
});

test('20,000 items run in bounded memory', async () => {
  await put('items', jsonl(Array.from({ length: 20_000 }, (_, id) => ({ id, text: 'x'.repeat(1000) }))));
  const quick = { Quick: { Type: 'Task', Resource: functionArn('quick'), End: true } };
  global.gc?.();
  const before = process.memoryUsage().heapUsed;
  let most = 0;
  const watch = setInterval(() => {
    most = Math.max(most, process.memoryUsage().heapUsed - before);
  }, 50);
  const started = Date.now();
  const arn = await start(
    {
      M: map(
        { ItemReader: reader({ InputType: 'JSONL' }), ItemSelector: SELECTOR, ResultWriter: WRITER },
        quick,
        'EXPRESS',
      ),
    },
    INPUT,
  );
  const { output, status } = await host.outcome(arn);
  clearInterval(watch);
  expect(status).toBe('SUCCEEDED');
  expect(Date.now() - started).toBeLessThan(60_000);
  // Inputs and outputs are 80 MB of text, some times that as objects; what is held is a share, and garbage.
  expect(most).toBeLessThan(250 * 1024 * 1024);
  const { mapRuns } = await host.sfn.send(new ListMapRunsCommand({ executionArn: arn }));
  const described = await host.sfn.send(new DescribeMapRunCommand({ mapRunArn: mapRuns?.[0]?.mapRunArn }));
  expect(described.itemCounts).toMatchObject({ total: 20_000, succeeded: 20_000 });
  const manifest = JSON.parse(await get(output.ResultWriterDetails.Key));
  expect(manifest.ResultFiles.SUCCEEDED[0].Size).toBeGreaterThan(40_000_000);
  expect(host.stepFunctions.largestPayload(arn)).toBeLessThan(2000);
}, 120_000);
