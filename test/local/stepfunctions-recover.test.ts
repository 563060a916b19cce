/** An execution goes on after a SIGKILL wherever it struck, and nothing that was done is done again. */
import { spawn } from 'node:child_process';
import { appendFileSync, existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { PutObjectCommand } from '@aws-sdk/client-s3';
import {
  DescribeExecutionCommand,
  GetExecutionHistoryCommand,
  StartExecutionCommand,
} from '@aws-sdk/client-sfn';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import {
  effectsFile,
  functionArn,
  type Host,
  machineArn,
  type ProgramOptions,
  ROLE,
  startHost,
} from './stepfunctions-host.ts';

type Payload = Record<string, unknown>;

const ITEMS = 12;
const MAX_CONCURRENCY = 3;
const JOBS = ['job-a', 'job-b'];

const work = (name: string, next: Payload) => ({
  Type: 'Task',
  Resource: functionArn('work'),
  Parameters: { name },
  ResultPath: null,
  ...next,
});
/** Every way in which an execution is not at a plain task. */
const DEFINITION = {
  StartAt: 'Plan',
  States: {
    Plan: work('plan', { Next: 'Ingest' }),
    Ingest: {
      Type: 'Map',
      ItemReader: {
        Resource: 'arn:aws:states:::s3:getObject',
        ReaderConfig: { InputType: 'JSONL' },
        Parameters: { Bucket: 'silver', Key: 'items' },
      },
      ItemSelector: {
        'name.$': "States.Format('slide-{}', $$.Map.Item.Value)",
        'time.$': '$$.Execution.StartTime',
      },
      MaxConcurrency: MAX_CONCURRENCY,
      ItemProcessor: {
        ProcessorConfig: { Mode: 'DISTRIBUTED', ExecutionType: 'STANDARD' },
        StartAt: 'Slide',
        States: { Slide: { Type: 'Task', Resource: functionArn('work'), End: true } },
      },
      ResultWriter: {
        Resource: 'arn:aws:states:::s3:putObject',
        Parameters: { Bucket: 'silver', Prefix: 'maps' },
      },
      ResultPath: '$.ingest',
      Next: 'Wait',
    },
    Wait: { Type: 'Wait', Seconds: 5, Next: 'Jobs' },
    Jobs: {
      Type: 'Map',
      ItemsPath: '$.jobs',
      ItemProcessor: {
        StartAt: 'Job',
        States: {
          Job: {
            Type: 'Task',
            Resource: 'arn:aws:states:::sagemaker:createProcessingJob.sync',
            Parameters: { 'ProcessingJobName.$': '$' },
            ResultSelector: { 'name.$': '$.ProcessingJobName' },
            Next: 'Record',
          },
          Record: work('record', { End: true }),
        },
      },
      ResultPath: '$.done',
      Next: 'Publish',
    },
    Publish: work('publish', { End: true }),
  },
};

/** How often each event is in the history. */
const EVENTS = {
  ...{ ExecutionStarted: 1, ExecutionSucceeded: 1, WaitStateEntered: 1, WaitStateExited: 1 },
  ...{ TaskStateEntered: 6, TaskStateExited: 6, TaskScheduled: 2, TaskSucceeded: 2 },
  ...{ LambdaFunctionScheduled: 4, LambdaFunctionSucceeded: 4 },
  ...{ MapStateEntered: 2, MapStateExited: 2, MapRunStarted: 1, MapRunSucceeded: 1 },
  ...{ MapStateStarted: 1, MapStateSucceeded: 1, MapIterationStarted: 2, MapIterationSucceeded: 2 },
};

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'slideway-kill-'));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

/** Runs the engine in a process of its own; undefined when it was killed. */
async function engine(kill?: ProgramOptions['kill']): Promise<Payload | undefined> {
  const options: ProgramOptions = {
    folder,
    definition: DEFINITION,
    input: { jobs: JOBS },
    ...(kill ? { kill } : {}),
  };
  const child = spawn(process.execPath, [
    '--disable-warning=ExperimentalWarning',
    join(import.meta.dirname, 'stepfunctions-host.ts'),
    JSON.stringify(options),
  ]);
  let output = '';
  let errors = '';
  child.stdout.on('data', (chunk) => {
    output += chunk;
  });
  child.stderr.on('data', (chunk) => {
    errors += chunk;
  });
  const signal = await new Promise<string | null>((resolve) => child.on('close', (_, by) => resolve(by)));
  if (signal === 'SIGKILL') return undefined;
  expect(errors).toBe('');
  return JSON.parse(output) as Payload;
}

const effects = () =>
  existsSync(effectsFile(folder)) ? readFileSync(effectsFile(folder), 'utf8').trim().split('\n') : [];
const journal = () => {
  const [run = ''] = readdirSync(join(folder, 'executions', 'slide-run'));
  return join(folder, 'executions', 'slide-run', run, 'journal.jsonl');
};

