/**
 * The rules that the deployment is held to where no linter looks: least privilege, what every bucket, log group and
 * function must have, and what every task of the state machine must have. Each rule takes a document and gives back
 * findings, one line each; none is good.
 */

export interface Statement {
  Sid?: string;
  Effect: string;
  Action: string | string[];
  Resource?: unknown;
  Principal?: unknown;
  Condition?: Record<string, Record<string, unknown>>;
}

interface PolicyDocument {
  Statement: Statement[];
}

export interface Template {
  Resources: Record<string, { Type: string; Properties: Record<string, unknown> }>;
}

export interface State {
  Type: string;
  Resource?: string;
  Parameters?: Record<string, unknown>;
  TimeoutSeconds?: number;
  Retry?: { ErrorEquals: string[] }[];
  Catch?: { ErrorEquals: string[] }[];
  ToleratedFailurePercentage?: number;
  ItemProcessor?: Definition & { ProcessorConfig?: { Mode?: string; ExecutionType?: string } };
  Branches?: Definition[];
}

export interface Definition {
  StartAt: string;
  States: Record<string, State>;
}

/** Actions for which AWS takes no narrower resource than `*`, each with the reason. */
export const ONLY_STAR: Record<string, string> = {
  'ecr:GetAuthorizationToken': 'the token is for the registry, which is no resource',
  'sagemaker:ListModels': 'a list is of no one model',
  'cloudwatch:PutMetricData': 'metrics are no resources; a condition narrows the namespace',
};

const EXPRESS_SECONDS = 300;

