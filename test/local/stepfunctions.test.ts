/** Executions over the real protocol: what they do, how they fail, and what they tell of it. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  GetExecutionHistoryCommand,
  ListExecutionsCommand,
  paginateGetExecutionHistory,
  StartExecutionCommand,
  StopExecutionCommand,
} from '@aws-sdk/client-sfn';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { ServiceError } from '../../local/types.ts';
import {
  functionArn,
  type Host,
  type JobOutcome,
  machineArn,
  ROLE,
  startHost,
} from './stepfunctions-host.ts';

type Payload = Record<string, unknown>;

const folder = mkdtempSync(join(tmpdir(), 'slideway-sfn-'));
const calls: Payload[] = [];
let jobOutcome: (name: string, ageMs: number) => JobOutcome = () => 'Completed';
let host: Host;

class Throttled extends Error {
  override readonly name = 'Throttled';
}

const functions = {
  echo: (payload: Payload) => {
    calls.push(payload);
    return payload;
  },
  /** Fails as often as the payload says, then answers. */
  flaky: ({ failures }: { failures: number }) => {
    calls.push({});
    if (calls.length <= failures) throw new Throttled('slow down');
    return { calls: calls.length };
  },
  fails: ({ error, message = 'it broke' }: { error: string; message?: string }) => {
    calls.push({});
    throw Object.assign(new Error(message), { name: error });
  },
  sleeps: () => new Promise((resolve) => setTimeout(resolve, 5000)),
  big: ({ bytes }: { bytes: number }) => 'x'.repeat(bytes),
};

beforeAll(async () => {
  host = await startHost({ folder, functions, job: (name, age) => jobOutcome(name, age), timeScale: 0.01 });
});
afterAll(async () => {
  await host.close();
  rmSync(folder, { recursive: true, force: true });
});
beforeEach(() => {
  calls.length = 0;
  host.asked.length = 0;
  jobOutcome = () => 'Completed';
});

let machines = 0;
/** Creates a state machine of these states (the first is where it starts) and starts an execution. */
async function start(
  states: Record<string, Payload>,
  input: unknown = {},
  more: Payload = {},
): Promise<string> {
  machines += 1;
  const arn = machineArn(`machine-${machines}`);
  const definition = { StartAt: Object.keys(states)[0], States: states, ...more };
  host.stepFunctions.createStateMachine({ name: `machine-${machines}`, arn, roleArn: ROLE, definition });
  const started = await host.sfn.send(
    new StartExecutionCommand({ stateMachineArn: arn, name: 'one', input: JSON.stringify(input) }),
  );
  return started.executionArn ?? '';
}
const run = async (states: Record<string, Payload>, input: unknown = {}, more: Payload = {}) =>
  host.outcome(await start(states, input, more));
const lambda = (name: string, more: Payload = {}): Payload => ({
  Type: 'Task',
  Resource: functionArn(name),
  ...('Next' in more ? {} : { End: true }),
  ...more,
});
const caught = (errors: string[], more: Payload = {}) => ({
  Catch: [{ ErrorEquals: errors, ResultPath: '$.failure', Next: 'Caught' }],
  ...more,
});
const CAUGHT = { Caught: { Type: 'Succeed' } };
const JOB = 'arn:aws:states:::sagemaker:createProcessingJob.sync';

