/**
 * From a definition in Amazon States Language to a program that can be run, or to a refusal by name.
 *
 * The library aws-local-stepfunctions does the data flow: paths, payload templates, intrinsic functions, Pass,
 * Choice, Succeed, Fail, Catch, and the way from state to state. All that waits, calls or iterates (Task, Wait,
 * Map, Parallel) it gets as Task states whose handlers are ours (walk.ts), because its own know neither which
 * iteration they are in nor that they were stopped, and are not durable. Where it silently differs from AWS,
 * the definition is rewritten here so that it does not, or refused.
 */
import { createRequire } from 'node:module';
import { ExecutionError, StateMachine, type StateMachineDefinition } from 'aws-local-stepfunctions';
import { UnsupportedLocally } from '../types.ts';
import { asFailure, Interrupted, InvalidDefinition, StateError } from './errors.ts';
import { integrationOf } from './integrations.ts';

type Fields = Record<string, unknown>;

/** Evaluates a payload template or a path on a state's input and the context object. */
export type Template = (input: unknown, context: Fields) => Promise<unknown>;

export interface Retrier {
  ErrorEquals: string[];
  IntervalSeconds?: number;
  MaxAttempts?: number;
  BackoffRate?: number;
  MaxDelaySeconds?: number;
  JitterStrategy?: 'FULL' | 'NONE';
}

interface Catcher {
  ErrorEquals: string[];
  Next: string;
  ResultPath?: string | null;
}

export type StateType = 'Task' | 'Wait' | 'Map' | 'Parallel' | 'Pass' | 'Choice' | 'Succeed' | 'Fail';

interface StepBase {
  name: string;
  retry: Retrier[];
  catch: Catcher[];
}
export interface TaskStep extends StepBase {
  kind: 'task';
  resource: string;
  timeoutSeconds?: number;
}
export interface WaitStep extends StepBase {
  kind: 'wait';
  /** Gives seconds, or a timestamp (ISO 8601). */
  until: Template;
}
export interface MapStep extends StepBase {
  kind: 'map';
  items?: Template;
  selector?: Template;
  maxConcurrency: Template;
  processor: Program;
}
export interface ParallelStep extends StepBase {
  kind: 'parallel';
  branches: Program[];
}
export interface ItemReader {
  resource: 'getObject' | 'listObjectsV2';
  parameters: Template;
  inputType: 'JSONL' | 'JSON' | 'CSV';
  /** CSV: given headers, else the first row. */
  headers?: string[];
  delimiter: string;
  maxItems: Template;
}
export interface ResultWriter {
  parameters: Template;
  transformation: 'NONE' | 'COMPACT' | 'FLATTEN';
  lines: boolean;
}
export interface DistributedMapStep extends StepBase {
  kind: 'distributed';
  label: string;
  express: boolean;
  items?: Template;
  reader?: ItemReader;
  selector?: Template;
  maxConcurrency: Template;
  toleratedCount: Template;
  toleratedPercentage: Template;
  writer?: ResultWriter;
  processor: Program;
}
export type Step = TaskStep | WaitStep | MapStep | ParallelStep | DistributedMapStep;

export interface Program {
  machine: StateMachine;
  /** The states that are ours to do, by name. */
  steps: Step[];
  /** What each state is in the definition; to the library most of them are Tasks. */
  types: Map<string, StateType>;
  timeoutSeconds?: number;
}

/** Where the compiler is, and what holds there. */
interface Place {
  where: string;
  /** `$$.Map.Item` has a value. */
  mapItem: boolean;
  /** Inside an EXPRESS child. */
  express: boolean;
}

/** Longest delay of a Node timer; the library's own time limit (60 s by default) must never be the one that counts. */
const NEVER_SECONDS = 2_147_483;