/** What a call needs, and of what kind of thing; by operation. `.sync` watches its job by a rule of EventBridge. */
const ACTIONS: Record<string, [string, RegExp][]> = {
  createProcessingJob: jobActions('Processing', ['iam:PassRole', /JobRole/]),
  createTransformJob: jobActions('Transform'),
  createModel: [
    ['sagemaker:CreateModel', /:model\//],
    ['sagemaker:AddTags', /:model\//],
    ['iam:PassRole', /TransformRole/],
  ],
  deleteModel: [['sagemaker:DeleteModel', /:model\//]],
  stopTransformJob: [['sagemaker:StopTransformJob', /:transform-job\//]],
};

function jobActions(kind: 'Processing' | 'Transform', ...more: [string, RegExp][]): [string, RegExp][] {
  const job = new RegExp(`:${kind.toLowerCase()}-job/`);
  const rule = new RegExp(`SageMaker${kind}JobsRule$`);
  return [
    ...[`Create${kind}Job`, `Describe${kind}Job`, `Stop${kind}Job`, 'AddTags', 'ListTags'].map(
      (action): [string, RegExp] => [`sagemaker:${action}`, job],
    ),
    ...more,
    ...['PutTargets', 'PutRule', 'DescribeRule'].map((action): [string, RegExp] => [
      `events:${action}`,
      rule,
    ]),
  ];
}

const list = <T>(value: T | T[] | undefined): T[] =>
  value === undefined ? [] : Array.isArray(value) ? value : [value];

/** The text of a value with CloudFormation's functions in it; what refers to something stands as `${…}`. */
export function flat(value: unknown): string {
  if (typeof value === 'string') return value;
  if (typeof value !== 'object' || value === null) return String(value);
  const [name, argument] = Object.entries(value)[0] ?? [];
  if (name === 'Ref') return `\${${argument}}`;
  if (name === 'Fn::GetAtt') return `\${${Array.isArray(argument) ? argument.join('.') : argument}}`;
  if (name === 'Fn::Sub') return flat(Array.isArray(argument) ? argument[0] : argument);
  if (name === 'Fn::Join') {
    const [separator, parts] = argument as [string, unknown[]];
    return parts.map(flat).join(separator);
  }
  return JSON.stringify(value);
}

function* ofType(template: Template, type: string): Generator<[string, Record<string, unknown>]> {
  for (const [id, resource] of Object.entries(template.Resources))
    if (resource.Type === type) yield [id, resource.Properties];
}

/** Every statement that grants a role something: [role or policy, statement]. */
function* grants(template: Template): Generator<[string, Statement]> {
  for (const [id, role] of ofType(template, 'AWS::IAM::Role'))
    for (const { PolicyDocument: document } of list(role.Policies as { PolicyDocument: PolicyDocument }[]))
      for (const statement of list(document.Statement)) yield [id, statement];
  for (const type of ['AWS::IAM::Policy', 'AWS::IAM::ManagedPolicy', 'AWS::IAM::RolePolicy'])
    for (const [id, policy] of ofType(template, type))
      for (const statement of list((policy.PolicyDocument as PolicyDocument).Statement))
        yield [id, statement];
}

/** Why an ARN with `*` in it is not specific; undefined when it is: the star stands behind a name of our own. */
function tooWide(resource: string): string | undefined {
  if (resource === '*') return 'is everything';
  if (!resource.startsWith('arn:')) return undefined;
  // References hold colons of their own (`${AWS::Region}`).
  const [, , service, region, account, ...rest] = resource.replaceAll(/\$\{[^}]*\}/g, 'reference').split(':');
  const name = rest.join(':').replace(/^[a-z-]+[/:](?=.)/, '');
  if (service?.includes('*')) return 'names no service';
  if (region?.includes('*') || account?.includes('*')) return 'names no region or account';
  return name.startsWith('*') ? 'names nothing of its kind' : undefined;
}

/** Each role may do certain things to certain things, and is one holder's. */
export function leastPrivilege(template: Template): string[] {
  const findings: string[] = [];
  for (const [id, statement] of grants(template)) {
    const where = `${id}.${statement.Sid ?? '(no Sid)'}`;
    const actions = list(statement.Action);
    if ('NotAction' in statement || 'NotResource' in statement)
      findings.push(`${where}: allows all but some`);
    for (const action of actions)
      if (action.includes('*')) findings.push(`${where}: the action ${action} is a pattern`);
    for (const resource of list(statement.Resource as unknown).map(flat)) {
      const wide = tooWide(resource);
      const excused = resource === '*' && actions.every((action) => action in ONLY_STAR);
      if (wide !== undefined && !excused) findings.push(`${where}: the resource ${resource} ${wide}`);
    }
    if (actions.includes('iam:PassRole') && !statement.Condition?.StringEquals?.['iam:PassedToService'])
      findings.push(`${where}: iam:PassRole without iam:PassedToService`);
    if (
      actions.includes('cloudwatch:PutMetricData') &&
      !statement.Condition?.StringEquals?.['cloudwatch:namespace']
    )
      findings.push(`${where}: cloudwatch:PutMetricData without a namespace`);
  }
  for (const [id, role] of ofType(template, 'AWS::IAM::Role')) {
    if (list(role.ManagedPolicyArns as unknown).length > 0)
      findings.push(`${id}: has managed policies, whose rights stand elsewhere`);
    for (const { Principal: principal } of (role.AssumeRolePolicyDocument as PolicyDocument).Statement)
      if (typeof principal !== 'object' || principal === null || Object.keys(principal).join() !== 'Service')
        findings.push(`${id}: may be assumed by others than a service`);
  }
  return [...findings, ...sharedRoles(template)];
}

/** What SageMaker itself does under a job's role: pull the image, keep its lines, measure its instances. */
const OF_EVERY_JOB = [
  'ecr:BatchGetImage',
  'ecr:GetAuthorizationToken',
  'logs:PutLogEvents',
  'cloudwatch:PutMetricData',
];

/** The roles of SageMaker's jobs allow what SageMaker needs around the container. */
export function jobRights(template: Template): string[] {
  const findings: string[] = [];
  for (const [id, role] of ofType(template, 'AWS::IAM::Role')) {
    const trusted = (role.AssumeRolePolicyDocument as PolicyDocument).Statement.some(
      ({ Principal }) => (Principal as { Service?: unknown })?.Service === 'sagemaker.amazonaws.com',
    );
    if (!trusted) continue;
    const allowed = [...grants(template)].flatMap(([holder, { Effect, Action }]) =>
      holder === id && Effect === 'Allow' ? list(Action) : [],
    );
    for (const action of OF_EVERY_JOB) if (!allowed.includes(action)) findings.push(`${id}: lacks ${action}`);
  }
  return findings;
}

/** Roles that more than one function acts under, or functions without one of their own. */
function sharedRoles(template: Template): string[] {
  const holders = new Map<string, string[]>();
  for (const type of ['AWS::Lambda::Function', 'AWS::StepFunctions::StateMachine'])
    for (const [id, { Role, RoleArn }] of ofType(template, type)) {
      const role = flat(Role ?? RoleArn);
      holders.set(role, [...(holders.get(role) ?? []), id]);
    }
  return [...holders].flatMap(([role, ids]) => {
    const roleId = /^\$\{(\w+)\.Arn\}$/.exec(role)?.[1];
    if (roleId === undefined || template.Resources[roleId]?.Type !== 'AWS::IAM::Role')
      return [`${ids.join(', ')}: the role ${role} is not of this template`];
    return ids.length > 1 ? [`${role}: is the role of ${ids.join(' and ')}`] : [];
  });
}

/** Buckets are encrypted, versioned, closed to the public and reachable over TLS only. */
export function buckets(template: Template): string[] {
  const findings: string[] = [];
  const policies = [...ofType(template, 'AWS::S3::BucketPolicy')];
  for (const [id, bucket] of ofType(template, 'AWS::S3::Bucket')) {
    if (!JSON.stringify(bucket.BucketEncryption ?? '').includes('"SSEAlgorithm":'))
      findings.push(`${id}: is not encrypted`);
    if ((bucket.VersioningConfiguration as { Status?: string } | undefined)?.Status !== 'Enabled')
      findings.push(`${id}: keeps no versions`);
    const access = (bucket.PublicAccessBlockConfiguration ?? {}) as Record<string, unknown>;
    for (const name of ['BlockPublicAcls', 'BlockPublicPolicy', 'IgnorePublicAcls', 'RestrictPublicBuckets'])
      if (access[name] !== true) findings.push(`${id}: ${name} is not set`);
    const tlsOnly = policies
      .filter(([, policy]) => flat(policy.Bucket) === `\${${id}}`)
      .flatMap(([, policy]) => (policy.PolicyDocument as PolicyDocument).Statement)
      .some((statement) => {
        const resources = list(statement.Resource as unknown).map(flat);
        return (
          statement.Effect === 'Deny' &&
          statement.Principal === '*' &&
          list(statement.Action).join() === 's3:*' &&
          String(statement.Condition?.Bool?.['aws:SecureTransport']) === 'false' &&
          resources.some((resource) => resource.endsWith('}')) &&
          resources.some((resource) => resource.endsWith('}/*')) &&
          resources.every((resource) => resource.includes(`\${${id}`))
        );
      });
    if (!tlsOnly) findings.push(`${id}: may be reached without TLS`);
  }
  return findings;
}

/** Tables, topics and repositories are encrypted; tables can be put back to any moment; image tags do not move. */
export function stores(template: Template): string[] {
  const findings: string[] = [];
  for (const [id, table] of ofType(template, 'AWS::DynamoDB::Table')) {
    if (!(table.SSESpecification as { SSEEnabled?: boolean } | undefined)?.SSEEnabled)
      findings.push(`${id}: is not encrypted`);
    const recovery = table.PointInTimeRecoverySpecification as
      | { PointInTimeRecoveryEnabled?: boolean }
      | undefined;
    if (!recovery?.PointInTimeRecoveryEnabled) findings.push(`${id}: has no point-in-time recovery`);
  }
  for (const [id, topic] of ofType(template, 'AWS::SNS::Topic'))
    if (!topic.KmsMasterKeyId) findings.push(`${id}: is not encrypted`);
  for (const [id, repository] of ofType(template, 'AWS::ECR::Repository')) {
    if (!repository.EncryptionConfiguration) findings.push(`${id}: is not encrypted`);
    if (repository.ImageTagMutability !== 'IMMUTABLE') findings.push(`${id}: its tags may move`);
  }
  return findings;
}

const ADDING = new Set([
  ...['dynamodb:PutItem', 'dynamodb:Query', 'dynamodb:Scan', 'dynamodb:GetItem', 'dynamodb:BatchGetItem'],
  ...['s3:PutObject', 's3:AbortMultipartUpload', 's3:GetObject', 's3:GetObjectVersion'],
  ...['s3:ListBucket', 's3:ListBucketVersions'],
]);

/** The record is only ever added to: no role may change or delete events or anchors, and anchors are locked. */
export function record(template: Template): string[] {
  const findings: string[] = [];
  for (const [id, statement] of grants(template)) {
    const where = `${id}.${statement.Sid ?? '(no Sid)'}`;
    const ofRecord = list(statement.Resource as unknown)
      .map(flat)
      .some((resource) => /^\$\{(LineageTable|AnchorsBucket)\b/.test(resource));
    if (!ofRecord || statement.Effect !== 'Allow') continue;
    for (const action of list(statement.Action))
      if (!ADDING.has(action)) findings.push(`${where}: ${action} does more than add to the record`);
  }
  const anchors = template.Resources.AnchorsBucket?.Properties;
  const { DefaultRetention: retention } = ((
    anchors?.ObjectLockConfiguration as { Rule?: { DefaultRetention?: unknown } } | undefined
  )?.Rule ?? {}) as { DefaultRetention?: { Mode?: string; Days?: number } };
  if (anchors?.ObjectLockEnabled !== true || !retention?.Mode || !retention.Days)
    findings.push('AnchorsBucket: what is in it is not locked');
  return findings;
}

/** Every asynchronous edge has a queue for what is not taken: targets of rules, functions that rules call, subscribers. */
export function deadLetters(template: Template): string[] {
  const findings: string[] = [];
  const queues = new Map(
    [...ofType(template, 'AWS::SQS::Queue')].map(([id, queue]) => [`\${${id}.Arn}`, queue]),
  );
  const invoked = new Map(
    [...ofType(template, 'AWS::Lambda::EventInvokeConfig')].map(([, config]) => [
      functionOf(template, config.FunctionName),
      flat((config.DestinationConfig as { OnFailure?: { Destination?: unknown } })?.OnFailure?.Destination),
    ]),
  );
  for (const [id, rule] of ofType(template, 'AWS::Events::Rule'))
    for (const target of list(rule.Targets as Record<string, unknown>[])) {
      const where = `${id}.${target.Id}`;
      const queue = flat((target.DeadLetterConfig as { Arn?: unknown } | undefined)?.Arn);
      if (!queues.has(queue)) findings.push(`${where}: has no dead-letter queue`);
      else if (!sendersOf(template, queue).includes('events.amazonaws.com'))
        findings.push(`${where}: EventBridge may not send to its dead-letter queue`);
      if (!target.RetryPolicy) findings.push(`${where}: does not say how often it is tried`);
      const called = functionOf(template, target.Arn);
      if (called === undefined) continue;
      const destination = invoked.get(called);
      if (destination === undefined || !queues.has(destination))
        findings.push(`${where}: ${called} has no destination for what it fails`);
      else if (!maySend(template, called, destination))
        findings.push(`${where}: ${called} may not send to its destination`);
    }
  for (const type of ['AWS::SNS::Subscription', 'AWS::Lambda::EventSourceMapping'])
    for (const [id, edge] of ofType(template, type))
      if (!edge.RedrivePolicy && !edge.DestinationConfig) findings.push(`${id}: has no dead-letter queue`);
  for (const [name, queue] of queues) {
    const id = name.slice(2, -5);
    if (queue.SqsManagedSseEnabled !== true && !queue.KmsMasterKeyId)
      findings.push(`${id}: is not encrypted`);
    if (queue.MessageRetentionPeriod !== FORTNIGHT)
      findings.push(`${id}: does not keep messages for 14 days`);
    const policy = queuePolicy(template, name);
    const tlsOnly = policy.some(
      ({ Effect, Principal, Condition }) =>
        Effect === 'Deny' &&
        Principal === '*' &&
        String(Condition?.Bool?.['aws:SecureTransport']) === 'false',
    );
    if (!tlsOnly) findings.push(`${id}: may be reached without TLS`);
    const watched = [...ofType(template, 'AWS::CloudWatch::Alarm')].some(
      ([, alarm]) =>
        alarm.MetricName === 'ApproximateNumberOfMessagesVisible' &&
        JSON.stringify(alarm.Dimensions).includes(id),
    );
    if (!watched) findings.push(`${id}: no alarm rings for what lies in it`);
  }
  return findings;
}

const FORTNIGHT = 14 * 24 * 3600;

/** Logical id of the function that a reference means. */
function functionOf(template: Template, reference: unknown): string | undefined {
  const id = /^\$\{(\w+)(\.Arn)?\}$/.exec(flat(reference))?.[1] ?? '';
  return template.Resources[id]?.Type === 'AWS::Lambda::Function' ? id : undefined;
}

const queuePolicy = (template: Template, arn: string): Statement[] =>
  [...ofType(template, 'AWS::SQS::QueuePolicy')]
    .filter(([, { Queues }]) =>
      list(Queues as unknown)
        .map(flat)
        .includes(arn.replace('.Arn', '')),
    )
    .flatMap(([, { PolicyDocument: document }]) => (document as PolicyDocument).Statement);

const sendersOf = (template: Template, arn: string): unknown[] =>
  queuePolicy(template, arn)
    .filter(({ Effect, Action }) => Effect === 'Allow' && list(Action).includes('sqs:SendMessage'))
    .map(({ Principal }) => (Principal as { Service?: unknown })?.Service);

function maySend(template: Template, id: string, queue: string): boolean {
  const role = /^\$\{(\w+)\.Arn\}$/.exec(flat(template.Resources[id]?.Properties.Role))?.[1];
  return [...grants(template)].some(
    ([holder, { Action, Resource }]) =>
      holder === role &&
      list(Action).includes('sqs:SendMessage') &&
      list(Resource as unknown)
        .map(flat)
        .includes(queue),
  );
}

/** A metric as an alarm or a widget asks for it. */
export interface Asked {
  by: string;
  namespace: string;
  name: string;
  dimensions: Record<string, string>;
}

/** Every metric that an alarm is set on or the dashboard shows; searches aside. */
export function askedMetrics(template: Template): Asked[] {
  const asked: Asked[] = [];
  const dimensionsOf = (dimensions: unknown) =>
    Object.fromEntries(
      list(dimensions as { Name: string; Value: unknown }[]).map(({ Name, Value }) => [Name, flat(Value)]),
    );
  for (const [by, alarm] of ofType(template, 'AWS::CloudWatch::Alarm')) {
    if (alarm.MetricName) {
      const { Namespace, MetricName, Dimensions } = alarm as Record<string, string>;
      asked.push({
        ...{ by, namespace: Namespace ?? '', name: MetricName ?? '' },
        dimensions: dimensionsOf(Dimensions),
      });
    }
    for (const { MetricStat } of list(
      alarm.Metrics as { MetricStat?: { Metric: Record<string, unknown> } }[],
    )) {
      if (!MetricStat) continue;
      const { Namespace, MetricName, Dimensions } = MetricStat.Metric;
      const dimensions = dimensionsOf(Dimensions);
      asked.push({ by, namespace: String(Namespace), name: String(MetricName), dimensions });
    }
  }
  for (const [by, dashboard] of ofType(template, 'AWS::CloudWatch::Dashboard')) {
    const { widgets } = JSON.parse(flat(dashboard.DashboardBody)) as {
      widgets: { properties: { metrics: unknown[][] } }[];
    };
    for (const metric of widgets.flatMap(({ properties }) => properties.metrics)) {
      const [namespace, name, ...rest] = metric.filter((part) => typeof part === 'string') as string[];
      if (namespace === undefined || name === undefined) continue;
      const dimensions: Record<string, string> = {};
      for (let i = 0; i + 1 < rest.length; i += 2) dimensions[rest[i] ?? ''] = rest[i + 1] ?? '';
      asked.push({ by, namespace, name, dimensions });
    }
  }
  return asked;
}

/** Metrics that AWS itself emits, with the dimensions it emits them by. */
const OF_AWS: Record<string, string> = {
  'AWS/Lambda Errors': 'FunctionName',
  'AWS/SQS ApproximateNumberOfMessagesVisible': 'QueueName',
  'AWS/States ExecutionsAborted': 'StateMachineArn',
  'AWS/States ExecutionsFailed': 'StateMachineArn',
  'AWS/States ExecutionsTimedOut': 'StateMachineArn',
};

/**
 * Alarms and dashboard ask for what there is: AWS's own metrics by things of this template, and Slideway's by the
 * function that emits them. `emits` says whether a function's code emits a metric under these further dimensions.
 */
export function metrics(
  template: Template,
  emits: (service: string, metric: string, further: string[]) => boolean,
): string[] {
  const findings: string[] = [];
  const names = new Set<string>();
  for (const [id, { FunctionName }] of ofType(template, 'AWS::Lambda::Function'))
    names.add(flat(FunctionName)).add(id);
  for (const [id] of ofType(template, 'AWS::SQS::Queue')) names.add(`\${${id}.QueueName}`);
  for (const [id] of ofType(template, 'AWS::StepFunctions::StateMachine')) names.add(`\${${id}}`);
  for (const { by, namespace, name, dimensions } of askedMetrics(template)) {
    const where = `${by}: ${namespace} ${name}`;
    if (namespace === 'Slideway') {
      const { service = '', stage, ...further } = dimensions;
      if (!stage) findings.push(`${where}: of which stage?`);
      if (!emits(service, name, Object.keys(further)))
        findings.push(`${where}: ${service} does not emit it so`);
      continue;
    }
    const [dimension, ...more] = Object.keys(dimensions);
    if (more.length > 0 || dimension === undefined || OF_AWS[`${namespace} ${name}`] !== dimension)
      findings.push(`${where}: AWS does not emit it by ${Object.keys(dimensions).join(', ')}`);
    else if (!names.has(dimensions[dimension] ?? ''))
      findings.push(`${where}: there is no ${dimensions[dimension]}`);
  }
  for (const [id, { FunctionName }] of ofType(template, 'AWS::Lambda::Function')) {
    const watched = askedMetrics(template).some(
      ({ name, dimensions }) => name === 'Errors' && dimensions.FunctionName === flat(FunctionName),
    );
    if (!watched) findings.push(`${id}: no alarm rings for its errors`);
  }
  for (const [id, alarm] of ofType(template, 'AWS::CloudWatch::Alarm'))
    if (list(alarm.AlarmActions as unknown).length === 0) findings.push(`${id}: rings nobody`);
  return findings;
}

/** Log groups are kept for a time that is said, and every function has one. */
export function logGroups(template: Template): string[] {
  const groups = new Map(
    [...ofType(template, 'AWS::Logs::LogGroup')].map(([id, group]) => [
      flat(group.LogGroupName),
      [id, group] as const,
    ]),
  );
  const findings = [...groups.values()].flatMap(([id, group]) =>
    typeof group.RetentionInDays === 'number' ? [] : [`${id}: keeps its lines for ever`],
  );
  for (const [id, properties] of ofType(template, 'AWS::Lambda::Function'))
    if (!groups.has(`/aws/lambda/${flat(properties.FunctionName)}`))
      findings.push(`${id}: has no log group of its own`);
  return findings;
}

/** Functions run where they were tested: on Node 24, on Arm. */
export function functions(template: Template): string[] {
  return [...ofType(template, 'AWS::Lambda::Function')].flatMap(([id, properties]) => [
    ...(properties.Runtime === 'nodejs24.x' ? [] : [`${id}: runs on ${properties.Runtime}`]),
    ...(flat(list(properties.Architectures).join()) === 'arm64' ? [] : [`${id}: does not run on arm64`]),
  ]);
}

/** A state of a definition at any depth, with the states around it, outermost first. */
export interface Placed {
  name: string;
  state: State;
  around: State[];
}

export function* states({ States }: Definition, around: State[] = []): Generator<Placed> {
  for (const [name, state] of Object.entries(States)) {
    yield { name, state, around };
    for (const inner of [state.ItemProcessor, ...(state.Branches ?? [])])
      if (inner) yield* states(inner, [...around, state]);
  }
}

const catchesAll = (state: State) => state.Catch?.at(-1)?.ErrorEquals.includes('States.ALL') === true;

/** A Map that counts what its children fail instead of failing with them. */
const tolerates = (state: State) => state.Type === 'Map' && state.ToleratedFailurePercentage === 100;

/** Every task has a limit, retries what may pass, and catches the rest; but for children whose failure is tolerated. */
export function tasks(definition: Definition): string[] {
  const findings: string[] = [];
  for (const { name, state, around } of states(definition)) {
    const express = around.some(
      ({ ItemProcessor }) => ItemProcessor?.ProcessorConfig?.ExecutionType === 'EXPRESS',
    );
    if (state.Type === 'Map' && !catchesAll(state) && !around.some(catchesAll))
      findings.push(`${name}: nothing catches its failures`);
    if (state.Type !== 'Task') continue;
    if (!state.TimeoutSeconds) findings.push(`${name}: has no TimeoutSeconds`);
    else if (express && state.TimeoutSeconds > EXPRESS_SECONDS)
      findings.push(`${name}: may take longer than an Express execution`);
    if (!state.Retry?.length) findings.push(`${name}: has no Retry`);
    for (const { ErrorEquals } of state.Retry ?? [])
      if (ErrorEquals.includes('States.ALL') || ErrorEquals.includes('States.TaskFailed'))
        findings.push(`${name}: retries whatever it was`);
    if (!catchesAll(state) && !around.some(tolerates)) findings.push(`${name}: nothing catches its failures`);
  }
  return findings;
}

/** SageMaker's resources in a state machine, `arn:aws:states:::[aws-sdk:]sagemaker:<operation>[.sync]`. */
export function* sagemakerTasks(definition: Definition): Generator<Placed & { operation: string }> {
  for (const placed of states(definition)) {
    const [, operation] =
      /^arn:aws[a-z-]*:states:::(?:aws-sdk:)?sagemaker:(\w+)/.exec(placed.state.Resource ?? '') ?? [];
    if (operation !== undefined) yield { ...placed, operation };
  }
}

/**
 * Jobs end by themselves, wait when the quota is used up, encrypt what their instances say to each other; models are
 * served without network, and never by more requests at once than their payload leaves room for.
 */
export function jobs(definition: Definition): string[] {
  const findings: string[] = [];
  for (const { name, state, operation } of sagemakerTasks(definition)) {
    const parameters = (state.Parameters ?? {}) as Record<string, Record<string, unknown> | undefined>;
    const says = (key: string) => key in parameters || `${key}.$` in parameters;
    if (operation === 'createProcessingJob') {
      const { StoppingCondition, NetworkConfig, AppSpecification, Environment } = parameters;
      if (!Object.keys(StoppingCondition ?? {}).some((key) => key.startsWith('MaxRuntimeInSeconds')))
        findings.push(`${name}: its job may run for ever`);
      if (NetworkConfig?.EnableInterContainerTrafficEncryption !== true)
        findings.push(`${name}: its instances talk in the clear`);
      if (typeof NetworkConfig?.EnableNetworkIsolation !== 'boolean')
        findings.push(`${name}: does not say whether its container is cut off from the network`);
      const runsModel = list(AppSpecification?.ContainerArguments as unknown).includes('process');
      if (runsModel && !('SLIDEWAY_MODEL_SECONDS.$' in (Environment ?? {})))
        findings.push(`${name}: its container is not told SLIDEWAY_MODEL_SECONDS`);
    }
    if (operation === 'createTransformJob') {
      if (!says('MaxConcurrentTransforms') || !says('MaxPayloadInMB'))
        findings.push(`${name}: leaves open how much is sent at once`);
      if (!state.Catch?.some(({ ErrorEquals }) => ErrorEquals.includes('States.Timeout')))
        findings.push(`${name}: its job may run for ever`);
      for (const limit of ['SLIDEWAY_REQUEST_SECONDS', 'SLIDEWAY_MODEL_SECONDS'])
        if (!(`${limit}.$` in (parameters.Environment ?? {})))
          findings.push(`${name}: its server is not told ${limit}`);
    }
    if (operation === 'createModel' && (parameters.EnableNetworkIsolation as unknown) !== true)
      findings.push(`${name}: its server has a network`);
    if (
      operation.startsWith('create') &&
      !state.Retry?.some(({ ErrorEquals }) =>
        ErrorEquals.includes('SageMaker.ResourceLimitExceededException'),
      )
    )
      findings.push(`${name}: does not wait for the quota`);
  }
  return findings;
}

/** The state machine's role may do what the definition asks: call its functions, run its jobs. */
export function machineRights(template: Template, definition: Definition): string[] {
  const [, machine] = [...ofType(template, 'AWS::StepFunctions::StateMachine')][0] ?? [];
  const role = /^\$\{(\w+)\.Arn\}$/.exec(flat(machine?.RoleArn))?.[1];
  const allowed = new Map<string, string[]>();
  for (const [id, statement] of grants(template))
    if (id === role && statement.Effect === 'Allow')
      for (const action of list(statement.Action))
        allowed.set(action, [
          ...(allowed.get(action) ?? []),
          ...list(statement.Resource as unknown).map(flat),
        ]);
  const invocable = new Set(
    (allowed.get('lambda:InvokeFunction') ?? []).map((resource) => {
      const id = /^\$\{(\w+)\.Arn\}$/.exec(resource)?.[1] ?? '';
      return flat(template.Resources[id]?.Properties.FunctionName);
    }),
  );
  const findings: string[] = [];
  for (const { name, state } of states(definition)) {
    const called = /^arn:aws:lambda:[^:]+:[^:]+:function:([^:]+)/.exec(state.Resource ?? '')?.[1];
    if (called !== undefined && !invocable.has(called))
      findings.push(`${name}: ${called} may not be invoked`);
  }
  for (const { name, operation } of sagemakerTasks(definition))
    for (const [action, of] of ACTIONS[operation] ?? [[`the actions of ${operation}`, /^/] as const])
      if (!allowed.get(action)?.some((resource) => of.test(resource)))
        findings.push(`${name}: lacks ${action}`);
  return findings;
}