describe('data flow', () => {
  test('a function ARN gets the state input and its answer is the result', async () => {
    const { status, output } = await run(
      { Echo: lambda('echo', { ResultPath: '$.answer' }) },
      { slide: 's1' },
    );
    expect(status).toBe('SUCCEEDED');
    expect(output).toEqual({ slide: 's1', answer: { slide: 's1' } });
  });

  test('lambda:invoke gives the answer under Payload, for names, ARNs and qualifiers', async () => {
    const invoke = (parameters: Payload) => ({
      Type: 'Task',
      Resource: 'arn:aws:states:::lambda:invoke',
      Parameters: parameters,
    });
    const { output } = await run({
      ByName: { ...invoke({ FunctionName: 'echo', 'Payload.$': '$' }), ResultPath: '$.named', Next: 'ByArn' },
      ByArn: { ...invoke({ FunctionName: `${functionArn('echo')}:$LATEST`, Payload: { a: 1 } }), End: true },
    });
    expect(output).toMatchObject({ ExecutedVersion: '$LATEST', StatusCode: 200, Payload: { a: 1 } });
    expect(calls).toEqual([{}, { a: 1 }]);
  });

  test('the context names the execution, also inside Map and Parallel', async () => {
    const context = {
      Type: 'Pass',
      Parameters: {
        'id.$': '$$.Execution.Id',
        'name.$': '$$.Execution.Name',
        'input.$': '$$.Execution.Input.items',
        'time.$': '$$.Execution.StartTime',
        'role.$': '$$.Execution.RoleArn',
        'machine.$': '$$.StateMachine.Name',
      },
      End: true,
    };
    const { output, startDate, executionArn } = await run(
      {
        Both: {
          Type: 'Parallel',
          Branches: [
            { StartAt: 'A', States: { A: context } },
            {
              StartAt: 'M',
              States: {
                M: {
                  Type: 'Map',
                  ItemsPath: '$.items',
                  ItemProcessor: { StartAt: 'B', States: { B: context } },
                  End: true,
                },
              },
            },
          ],
          End: true,
        },
      },
      { items: [7] },
    );
    const expected = {
      id: executionArn,
      name: 'one',
      input: [7],
      time: startDate?.toISOString(),
      role: ROLE,
      machine: `machine-${machines}`,
    };
    expect(output).toEqual([expected, [expected]]);
  });

  test('an inline Map selects by index and value, also within its iterations', async () => {
    const { output } = await run(
      {
        Each: {
          Type: 'Map',
          ItemsPath: '$.items',
          ItemSelector: { 'i.$': '$$.Map.Item.Index', 'v.$': '$$.Map.Item.Value', 'run.$': '$.run' },
          MaxConcurrency: 2,
          ItemProcessor: {
            StartAt: 'Look',
            States: {
              Look: { Type: 'Pass', Parameters: { 'v.$': '$.v', 'again.$': '$$.Map.Item.Value' }, End: true },
            },
          },
          ResultPath: '$.results',
          End: true,
        },
      },
      { run: 'r', items: ['a', 'b', 'c'] },
    );
    expect(output.results).toEqual(['a', 'b', 'c'].map((v) => ({ v, again: v })));
  });

  test('after an iteration failed no further one begins', async () => {
    const { status, error } = await run(
      {
        Each: {
          Type: 'Map',
          ItemsPath: '$.items',
          MaxConcurrency: 1,
          ItemProcessor: { StartAt: 'Fails', States: { Fails: lambda('fails') } },
          End: true,
        },
      },
      { items: Array.from({ length: 5 }, () => ({ error: 'Broken' })) },
    );
    expect([status, error]).toEqual(['FAILED', 'Broken']);
    expect(calls).toHaveLength(1);
  });

  test.each([
    ['present is false', { Variable: '$.x', IsPresent: false }, {}, true],
    ['present is false of a present one', { Variable: '$.x', IsPresent: false }, { x: 1 }, false],
    ['null is false', { Variable: '$.x', IsNull: false }, { x: 1 }, true],
    ['a pattern on what is no string', { Variable: '$.x', StringMatches: '*' }, { x: 1 }, false],
    ['a question mark is itself', { Variable: '$.x', StringMatches: 'a?*' }, { x: 'ab' }, false],
    ['a number against a string', { Variable: '$.x', NumericLessThan: 5 }, { x: '1' }, false],
    ['a comparison of paths', { Variable: '$.x', NumericEqualsPath: '$.y' }, { x: 1, y: 1 }, true],
    ['of the context', { Variable: '$$.Execution.Name', StringEquals: 'one' }, {}, true],
    ['and, or, not', { Not: { Or: [{ Variable: '$.x', BooleanEquals: true }] } }, { x: false }, true],
  ])('a Choice where %s answers as AWS does', async (_, rule, input, expected) => {
    const { output } = await run(
      {
        Choose: { Type: 'Choice', Choices: [{ ...rule, Next: 'Yes' }], Default: 'No' },
        Yes: { Type: 'Pass', Result: 'yes', End: true },
        No: { Type: 'Pass', Result: 'no', End: true },
      },
      input,
    );
    expect(output).toBe(expected ? 'yes' : 'no');
  });

  test('a ResultPath of $ is the result', async () => {
    const { output } = await run(
      { Echo: lambda('echo', { Parameters: { a: 1 }, ResultPath: '$' }) },
      { b: 2 },
    );
    expect(output).toEqual({ a: 1 });
  });
});