const COMMON = ['Type', 'Comment', 'QueryLanguage'];
const TRANSITION = ['Next', 'End'];
const FIELDS: Record<StateType, string[]> = {
  Task: [
    ...TRANSITION,
    ...['Resource', 'TimeoutSeconds', 'Retry', 'Catch'],
    ...['InputPath', 'Parameters', 'ResultSelector', 'ResultPath', 'OutputPath'],
  ],
  Wait: [...TRANSITION, 'Seconds', 'SecondsPath', 'Timestamp', 'TimestampPath', 'InputPath', 'OutputPath'],
  Map: [
    ...TRANSITION,
    ...['ItemProcessor', 'ItemsPath', 'ItemSelector', 'MaxConcurrency', 'MaxConcurrencyPath'],
    ...['Retry', 'Catch', 'InputPath', 'ResultSelector', 'ResultPath', 'OutputPath'],
  ],
  Parallel: [
    ...TRANSITION,
    ...['Branches', 'Retry', 'Catch'],
    ...['InputPath', 'Parameters', 'ResultSelector', 'ResultPath', 'OutputPath'],
  ],
  Pass: [...TRANSITION, 'Result', 'InputPath', 'Parameters', 'ResultPath', 'OutputPath'],
  Choice: ['Choices', 'Default', 'InputPath', 'OutputPath'],
  Succeed: ['InputPath', 'OutputPath'],
  Fail: ['Error', 'Cause', 'ErrorPath', 'CausePath'],
};
const DISTRIBUTED_FIELDS = [
  ...['ItemReader', 'ResultWriter', 'Label'],
  ...['ToleratedFailurePercentage', 'ToleratedFailurePercentagePath'],
  ...['ToleratedFailureCount', 'ToleratedFailureCountPath'],
];

/** What the library computes as AWS does and the same again after a restart. */
const INTRINSICS = new Set([
  ...['Format', 'StringToJson', 'Base64Encode', 'Base64Decode', 'Hash', 'MathAdd'],
  ...['Array', 'ArrayPartition', 'ArrayContains', 'ArrayRange', 'ArrayGetItem', 'ArrayLength', 'ArrayUnique'],
]);
const INTRINSIC_TROUBLE: Record<string, string> = {
  JsonToString: 'it loses backslashes',
  JsonMerge: 'it changes its first argument',
  StringSplit: 'it takes its second argument as one separator',
  UUID: 'its value would change when an execution is continued',
  MathRandom: 'its value would change when an execution is continued',
};