describe('killed', () => {
  beforeEach(async () => {
    const host = await startHost({ folder });
    const items = Array.from({ length: ITEMS }, (_, item) => `${item}\n`).join('');
    await host.s3.send(new PutObjectCommand({ Bucket: 'silver', Key: 'items', Body: items }));
    await host.close();
  });

  test.each<[string, NonNullable<ProgramOptions['kill']>[]]>([
    ['in the first task', [{ effect: 'begin', count: 1 }]],
    ['as the first task answers', [{ effect: 'end', count: 1 }]],
    ['within the map', [{ effect: 'begin', count: 6 }]],
    [
      'within the map, three times',
      [
        { effect: 'end', count: 4 },
        { effect: 'begin', count: 3 },
        { effect: 'end', count: 2 },
      ],
    ],
    ['as the map reads its items', [{ s3: 'GET items' }]],
    ['as the map writes its results', [{ s3: 'PUT manifest.json' }]],
    ['in the wait', [{ afterMs: 300 }]],
    ['in the jobs, twice', [{ poll: 1 }, { poll: 2 }]],
    ['in the last task', [{ effect: 'begin', count: 16 }]],
  ])('%s, it goes on', async (_, kills) => {
    const deaths: { lines: number; done: string[] }[] = [];
    for (const kill of kills) {
      expect(await engine(kill)).toBeUndefined();
      const lines = effects();
      // The task that was told to kill has not answered; all others that ended had.
      const answered = 'effect' in kill && kill.effect === 'end' ? lines.slice(0, -1) : lines;
      const done = answered
        .slice(deaths.at(-1)?.lines ?? 0)
        .filter((line) => /^end (slide-|plan)/.test(line));
      deaths.push({ lines: lines.length, done: done.map((line) => line.slice(4)) });
    }
    const outcome = await engine();
    expect(outcome).toMatchObject({ status: 'SUCCEEDED', output: { done: JOBS.map((name) => ({ name })) } });

    const lines = effects();
    for (let item = 0; item < ITEMS; item++) expect(lines).toContain(`end slide-${item}`);
    // Nothing that had been done before a kill was begun after it.
    for (const death of deaths) {
      const after = lines.slice(death.lines);
      expect(death.done.filter((name) => after.includes(`begin ${name}`))).toEqual([]);
    }
    const again = lines.filter((line) => line.startsWith('begin ')).length - (ITEMS + 2 + JOBS.length);
    expect(again).toBeLessThanOrEqual(kills.length * MAX_CONCURRENCY);
    const jobs = readFileSync(join(folder, 'jobs.jsonl'), 'utf8').trim().split('\n');
    expect(jobs.map((line) => (JSON.parse(line) as { name: string }).name).sort()).toEqual(JOBS);
    // Events and transitions are those of an execution that was never killed.
    expect(outcome?.events).toEqual(EVENTS);
    expect(outcome?.tally).toEqual({ standard: 5 + ITEMS + 2 * JOBS.length, express: 0 });
  });
});

describe('within one process', () => {
  let host: Host | undefined;
  const calls: string[] = [];
  const states = {
    First: work('first', { ResultPath: '$.first', Next: 'Wait' }),
    Wait: { Type: 'Wait', Seconds: 4, Next: 'Second' },
    Second: {
      Type: 'Task',
      Resource: functionArn('work'),
      Parameters: { 'name.$': "States.Format('second {}', $$.Execution.StartTime)" },
      End: true,
    },
  };
  const open = async () => {
    host = await startHost({
      folder,
      functions: {
        work: ({ name }: { name: string }) => {
          calls.push(name);
          return name;
        },
      },
    });
    host.stepFunctions.createStateMachine({
      name: 'slide-run',
      arn: machineArn('slide-run'),
      roleArn: ROLE,
      definition: { StartAt: 'First', States: states },
    });
    return host;
  };
  const begin = async () => {
    calls.length = 0;
    const opened = await open();
    const command = new StartExecutionCommand({ stateMachineArn: machineArn('slide-run'), name: 'one' });
    const { executionArn = '', startDate } = await opened.sfn.send(command);
    while (calls.length === 0) await new Promise((resolve) => setTimeout(resolve, 5));
    await new Promise((resolve) => setTimeout(resolve, 300));
    await opened.close();
    return { executionArn, startDate };
  };
  afterEach(() => host?.close());

  test('close leaves executions RUNNING, and recover goes on with the first start and without the first task', async () => {
    const { executionArn, startDate } = await begin();
    const again = await open();
    const described = await again.sfn.send(new DescribeExecutionCommand({ executionArn }));
    expect(described.status).toBe('RUNNING');
    // The wait is over by now, and is not waited again.
    await new Promise((resolve) => setTimeout(resolve, 4000));
    const resumed = Date.now();
    await again.stepFunctions.recover();
    const { output } = await again.outcome(executionArn);
    expect(output).toBe(`second ${startDate?.toISOString()}`);
    expect(calls).toEqual(['first', output]);
    expect(Date.now() - resumed).toBeLessThan(3800);
    const { events = [] } = await again.sfn.send(new GetExecutionHistoryCommand({ executionArn }));
    expect(events.map(({ id }) => id)).toEqual(events.map((_, index) => index + 1));
    expect(events.filter(({ type }) => type === 'TaskStateEntered')).toHaveLength(2);
    expect(events.filter(({ type }) => type === 'ExecutionStarted')).toHaveLength(1);
  });

  test('a line torn by the kill is left out', async () => {
    const { executionArn } = await begin();
    appendFileSync(journal(), '{"key":"Second#1.1","inp');
    const again = await open();
    await again.stepFunctions.recover();
    expect((await again.outcome(executionArn)).status).toBe('SUCCEEDED');
    expect(calls).toHaveLength(2);
  });

  test('an outcome for another input is not taken', async () => {
    const { executionArn } = await begin();
    appendFileSync(journal(), `${JSON.stringify({ key: 'Second#1.1', input: 'other', output: 'wrong' })}\n`);
    const again = await open();
    await again.stepFunctions.recover();
    expect((await again.outcome(executionArn)).output).toMatch(/^second /);
  });
});