describe('failures', () => {
  test('Retry waits and calls again on a named error, and each retry is a transition', async () => {
    const arn = await start(
      {
        Flaky: lambda('flaky', {
          Retry: [{ ErrorEquals: ['Throttled'], IntervalSeconds: 1, MaxAttempts: 3 }],
        }),
      },
      { failures: 3 },
    );
    expect((await host.outcome(arn)).output).toEqual({ calls: 4 });
    expect(host.stepFunctions.transitions(arn)).toEqual({ standard: 4, express: 0 });
  });

  test('the intervals of Retry grow by BackoffRate up to MaxDelaySeconds', async () => {
    const intervals = { IntervalSeconds: 10, BackoffRate: 1000, MaxDelaySeconds: 15 };
    const begun = Date.now();
    await run(
      { Flaky: lambda('flaky', { Retry: [{ ErrorEquals: ['Throttled'], ...intervals }] }) },
      { failures: 3 },
    );
    // A hundredth of 10 + 15 + 15 seconds; it would be hours without the limit.
    expect(Date.now() - begun).toBeGreaterThanOrEqual(400);
  });

  test('Retry gives up after MaxAttempts and leaves other errors alone', async () => {
    const retry = { Retry: [{ ErrorEquals: ['Throttled'], MaxAttempts: 2 }] };
    expect(await run({ Flaky: lambda('flaky', retry) }, { failures: 9 })).toMatchObject({
      error: 'Throttled',
    });
    expect(calls).toHaveLength(3);
    calls.length = 0;
    expect(await run({ Fails: lambda('fails', retry) }, { error: 'Other' })).toMatchObject({
      error: 'Other',
    });
    expect(calls).toHaveLength(1);
  });

  test('Catch gets the error type of the function and its cause as JSON text', async () => {
    const { output } = await run(
      { Fails: lambda('fails', caught(['SlideUnreadable'])), ...CAUGHT },
      { error: 'SlideUnreadable', message: 'no level "2"' },
    );
    expect(output.failure.Error).toBe('SlideUnreadable');
    expect(JSON.parse(output.failure.Cause)).toMatchObject({
      errorType: 'SlideUnreadable',
      errorMessage: 'no level "2"',
      trace: expect.any(Array),
    });
  });

  test.each([
    ['Lambda.TooManyRequestsException', 'it broke'],
    ['Lambda.Unknown', 'it broke'],
  ])('%s keeps its name and message', async (error, message) => {
    const { output } = await run({ Fails: lambda('fails', caught([error])), ...CAUGHT }, { error });
    expect(output.failure).toEqual({ Error: error, Cause: message });
  });

  test('a function that is not there fails as on AWS', async () => {
    expect(await run({ Gone: lambda('gone') })).toMatchObject({ error: 'Lambda.ResourceNotFoundException' });
  });

  test('TimeoutSeconds ends a task with States.Timeout, which States.TaskFailed does not take', async () => {
    const states = (errors: string[]) => ({
      Sleeps: lambda('sleeps', { TimeoutSeconds: 1, ...caught(errors) }),
      ...CAUGHT,
    });
    expect((await run(states(['States.Timeout']))).output.failure.Error).toBe('States.Timeout');
    expect(await run(states(['States.TaskFailed']))).toMatchObject({
      status: 'FAILED',
      error: 'States.Timeout',
    });
  });

  test('the first catcher that AWS would take is taken', async () => {
    const { output } = await run({
      Sleeps: lambda('sleeps', {
        TimeoutSeconds: 1,
        Catch: [
          { ErrorEquals: ['States.TaskFailed'], Next: 'Wrong' },
          { ErrorEquals: ['States.ALL'], Next: 'Right' },
        ],
      }),
      Wrong: { Type: 'Fail', Error: 'Wrong' },
      Right: { Type: 'Pass', Result: 'right', End: true },
    });
    expect(output).toBe('right');
  });

  test('States.TaskFailed on a Map takes the failure of an iteration', async () => {
    const { output } = await run(
      {
        Each: {
          Type: 'Map',
          ItemsPath: '$.items',
          ItemProcessor: { StartAt: 'Fails', States: { Fails: lambda('fails') } },
          ...caught(['States.TaskFailed']),
          End: true,
        },
        ...CAUGHT,
      },
      { items: [{ error: 'Broken' }] },
    );
    expect(output.failure.Error).toBe('Broken');
  });

  test('a Fail state ends the execution with its error and cause', async () => {
    expect(await run({ Run: { Type: 'Fail', Error: 'RunFailed', Cause: 'why' } })).toMatchObject({
      status: 'FAILED',
      error: 'RunFailed',
      cause: 'why',
    });
  });

  test('the time limit of the machine ends it TIMED_OUT', async () => {
    const { status } = await run({ Sleeps: lambda('sleeps') }, {}, { TimeoutSeconds: 1 });
    expect(status).toBe('TIMED_OUT');
  });
});