const CONTEXT_PATHS = [
  /^\$\$\.Execution\.(Id|Name|RoleArn|StartTime|RedriveCount)$/,
  /^\$\$\.Execution\.Input($|[.[])/,
  /^\$\$\.StateMachine\.(Id|Name)$/,
];
const MAP_ITEM_PATH = /^\$\$\.Map\.Item\.(Index$|Value($|[.[]))/;

const COMPARISON =
  /^(String|Numeric|Timestamp)(Equals|LessThan|GreaterThan|LessThanEquals|GreaterThanEquals)(Path)?$/;
const TYPE_TEST = /^Is(Null|Present|Numeric|String|Boolean|Timestamp)$/;

const validate = createRequire(import.meta.url)('asl-validator') as (
  definition: unknown,
  options: { checkPaths: boolean; checkArn: boolean },
) => { isValid: boolean; errorsText(separator: string): string };

/**
 * Compiles a definition (parsed JSON). Throws {@link UnsupportedLocally} naming what the local AWS would do
 * differently from AWS, {@link InvalidDefinition} for what AWS itself would reject.
 */
export function compile(definition: unknown, name: string): Program {
  const program = compileMachine(definition, { where: name, mapItem: false, express: false }, [
    'Version',
    'TimeoutSeconds',
    'QueryLanguage',
  ]);
  // The validator writes defaults into what it checks.
  const verdict = validate(structuredClone(definition), { checkPaths: true, checkArn: true });
  if (!verdict.isValid) throw new InvalidDefinition(verdict.errorsText('; '));
  const { TimeoutSeconds: timeoutSeconds } = definition as Fields;
  return typeof timeoutSeconds === 'number' ? { ...program, timeoutSeconds } : program;
}

function compileMachine(definition: unknown, place: Place, extra: string[]): Program {
  const machine = fields(definition, place.where);
  allow(machine, ['Comment', 'StartAt', 'States', ...extra], place.where);
  jsonPathOnly(machine, place.where);
  const program: Omit<Program, 'machine'> = { steps: [], types: new Map() };
  const states: Fields = {};
  for (const [name, value] of Object.entries(fields(machine.States, `${place.where}, States`))) {
    const state = fields(value, `state '${name}'`);
    states[name] = compileState(name, state, { ...place, where: `state '${name}'` }, program);
  }
  return { ...program, machine: libraryMachine({ StartAt: machine.StartAt, States: states }) };
}

function compileState(name: string, state: Fields, place: Place, program: Omit<Program, 'machine'>): Fields {
  const { where } = place;
  const type = state.Type as StateType;
  const allowed = FIELDS[type];
  if (allowed === undefined) throw new InvalidDefinition(`${where} has no known Type`);
  jsonPathOnly(state, where);
  const distributed = type === 'Map' && isDistributed(state, where);
  allow(state, [...COMMON, ...allowed, ...(distributed ? DISTRIBUTED_FIELDS : [])], where);
  for (const path of ['InputPath', 'OutputPath', 'ErrorPath', 'CausePath']) checkPath(state[path], place);
  checkResultPath(state.ResultPath, where);
  checkTemplate(state.ResultSelector, place);
  checkTemplate(state.Parameters, place);
  const base = { name, retry: listOf<Retrier>(state.Retry), catch: listOf<Catcher>(state.Catch) };
  for (const { ResultPath } of base.catch) checkResultPath(ResultPath, where);
  program.types.set(name, type);
  const flow = dataFlow(state, base.catch);

  switch (type) {
    case 'Task':
      program.steps.push(taskStep(base, state, place));
      return flow;
    case 'Wait':
      program.steps.push({ ...base, kind: 'wait', until: waitTemplate(state, place) });
      return flow;
    case 'Parallel':
      program.steps.push({
        ...base,
        kind: 'parallel',
        branches: listOf(state.Branches).map((branch, index) =>
          compileMachine(branch, { ...place, where: `${where}, branch ${index}` }, []),
        ),
      });
      return flow;
    case 'Map':
      program.steps.push(distributed ? distributedStep(base, state, place) : mapStep(base, state, place));
      return flow;
    case 'Pass':
      if ('Result' in state && !state.Result) throw new UnsupportedLocally('a Result that is empty', where);
      return { ...flow, Type: 'Pass' };
    case 'Choice':
      return {
        ...flow,
        Type: 'Choice',
        Choices: listOf<Fields>(state.Choices).map((rule) => choiceRule(rule, place)),
      };
    case 'Succeed':
      return { ...flow, Type: 'Succeed' };
    case 'Fail':
      // Left out, the library would invent them.
      return { ...flow, Type: 'Fail', Error: state.Error ?? '', Cause: state.Cause ?? '' };
  }
}

/** The part of a state that the library does, as a Task. */
function dataFlow(state: Fields, catchers: Catcher[]): Fields {
  const flow: Fields = { Type: 'Task', Resource: 'local', TimeoutSeconds: NEVER_SECONDS };
  for (const field of ['Next', 'End', 'Default', 'Result', 'ResultPath']) {
    if (field in state) flow[field] = state[field];
  }
  for (const field of [
    ...['InputPath', 'OutputPath', 'ErrorPath', 'CausePath', 'Parameters', 'ResultSelector'],
  ]) {
    if (field in state) flow[field] = redirect(state[field]);
  }
  // `$` would become a field of that name.
  if (flow.ResultPath === '$') delete flow.ResultPath;
  if (catchers.length > 0) {
    // The library takes our States.Timeout for one that States.TaskFailed stands for; on AWS it never is.
    const timeout = catchers.find(({ ErrorEquals: names }) =>
      names.some((error) => error === 'States.Timeout' || error === 'States.ALL'),
    );
    flow.Catch = [...(timeout ? [{ ...timeout, ErrorEquals: ['States.Timeout'] }] : []), ...catchers].map(
      ({ ResultPath, ...catcher }) =>
        ResultPath === undefined || ResultPath === '$' ? catcher : { ...catcher, ResultPath },
    );
  }
  return flow;
}

function taskStep(base: StepBase, state: Fields, { where, express }: Place): TaskStep {
  const resource = String(state.Resource);
  const integration = integrationOf(resource);
  if (integration === undefined) throw new UnsupportedLocally(`the integration '${resource}'`, where);
  if (express && !integration.express) {
    throw new InvalidDefinition(`${where}: '${resource}' cannot run in an EXPRESS child execution`);
  }
  integration.check((state.Parameters ?? {}) as Fields, where);
  const timeout = state.TimeoutSeconds;
  return {
    ...base,
    kind: 'task',
    resource,
    ...(typeof timeout === 'number' ? { timeoutSeconds: timeout } : {}),
  };
}

function waitTemplate(state: Fields, place: Place): Template {
  const path = state.SecondsPath ?? state.TimestampPath;
  if (path === undefined) return constant(state.Seconds ?? state.Timestamp);
  return pathTemplate(path, place);
}

function mapStep(base: StepBase, state: Fields, place: Place): MapStep {
  return {
    ...base,
    kind: 'map',
    ...mapItems(state, place),
    processor: processor(state, { ...place, mapItem: true }),
  };
}

function distributedStep(base: StepBase, state: Fields, place: Place): DistributedMapStep {
  const { where } = place;
  if (place.express)
    throw new InvalidDefinition(`${where}: no Distributed Map in an EXPRESS child execution`);
  const express =
    fields(fields(state.ItemProcessor, where).ProcessorConfig, where).ExecutionType === 'EXPRESS';
  const label = state.Label ?? base.name.replaceAll(/[^A-Za-z0-9]+/g, '').slice(0, 40);
  if (typeof label !== 'string' || label.length > 40 || /[\s?*<>{}[\]:;,\\|^~$#%&`"]/.test(label)) {
    throw new InvalidDefinition(`${where}: Label must be at most 40 characters without spaces or signs`);
  }
  return {
    ...base,
    kind: 'distributed',
    label,
    express,
    ...mapItems(state, place),
    toleratedCount: numberTemplate(state, 'ToleratedFailureCount', undefined, place),
    toleratedPercentage: numberTemplate(state, 'ToleratedFailurePercentage', undefined, place),
    ...('ItemReader' in state ? { reader: itemReader(state, place) } : {}),
    ...('ResultWriter' in state ? { writer: resultWriter(state, place) } : {}),
    // Children are executions of their own: the item is their input, not in their context.
    processor: processor(state, { ...place, mapItem: false, express }),
  };
}

function mapItems(state: Fields, place: Place): Pick<MapStep, 'items' | 'selector' | 'maxConcurrency'> {
  checkTemplate(state.ItemSelector, { ...place, mapItem: true });
  return {
    ...('ItemsPath' in state ? { items: pathTemplate(state.ItemsPath, place) } : {}),
    ...('ItemSelector' in state ? { selector: template(state.ItemSelector) } : {}),
    maxConcurrency: numberTemplate(state, 'MaxConcurrency', 0, place),
  };
}

const processor = (state: Fields, place: Place): Program =>
  compileMachine(state.ItemProcessor, { ...place, where: `${place.where}, ItemProcessor` }, [
    'ProcessorConfig',
    'QueryLanguage',
  ]);

function isDistributed(state: Fields, where: string): boolean {
  if (state.ItemProcessor === undefined) {
    throw new UnsupportedLocally('a Map without ItemProcessor (Iterator is its old name)', where);
  }
  const config = fields(
    fields(state.ItemProcessor, where).ProcessorConfig ?? {},
    `${where}, ProcessorConfig`,
  );
  allow(config, ['Mode', 'ExecutionType'], `${where}, ProcessorConfig`);
  return config.Mode === 'DISTRIBUTED';
}

function itemReader(state: Fields, place: Place): ItemReader {
  const where = `${place.where}, ItemReader`;
  const reader = fields(state.ItemReader, where);
  allow(reader, ['Resource', 'Parameters', 'ReaderConfig'], where);
  const resource = String(reader.Resource).replace(/^arn:aws:states:::s3:/, '');
  if (resource !== 'getObject' && resource !== 'listObjectsV2') {
    throw new UnsupportedLocally(`'${reader.Resource}'`, where);
  }
  const parameters = fields(reader.Parameters, where);
  allow(
    parameters,
    withPaths(resource === 'getObject' ? ['Bucket', 'Key', 'VersionId'] : ['Bucket', 'Prefix']),
    where,
  );
  checkTemplate(parameters, place);
  const config = fields(reader.ReaderConfig ?? {}, where);
  allow(
    config,
    resource === 'getObject'
      ? ['InputType', 'MaxItems', 'MaxItemsPath', 'CSVHeaderLocation', 'CSVHeaders', 'CSVDelimiter']
      : ['MaxItems', 'MaxItemsPath'],
    where,
  );
  const inputType = resource === 'listObjectsV2' ? 'JSONL' : config.InputType;
  if (inputType !== 'JSONL' && inputType !== 'JSON' && inputType !== 'CSV') {
    throw new UnsupportedLocally(`InputType ${String(config.InputType)}`, where);
  }
  const delimiters: Record<string, string> = { COMMA: ',', PIPE: '|', SEMICOLON: ';', SPACE: ' ', TAB: '\t' };
  const delimiter = delimiters[String(config.CSVDelimiter ?? 'COMMA')];
  if (delimiter === undefined) throw new InvalidDefinition(`${where}: CSVDelimiter ${config.CSVDelimiter}`);
  const given = config.CSVHeaderLocation === 'GIVEN';
  if (inputType === 'CSV' && !given && config.CSVHeaderLocation !== 'FIRST_ROW') {
    throw new InvalidDefinition(`${where}: CSV needs CSVHeaderLocation FIRST_ROW or GIVEN`);
  }
  return {
    resource,
    parameters: template(parameters),
    inputType,
    delimiter,
    ...(given ? { headers: listOf<string>(config.CSVHeaders) } : {}),
    maxItems: numberTemplate(config, 'MaxItems', undefined, place),
  };
}

function resultWriter(state: Fields, place: Place): ResultWriter {
  const where = `${place.where}, ResultWriter`;
  const writer = fields(state.ResultWriter, where);
  allow(writer, ['Resource', 'Parameters', 'WriterConfig'], where);
  if (writer.Resource !== 'arn:aws:states:::s3:putObject') {
    throw new UnsupportedLocally(`Resource '${writer.Resource}'`, where);
  }
  const parameters = fields(writer.Parameters, where);
  allow(parameters, withPaths(['Bucket', 'Prefix']), where);
  checkTemplate(parameters, place);
  const config = fields(writer.WriterConfig ?? {}, where);
  allow(config, ['Transformation', 'OutputType'], where);
  const transformation = config.Transformation ?? 'NONE';
  if (transformation !== 'NONE' && transformation !== 'COMPACT' && transformation !== 'FLATTEN') {
    throw new InvalidDefinition(`${where}: Transformation ${transformation}`);
  }
  return { parameters: template(parameters), transformation, lines: config.OutputType === 'JSONL' };
}

/** A rule of a Choice so that the library answers as AWS does: false, not an error, on a value of another type. */
function choiceRule(rule: Fields, place: Place): Fields {
  const { Next, Comment, ...test } = rule;
  const next = Next === undefined ? {} : { Next };
  if ('Not' in test) {
    allow(test, ['Not'], place.where);
    return { Not: choiceRule(fields(test.Not, place.where), place), ...next };
  }
  for (const operator of ['And', 'Or']) {
    if (operator in test) {
      allow(test, [operator], place.where);
      return { [operator]: listOf<Fields>(test[operator]).map((inner) => choiceRule(inner, place)), ...next };
    }
  }
  const { Variable, ...comparison } = test;
  checkPath(Variable, place);
  const [operator = '', ...more] = Object.keys(comparison);
  if (more.length > 0)
    throw new UnsupportedLocally(`a rule with ${operator} and ${more.join(', ')}`, place.where);
  const variable = redirect(Variable);
  const operand = comparison[operator];
  if (TYPE_TEST.test(operator)) {
    // The library only knows the true form.
    const positive = { Variable: variable, [operator]: true };
    return operand === false ? { Not: positive, ...next } : { ...positive, ...next };
  }
  if (/^BooleanEquals(Path)?$/.test(operator)) {
    return { Variable: variable, [operator]: redirectPath(operator, operand, place), ...next };
  }
  if (operator === 'StringMatches') {
    // To the library `?` is a wildcard as well.
    const pattern = String(operand).replaceAll('?', '\\?');
    return {
      And: [
        { Variable: variable, IsString: true },
        { Variable: variable, StringMatches: pattern },
      ],
      ...next,
    };
  }
  const [, kind] = COMPARISON.exec(operator) ?? [];
  if (kind === undefined) throw new UnsupportedLocally(`the comparison '${operator}'`, place.where);
  return {
    And: [
      { Variable: variable, [`Is${kind}`]: true },
      { Variable: variable, [operator]: redirectPath(operator, operand, place) },
    ],
    ...next,
  };
}

function redirectPath(operator: string, operand: unknown, place: Place): unknown {
  if (!operator.endsWith('Path')) return operand;
  checkPath(operand, place);
  return redirect(operand);
}

// --- templates and paths --------------------------------------------------------------------------------------

const libraryMachine = (definition: unknown): StateMachine =>
  // Checked by `compile`; the library's own check does not know our Task states.
  new StateMachine(definition as StateMachineDefinition, { validationOptions: { noValidate: true } });

const constant =
  (value: unknown): Template =>
  async () =>
    value;

/** Evaluates by a machine of one Pass state: the library offers no other way to its templates. */
function template(parameters: unknown): Template {
  const machine = libraryMachine({
    StartAt: 'Value',
    States: { Value: { Type: 'Pass', Parameters: redirect(parameters), End: true } },
  });
  return async (input, context) => {
    try {
      return await machine.run(input as LibraryValue, { context }).result;
    } catch (error) {
      throw libraryFailure(error);
    }
  };
}

export type LibraryValue = Parameters<StateMachine['run']>[0];

/** The failure inside an error of the library: ours, one it names, or a fault in evaluating. */
export function libraryFailure(error: unknown): StateError | Interrupted {
  const cause = error instanceof ExecutionError ? error.cause : error;
  const named = cause instanceof Error && 'isCatchable' in cause && !(cause instanceof Interrupted);
  return asFailure(
    named && !(cause instanceof StateError) ? new StateError(cause.name, cause.message) : cause,
  );
}

function pathTemplate(path: unknown, place: Place): Template {
  checkPath(path, place);
  const evaluate = template({ 'value.$': path });
  return async (input, context) => ((await evaluate(input, context)) as Fields).value;
}

/** `<field>` as a constant or `<field>Path`. */
function numberTemplate(state: Fields, field: string, otherwise: number | undefined, place: Place): Template {
  const path = state[`${field}Path`];
  return path === undefined ? constant(state[field] ?? otherwise) : pathTemplate(path, place);
}

/**
 * The library puts its own values under `$$.Execution` (the input of the innermost machine, the time of this
 * process's start), so the execution's true ones are kept under another name.
 */
function redirect(value: unknown): unknown {
  if (typeof value === 'string') return value.replaceAll(/\$\$\.Execution\b/g, () => '$$.TrueExecution');
  if (Array.isArray(value)) return value.map(redirect);
  if (typeof value !== 'object' || value === null) return value;
  return Object.fromEntries(
    Object.entries(value).map(([key, inner]) => [
      key,
      typeof inner === 'string' && !key.endsWith('.$') ? inner : redirect(inner),
    ]),
  );
}

function checkTemplate(value: unknown, place: Place): void {
  if (Array.isArray(value)) for (const inner of value) checkTemplate(inner, place);
  if (typeof value !== 'object' || value === null) return;
  for (const [key, inner] of Object.entries(value)) {
    if (key.endsWith('.$')) checkPath(inner, place);
    else checkTemplate(inner, place);
  }
}

/** A path or an intrinsic function; undefined and null are for the schema to judge. */
function checkPath(value: unknown, place: Place): void {
  if (typeof value !== 'string') return;
  const code = value.replaceAll(/'(?:\\.|[^'\\])*'/g, "''");
  for (const [, name = ''] of code.matchAll(/States\.(\w+)/g)) {
    if (!INTRINSICS.has(name)) {
      const why = INTRINSIC_TROUBLE[name];
      throw new UnsupportedLocally(`States.${name}${why ? ` (${why})` : ''}`, place.where);
    }
  }
  for (const [path] of code.matchAll(/\$[^\s,)]*/g)) {
    if (path.startsWith('$$')) {
      const known = CONTEXT_PATHS.some((pattern) => pattern.test(path));
      if (!known && !(place.mapItem && MAP_ITEM_PATH.test(path)))
        throw new UnsupportedLocally(path, place.where);
    } else if (/^\$\w/.test(path)) {
      throw new UnsupportedLocally(`the variable '${path}'`, place.where);
    }
  }
}

/** The library writes to dotted paths only; others become fields with strange names. */
function checkResultPath(path: unknown, where: string): void {
  if (typeof path === 'string' && !/^\$(\.[^.[\]$'"]+(\[\d+\])*)*$/.test(path)) {
    throw new UnsupportedLocally(`the ResultPath '${path}'`, where);
  }
}

// --- shapes -----------------------------------------------------------------------------------------------------

function fields(value: unknown, where: string): Fields {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new InvalidDefinition(`${where} must be an object`);
  }
  return value as Fields;
}

const listOf = <Item>(value: unknown): Item[] => (Array.isArray(value) ? value : []);
const withPaths = (names: string[]): string[] => names.flatMap((name) => [name, `${name}.$`]);

function allow(value: Fields, allowed: string[], where: string): void {
  const unknown = Object.keys(value).find((field) => !allowed.includes(field));
  if (unknown !== undefined) throw new UnsupportedLocally(`the field '${unknown}'`, where);
}

function jsonPathOnly(value: Fields, where: string): void {
  if (value.QueryLanguage !== undefined && value.QueryLanguage !== 'JSONPath') {
    throw new UnsupportedLocally(`QueryLanguage ${String(value.QueryLanguage)}`, where);
  }
}
