/** What a definition may hold: everything that would be done otherwise than on AWS is refused by its name. */
import { describe, expect, test } from 'vitest';
import { compile } from '../../local/stepfunctions/definition.ts';

type Payload = Record<string, unknown>;

const FUNCTION = 'arn:aws:lambda:us-east-1:000000000000:function:work';
const DONE = { Done: { Type: 'Succeed' } };
const task = (more: Payload = {}) => ({ Type: 'Task', Resource: FUNCTION, Next: 'Done', ...more });
const pass = (value: unknown) => ({ Type: 'Pass', Parameters: { 'value.$': value }, Next: 'Done' });
const processor = (states: Payload, config: Payload = { Mode: 'INLINE' }) => ({
  ProcessorConfig: config,
  StartAt: Object.keys(states)[0],
  States: states,
});
const DISTRIBUTED = { Mode: 'DISTRIBUTED', ExecutionType: 'STANDARD' };
const leaf = { Leaf: { Type: 'Pass', End: true } };
const map = (more: Payload = {}, states: Payload = leaf, config: Payload = DISTRIBUTED) => ({
  Type: 'Map',
  ItemProcessor: processor(states, config),
  Next: 'Done',
  ...more,
});
const reader = (more: Payload, parameters: Payload = { Bucket: 'b', Key: 'k' }) => ({
  ItemReader: {
    Resource: 'arn:aws:states:::s3:getObject',
    Parameters: parameters,
    ReaderConfig: { InputType: 'JSONL' },
    ...more,
  },
});
const machine = (state: Payload, more: Payload = {}) => ({
  StartAt: 'S',
  States: { S: state, ...DONE },
  ...more,
});
const refusal = (definition: unknown) => {
  try {
    compile(definition, 'm');
  } catch (error) {
    return `${(error as Error).name}: ${(error as Error).message}`;
  }
  return 'accepted';
};