describe('payloads', () => {
  test('a result above 256 KiB is States.DataLimitExceeded, which States.ALL does not take', async () => {
    const states = (errors: string[]) => ({ Big: lambda('big', caught(errors)), ...CAUGHT });
    expect(await run(states(['States.ALL']), { bytes: 262_143 })).toMatchObject({
      error: 'States.DataLimitExceeded',
    });
    const { output } = await run(states(['States.DataLimitExceeded']), { bytes: 300_000 });
    expect(output.failure.Error).toBe('States.DataLimitExceeded');
  });

  test('an output that grows above the limit by ResultPath fails the execution', async () => {
    const result = await run({
      One: lambda('big', { Parameters: { bytes: 200_000 }, ResultPath: '$.one', Next: 'Two' }),
      Two: lambda('big', { Parameters: { bytes: 200_000 }, ResultPath: '$.two', Next: 'Three' }),
      Three: lambda('echo'),
    });
    expect(result).toMatchObject({ status: 'FAILED', error: 'States.DataLimitExceeded' });
    expect(calls).toEqual([]);
  });

  test('the largest payload is on record', async () => {
    const arn = await start({ Big: lambda('big') }, { bytes: 1000 });
    await host.outcome(arn);
    expect(host.stepFunctions.largestPayload(arn)).toBe(1002);
  });
});

describe('processing jobs', () => {
  const parameters = { 'ProcessingJobName.$': "States.Format('job-{}', $.attempt)", RoleArn: ROLE };
  const job = (more: Payload = {}): Payload => ({
    Type: 'Task',
    Resource: JOB,
    Parameters: parameters,
    ...('Next' in more ? {} : { End: true }),
    ...more,
  });

  test('the output is the description in PascalCase with times in milliseconds, asked for by the role', async () => {
    jobOutcome = (_, age) => (age > 50 ? 'Completed' : 'InProgress');
    const { output } = await run({ Job: job() }, { attempt: 'done' });
    expect(output).toMatchObject({ ProcessingJobName: 'job-done', ProcessingJobStatus: 'Completed' });
    expect(Math.abs(output.CreationTime - Date.now())).toBeLessThan(60_000);
    expect(host.asked).toContain('slide-run sagemaker:CreateProcessingJob');
    expect(host.jobs.requests.at(-1)?.Tags).toEqual([
      { Key: 'MANAGED_BY_AWS', Value: 'STARTED_BY_STEP_FUNCTIONS' },
    ]);
  });

  test('a lack of capacity is waited for, and asked again under a new name', async () => {
    jobOutcome = (name) =>
      name === 'job-3' ? 'Completed' : { FailureReason: 'CapacityError: no ml.g5.xlarge' };
    const { output } = await run(
      {
        Job: job({ ...caught(['States.TaskFailed']), ResultPath: '$.done' }),
        Caught: {
          Type: 'Choice',
          Choices: [
            { Variable: '$.failure.Cause', StringMatches: '*CapacityError*', Next: 'Wait for capacity' },
          ],
          Default: 'Give up',
        },
        'Wait for capacity': { Type: 'Wait', Seconds: 1, Next: 'Count' },
        Count: { Type: 'Pass', Parameters: { 'attempt.$': 'States.MathAdd($.attempt, 1)' }, Next: 'Job' },
        'Give up': { Type: 'Fail' },
      },
      { attempt: 1 },
    );
    expect(output).toMatchObject({ attempt: 3, done: { ProcessingJobName: 'job-3' } });
  });

  test('a failed job is States.TaskFailed with the description as cause', async () => {
    jobOutcome = () => ({ FailureReason: 'AlgorithmError: exit code 1' });
    const { error, cause } = await run({ Job: job() }, { attempt: 'failed' });
    expect(error).toBe('States.TaskFailed');
    expect(JSON.parse(cause ?? '')).toMatchObject({
      ProcessingJobStatus: 'Failed',
      FailureReason: 'AlgorithmError: exit code 1',
    });
  });

  test.each([
    ['ResourceLimitExceeded', 'SageMaker.ResourceLimitExceededException'],
    ['ResourceInUse', 'SageMaker.ResourceInUseException'],
    ['ThrottlingException', 'SageMaker.AmazonSageMakerException'],
    ['AccessDeniedException', 'SageMaker.AmazonSageMakerException'],
  ])('a creation refused with %s is %s', async (code, error) => {
    host.jobs.refusal = new ServiceError(code, 'Rate exceeded');
    const result = await run({ Job: job() }, { attempt: code });
    expect(result.error).toBe(error);
    expect(result.cause).toContain(
      `Rate exceeded (Service: AmazonSageMaker; Status Code: 400; Error Code: ${code})`,
    );
  });

  test('stopping the execution stops the job', async () => {
    jobOutcome = () => 'InProgress';
    const executionArn = await start({ Job: job(caught(['States.ALL'])), ...CAUGHT }, { attempt: 'stopped' });
    while (!host.jobs.created().some(({ name }) => name === 'job-stopped'))
      await new Promise((r) => setTimeout(r, 10));
    await host.sfn.send(new StopExecutionCommand({ executionArn, error: 'Enough', cause: 'by hand' }));
    expect(await host.outcome(executionArn)).toMatchObject({
      status: 'ABORTED',
      error: 'Enough',
      cause: 'by hand',
    });
    expect(host.jobs.stopped).toContain('job-stopped');
  });
});