describe('refused by name', () => {
  test.each<[string, unknown]>([
    ['QueryLanguage JSONata', machine(task(), { QueryLanguage: 'JSONata' })],
    ['QueryLanguage JSONata', machine(task({ QueryLanguage: 'JSONata' }))],
    ["the field 'Assign'", machine(task({ Assign: { a: 1 } }))],
    ["the field 'Arguments'", machine(task({ Arguments: {} }))],
    ["the field 'Output'", machine(task({ Output: {} }))],
    ["the field 'HeartbeatSeconds'", machine(task({ HeartbeatSeconds: 5 }))],
    ["the field 'TimeoutSecondsPath'", machine(task({ TimeoutSecondsPath: '$.t' }))],
    ["the field 'Credentials'", machine(task({ Credentials: {} }))],
    ["the field 'Colour'", machine(task({ Colour: 'red' }))],
    ["the field 'Colour'", machine(task(), { Colour: 'red' })],
    ["the field 'ItemBatcher'", machine(map({ ItemBatcher: { MaxItemsPerBatch: 2 } }))],
    ["the field 'ItemReader'", machine(map(reader({}), leaf, { Mode: 'INLINE' }))],
    [
      "the field 'ToleratedFailureCount'",
      machine(map({ ToleratedFailureCount: 1 }, leaf, { Mode: 'INLINE' })),
    ],
    ['a Map without ItemProcessor', machine({ Type: 'Map', Iterator: processor(leaf), Next: 'Done' })],
    ["the field 'Parameters'", machine(map({ Parameters: {} }))],
    ['$$.State.Name', machine(pass('$$.State.Name'))],
    ['$$.Task.Token', machine(task({ Parameters: { 'token.$': '$$.Task.Token' } }))],
    ['$$.Execution.RedriveTime', machine(pass('$$.Execution.RedriveTime'))],
    ['$$', machine(pass('$$'))],
    ['$$.Map.Item.Value', machine(pass('$$.Map.Item.Value'))],
    ['$$.Map.Item.Source', machine(map({ ItemSelector: { 'a.$': '$$.Map.Item.Source' } }))],
    ["the variable '$name'", machine(pass('$name'))],
    ['States.JsonToString', machine(pass('States.JsonToString($)'))],
    ['States.JsonMerge', machine(pass('States.JsonMerge($.a, $.b, false)'))],
    ['States.StringSplit', machine(pass("States.StringSplit($.a, ',')"))],
    ['States.UUID', machine(pass('States.UUID()'))],
    ['States.MathRandom', machine(pass('States.MathRandom(1, 9)'))],
    ['States.Unknown', machine(pass("States.Format('{}', States.Unknown($.a))"))],
    [
      "the integration 'arn:aws:states:::sns:publish'",
      machine(task({ Resource: 'arn:aws:states:::sns:publish' })),
    ],
    [
      "the integration 'arn:aws:states:::lambda:invoke.waitForTaskToken'",
      machine(task({ Resource: 'arn:aws:states:::lambda:invoke.waitForTaskToken' })),
    ],
    [
      "the parameter 'InvocationType'",
      machine(task({ Resource: 'arn:aws:states:::lambda:invoke', Parameters: { InvocationType: 'Event' } })),
    ],
    ['a Result that is empty', machine({ Type: 'Pass', Result: 0, Next: 'Done' })],
    ["the ResultPath '$['a']'", machine(task({ ResultPath: "$['a']" }))],
    [
      "the ResultPath '$.a[*]'",
      machine(task({ Catch: [{ ErrorEquals: ['States.ALL'], Next: 'Done', ResultPath: '$.a[*]' }] })),
    ],
    [
      "the comparison 'StringContains'",
      machine({ Type: 'Choice', Choices: [{ Variable: '$.a', StringContains: 'x', Next: 'Done' }] }),
    ],
    [
      'a rule with StringEquals and IsPresent',
      machine({
        Type: 'Choice',
        Choices: [{ Variable: '$.a', StringEquals: 'x', IsPresent: true, Next: 'Done' }],
      }),
    ],
    ['InputType PARQUET', machine(map(reader({ ReaderConfig: { InputType: 'PARQUET' } })))],
    ['InputType undefined', machine(map(reader({ ReaderConfig: {} })))],
    [
      "the field 'ItemsPointer'",
      machine(map(reader({ ReaderConfig: { InputType: 'JSON', ItemsPointer: '/a' } }))),
    ],
    [
      "the field 'ExpectedBucketOwner'",
      machine(map(reader({}, { Bucket: 'b', Key: 'k', ExpectedBucketOwner: '1' }))),
    ],
    [
      "'arn:aws:states:::s3:listBuckets'",
      machine(map(reader({ Resource: 'arn:aws:states:::s3:listBuckets' }))),
    ],
    [
      "the field 'Encryption'",
      machine(
        map({
          ResultWriter: {
            Resource: 'arn:aws:states:::s3:putObject',
            Parameters: { Bucket: 'b' },
            Encryption: 1,
          },
        }),
      ),
    ],
    ["Resource 'undefined'", machine(map({ ResultWriter: { WriterConfig: { OutputType: 'JSONL' } } }))],
  ])('%s', (what, definition) => {
    const message = refusal(definition);
    expect(message).toMatch(/^UnsupportedLocally: /);
    expect(message).toContain(what);
  });

  test('however deep it stands', () => {
    const deep = { Deep: { ...task({ HeartbeatSeconds: 5 }), Next: undefined, End: true } };
    const branch = {
      Fork: {
        Type: 'Parallel',
        Branches: [processor(deep)].map(({ ProcessorConfig: _, ...b }) => b),
        End: true,
      },
    };
    const message = refusal(
      machine(map({}, { Inner: { ...map({}, branch, { Mode: 'INLINE' }), Next: undefined, End: true } })),
    );
    expect(message).toContain("the field 'HeartbeatSeconds' (in state 'Deep')");
  });

  test('the item in the context of a child execution, which AWS does not give it', () => {
    const child = { Child: { Type: 'Pass', Parameters: { 'a.$': '$$.Map.Item.Value' }, End: true } };
    expect(refusal(machine(map({}, child)))).toContain('$$.Map.Item.Value');
    expect(refusal(machine(map({}, child, { Mode: 'INLINE' })))).toBe('accepted');
  });
});

describe('rejected as AWS rejects it', () => {
  test.each<[string, unknown]>([
    ['Next', machine(task({ Next: 'Nowhere' }))],
    ['Type', machine({ Type: 'Jump' })],
    [
      'EXPRESS',
      machine(
        map(
          {},
          {
            Job: { Type: 'Task', Resource: 'arn:aws:states:::sagemaker:createProcessingJob.sync', End: true },
          },
          { Mode: 'DISTRIBUTED', ExecutionType: 'EXPRESS' },
        ),
      ),
    ],
    ['CSVHeaderLocation', machine(map(reader({ ReaderConfig: { InputType: 'CSV' } })))],
    ['Label', machine(map({ Label: 'with space' }))],
    ['States', { StartAt: 'S' }],
  ])('%s', (_, definition) => {
    expect(refusal(definition)).toMatch(/^InvalidDefinition: /);
  });
});

test('what the definition holds is not changed by compiling it', () => {
  const definition = machine(map({ ItemSelector: { 'a.$': '$$.Execution.Id' } }));
  const before = structuredClone(definition);
  expect(refusal(definition)).toBe('accepted');
  expect(definition).toEqual(before);
});