describe('single calls of SageMaker', () => {
  const call = (resource: string, parameters: Payload) => ({
    Call: { Type: 'Task', Resource: `arn:aws:states:::${resource}`, Parameters: parameters, End: true },
  });

  test('give their answer, asked for by the role', async () => {
    const model = { ModelName: 'm', ExecutionRoleArn: ROLE };
    const { output } = await run(call('sagemaker:createModel', model), {});
    expect(output).toEqual({ ModelArn: 'arn:of-the-model' });
    expect(host.jobs.requests.at(-1)).toEqual(model);
    await run(call('aws-sdk:sagemaker:deleteModel', { ModelName: 'm' }), {});
    await run(call('aws-sdk:sagemaker:stopTransformJob', { TransformJobName: 'j' }), {});
    expect(host.asked.filter((asked) => /Model$|TransformJob$/.test(asked))).toEqual([
      'slide-run sagemaker:CreateModel',
      'slide-run sagemaker:DeleteModel',
      'slide-run sagemaker:StopTransformJob',
    ]);
  });

  test.each([
    ['sagemaker:createModel', 'ValidationException', 'SageMaker.AmazonSageMakerException'],
    ['sagemaker:createModel', 'ResourceLimitExceeded', 'SageMaker.ResourceLimitExceededException'],
    ['aws-sdk:sagemaker:deleteModel', 'ValidationException', 'SageMaker.SageMakerException'],
    ['aws-sdk:sagemaker:stopTransformJob', 'ResourceNotFound', 'SageMaker.ResourceNotFoundException'],
  ])('%s refused with %s is %s', async (resource, code, error) => {
    host.jobs.refusal = new ServiceError(code, 'not so');
    const result = await run(call(resource, { ModelName: 'm', TransformJobName: 'j' }), {});
    expect(result.error).toBe(error);
    expect(result.cause).toMatch(/^not so \(Service: (Amazon)?SageMaker; Status Code: 400; Error Code: /);
  });
});

describe('executions', () => {
  test('the same name and input is the same execution while it runs, and taken once it has ended', async () => {
    const executionArn = await start({ Wait: { Type: 'Wait', Seconds: 50, End: true } }, { a: 1 });
    const again = (input: string) =>
      host.sfn.send(
        new StartExecutionCommand({ stateMachineArn: machineArn(`machine-${machines}`), name: 'one', input }),
      );
    expect((await again('{"a":1}')).executionArn).toBe(executionArn);
    await expect(again('{"a":2}')).rejects.toThrow('Execution Already Exists');
    await host.outcome(executionArn);
    await expect(again('{"a":1}')).rejects.toMatchObject({ name: 'ExecutionAlreadyExists' });
  });

  test.each([['x'.repeat(81)], ['a b'], ['a/b'], ['']])('the name %j is refused', async (name) => {
    await start({ Done: { Type: 'Succeed' } });
    const command = new StartExecutionCommand({ stateMachineArn: machineArn(`machine-${machines}`), name });
    await expect(host.sfn.send(command)).rejects.toMatchObject({ name: 'InvalidName' });
  });

  test('a caller without the right cannot start one', async () => {
    host.denied.add('states:StartExecution');
    await expect(start({ Done: { Type: 'Succeed' } })).rejects.toMatchObject({
      name: expect.stringContaining('AccessDenied'),
    });
    host.denied.clear();
  });

  test('executions are listed, newest first, by status', async () => {
    await run({ Done: { Type: 'Succeed' } });
    const stateMachineArn = machineArn(`machine-${machines}`);
    const listed = await host.sfn.send(
      new ListExecutionsCommand({ stateMachineArn, statusFilter: 'SUCCEEDED' }),
    );
    expect(listed.executions).toMatchObject([
      { name: 'one', status: 'SUCCEEDED', startDate: expect.any(Date) },
    ]);
  });

  test('the history tells each state, paged and in both directions', async () => {
    const executionArn = await start(
      {
        Plan: lambda('echo', { Next: 'Wait' }),
        Wait: { Type: 'Wait', Seconds: 1, Next: 'Fails' },
        Fails: {
          Type: 'Task',
          Resource: 'arn:aws:states:::lambda:invoke',
          Parameters: { FunctionName: 'fails', Payload: { error: 'Broken' } },
          End: true,
        },
      },
      { a: 1 },
    );
    await host.outcome(executionArn);
    const events = [];
    for await (const page of paginateGetExecutionHistory(
      { client: host.sfn, pageSize: 3 },
      { executionArn },
    )) {
      events.push(...(page.events ?? []));
    }
    expect(events.map(({ type }) => type)).toEqual([
      'ExecutionStarted',
      'TaskStateEntered',
      'LambdaFunctionScheduled',
      'LambdaFunctionSucceeded',
      'TaskStateExited',
      'WaitStateEntered',
      'WaitStateExited',
      'TaskStateEntered',
      'TaskScheduled',
      'TaskFailed',
      'ExecutionFailed',
    ]);
    expect(events[1]?.stateEnteredEventDetails).toMatchObject({ name: 'Plan', input: '{"a":1}' });
    expect(events[9]?.taskFailedEventDetails).toMatchObject({
      resourceType: 'lambda',
      resource: 'invoke',
      error: 'Broken',
    });
    expect(events[10]).toMatchObject({
      id: 11,
      previousEventId: 10,
      timestamp: expect.any(Date),
      executionFailedEventDetails: { error: 'Broken' },
    });
    const last = await host.sfn.send(
      new GetExecutionHistoryCommand({ executionArn, reverseOrder: true, maxResults: 1 }),
    );
    expect(last.events?.[0]?.type).toBe('ExecutionFailed');
  });

  test('a loop without end is ended at the event limit', async () => {
    const result = await run({
      A: { Type: 'Pass', Next: 'B' },
      B: { Type: 'Choice', Choices: [{ Variable: '$.x', IsPresent: true, Next: 'C' }], Default: 'A' },
      C: { Type: 'Succeed' },
    });
    expect(result).toMatchObject({ status: 'FAILED', error: 'States.Runtime' });
    expect(result.cause).toContain('25000');
  });
});
