/**
 * The local AWS as a whole: takes the packaged template, creates what is in it from the services beside this file,
 * takes up what an earlier engine left unfinished, and stops without losing anything.
 */
import { randomUUID } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { z } from 'zod';
import { CloudFormation } from './cloudformation.ts';
import { DynamoDb } from './dynamodb.ts';
import { Events } from './events.ts';
import { Gateway, type RequestCounts } from './gateway.ts';
import { type Credentials, Iam } from './iam.ts';
import { LambdaApi } from './lambda/api.ts';
import { FunctionError } from './lambda/sandbox.ts';
import { Lambda } from './lambda/service.ts';
import { FolderLocked, isAlive, lock, thisProcess } from './lock.ts';
import { Logs } from './logs.ts';
import {
  bucketArn,
  functionArn,
  queueArn,
  type Resource,
  roleArn,
  ruleArn,
  stateMachineArn,
  type TypeName,
} from './resources.ts';
import type { LifecycleRule } from './s3/lifecycle.ts';
import type { BucketLock, LockMode } from './s3/lock.ts';
import { S3Service } from './s3/service.ts';
import { SageMaker, type SageMakerOptions } from './sagemaker/service.ts';
import { Secrets } from './secrets.ts';
import { type Message, Sns } from './sns.ts';
import { Sqs } from './sqs.ts';
import { StepFunctions } from './stepfunctions/service.ts';
import { loadPackage, type Stack } from './template.ts';
import {
  type Caller,
  type JsonService,
  LOCAL_ACCOUNT,
  LOCAL_REGION,
  ServiceError,
  UnsupportedLocally,
} from './types.ts';

export interface LocalAwsOptions {
  /** The state folder; made when it is not there. */
  state: string;
  /** The folder that `serverless package` wrote. */
  package: string;
  /** Python interpreter of the containers' environment. */
  python: string;
  /** The folder with one folder per container image. */
  containers: string;
  /**
   * Where the functions' bundles are unpacked, each under the hash of its content. Engines that share it share what
   * V8 compiled of them, too. Default: in the state folder.
   */
  bundles?: string;
  /** How jobs run. Default `auto`: in Docker where an engine has the image, else as processes. */
  executor?: 'auto' | 'process' | 'docker';
  /** Default 0: a free port. */
  port?: number;
  /** Waits and retry intervals of state machines are multiplied by it. Default 1. */
  timeScale?: number;
  /** False: unfinished executions, jobs and events are left as they are, for who only looks. Default true. */
  resume?: boolean;
  /** Faults of jobs to act out, for rehearsing what AWS does at its worst. Default: none. */
  faults?: SageMakerOptions['faults'];
  /** Told each message that would be mailed. */
  onMessage?(message: Message): void;
}

/** What a client needs to reach a running engine. */
export interface Connection {
  pid: number;
  endpoint: string;
  region: string;
  account: string;
  /** Of the person at the keyboard, who may do anything. */
  credentials: Credentials;
  /** The stack's outputs by name. */
  outputs: Record<string, string>;
}

export interface LocalAws extends Connection {
  /** The parts, for who is in the same process. */
  services: Services;
  /** Requests since the start. */
  counts(): RequestCounts;
  /** Stops everything; unfinished executions, jobs and events are taken up by the next start. */
  stop(): Promise<void>;
}

export interface Services {
  iam: Iam;
  s3: S3Service;
  dynamodb: DynamoDb;
  sns: Sns;
  sqs: Sqs;
  logs: Logs;
  lambda: Lambda;
  sageMaker: SageMaker;
  stepFunctions: StepFunctions;
  events: Events;
}

/** Another engine runs on the state folder. */
export class StateFolderInUse extends Error {
  override readonly name = 'StateFolderInUse';
}

const EVENTS_SERVICE = 'events.amazonaws.com';
const ASYNC_RETRIES = 2;
const DAYS_A_YEAR = 365;

const engineSchema = z.object({
  pid: z.number().int(),
  processStart: z.string().optional(),
  /** ISO 8601, UTC. */
  startedAt: z.string(),
  endpoint: z.string(),
  outputs: z.record(z.string(), z.string()),
});

/**
 * Starts the local AWS. Throws {@link StateFolderInUse}, `PackageNotFound`, `InvalidTemplate` or
 * {@link UnsupportedLocally}, the latter before anything of the template runs.
 */
export async function startLocalAws(options: LocalAwsOptions): Promise<LocalAws> {
  const stack = loadPackage(options.package);
  const state = resolve(options.state);
  mkdirSync(state, { recursive: true });
  const release = takeFolder(state);
  const engineFile = join(state, 'engine.json');
  rmSync(engineFile, { force: true });
  const engine = await composed(options, state, stack).catch((error: unknown) => {
    release();
    throw error;
  });
  const { gateway, services } = engine;
  const { endpoint } = gateway;
  writeWhole(engineFile, {
    ...thisProcess(),
    startedAt: new Date().toISOString(),
    endpoint,
    outputs: stack.outputs,
  });
  let stopped: Promise<void> | undefined;
  const stop = async () => {
    rmSync(engineFile, { force: true });
    await engine.close().finally(release);
  };
  return {
    pid: process.pid,
    endpoint,
    region: LOCAL_REGION,
    account: LOCAL_ACCOUNT,
    credentials: services.iam.root,
    outputs: stack.outputs,
    services,
    counts: () => gateway.counts(),
    stop: () => {
      stopped ??= stop();
      return stopped;
    },
  };
}

/** A started engine; whatever goes wrong on the way, nothing of it is left running. */
async function composed(options: LocalAwsOptions, state: string, stack: Stack): Promise<Engine> {
  const engine = new Engine(options, state, stack);
  try {
    await engine.start();
    return engine;
  } catch (error) {
    // Why it did not start is what counts, not what was in no state to close.
    await engine.close().catch(() => {});
    throw error;
  }
}

/** How to reach the engine that runs on a state folder; undefined when none does. */
export function attachLocalAws(folder: string): Connection | undefined {
  const state = resolve(folder);
  const running = readEngine(state);
  if (running === undefined || !isAlive(running)) return undefined;
  const { pid, endpoint, outputs } = running;
  const credentials = new Iam({ folder: state }).root;
  return { pid, endpoint, region: LOCAL_REGION, account: LOCAL_ACCOUNT, credentials, outputs };
}

/** The services of one engine, composed; they see each other only through what is passed here. */
class Engine {
  readonly gateway: Gateway;
  readonly services: Services;
  readonly #options: LocalAwsOptions;
  readonly #stack: Stack;

  constructor(options: LocalAwsOptions, state: string, stack: Stack) {
    this.#options = options;
    this.#stack = stack;
    const folder = (name: string) => join(state, name);
    const endpoint = () => this.gateway.endpoint;
    const iam = new Iam({ folder: state });
    const credentials = (arn: string) => iam.credentials(arn);
    const logs = new Logs({ folder: folder('logs') });
    const events = new Events({
      folder: folder('events'),
      deliver: (delivery) => this.#deliver(delivery),
      bury: async ({ queueArn, ruleArn: rule, input, attributes }) => {
        this.services.sqs.send(queueArn, input, attributes, iam.serviceCaller(EVENTS_SERVICE, rule));
      },
    });
    const lambda = new Lambda({
      folder: options.bundles ?? folder('lambda'),
      endpoint,
      credentials,
      log: (group, stream, lines) => logs.append(group, stream, lines),
    });
    this.services = {
      iam,
      logs,
      events,
      lambda,
      s3: new S3Service({
        folder: folder('s3'),
        onObjectCreated: (created) => events.objectCreated(created),
        onExpired: (expired) =>
          logs.append('/local/s3', 'lifecycle', [JSON.stringify({ event: 'expired', ...expired })]),
      }),
      dynamodb: new DynamoDb({ folder: folder('dynamodb') }),
      sns: new Sns({
        folder: folder('messages'),
        onMessage: (message) => options.onMessage?.(message),
      }),
      sqs: new Sqs({ folder: folder('queues'), endpoint }),
      sageMaker: new SageMaker({
        folder: folder('jobs'),
        endpoint,
        credentials,
        logs,
        containers: (imageUri) => this.#container(imageUri),
        python: options.python,
        executor: options.executor ?? 'auto',
        ...(options.faults === undefined ? {} : { faults: options.faults }),
      }),
      stepFunctions: new StepFunctions({
        folder: folder('executions'),
        endpoint,
        credentials,
        invokeLambda: (arn, payload, role) => lambda.invoke(arn, payload, iam.caller(role)),
        ...(options.timeScale === undefined ? {} : { timeScale: options.timeScale }),
      }),
    };
    const { s3, dynamodb, sns, sqs, sageMaker, stepFunctions } = this.services;
    this.gateway = new Gateway({
      principals: (accessKeyId) => iam.principal(accessKeyId),
      services: {
        s3: { protocol: 's3', service: s3 },
        dynamodb: { protocol: 'json-body', service: dynamodb },
        sns: { protocol: 'query-body', service: sns },
        sqs: { protocol: 'json', service: sqs },
        lambda: { protocol: 'json-body', service: new LambdaApi(lambda) },
        states: { protocol: 'json', service: stepFunctions },
        sagemaker: {
          protocol: 'json',
          service: seenBy(sageMaker, (caller) => iam.passingTo('sagemaker.amazonaws.com', caller)),
        },
        logs: { protocol: 'json', service: logs },
        cloudformation: {
          protocol: 'query-body',
          service: new CloudFormation({ stackName: stack.name, outputs: stack.outputs }),
        },
        secretsmanager: { protocol: 'json', service: new Secrets({ folder: folder('secrets') }) },
      },
    });
  }

  /** Creates what the template holds, then takes up what is unfinished, in the order in which it depends. */
  async start(): Promise<void> {
    this.#createRoles();
    this.#createPermissions();
    for (const resource of this.#stack.resources) await this.#create(resource);
    await this.gateway.listen(this.#options.port ?? 0);
    if (this.#options.resume === false) return;
    const { s3, sageMaker, stepFunctions, events } = this.services;
    await s3.recover();
    await sageMaker.recover();
    await stepFunctions.recover();
    events.recover();
  }

  /** Those who make requests stop before those who answer them. Everything is closed, whatever fails. */
  async close(): Promise<void> {
    const { events, stepFunctions, sageMaker, lambda, s3, dynamodb } = this.services;
    const errors: unknown[] = [];
    for (const part of [events, stepFunctions, sageMaker, lambda, this.gateway, s3, dynamodb]) {
      await part.close().catch((error: unknown) => errors.push(error));
    }
    if (errors.length > 0) throw new AggregateError(errors, 'Not every part of the local AWS closed well.');
  }

  /** Roles come first, each with every policy that is attached to it anywhere in the template. */
  #createRoles(): void {
    const attached = this.#of('AWS::IAM::Policy');
    for (const { name, properties } of this.#of('AWS::IAM::Role')) {
      const inline = properties.Policies.map((policy) => ({
        name: policy.PolicyName,
        document: policy.PolicyDocument,
      }));
      const more = attached
        .filter((policy) => policy.properties.Roles.includes(name))
        .map((policy) => ({ name: policy.name, document: policy.properties.PolicyDocument }));
      this.services.iam.addRole({
        arn: roleArn(name),
        trust: properties.AssumeRolePolicyDocument,
        policies: [...inline, ...more],
        managedPolicyArns: properties.ManagedPolicyArns,
      });
    }
  }

  /** The policy of each function: all that AWS::Lambda::Permission grants on it anywhere in the template. */
  #createPermissions(): void {
    const statements = new Map<string, unknown[]>();
    for (const { properties } of this.#of('AWS::Lambda::Permission')) {
      const { Action, FunctionName, Principal, SourceArn, SourceAccount } = properties;
      const arn = FunctionName.startsWith('arn:') ? FunctionName : functionArn(FunctionName);
      const conditions = {
        ...(SourceArn && { ArnLike: { 'aws:SourceArn': SourceArn } }),
        ...(SourceAccount && { StringEquals: { 'aws:SourceAccount': SourceAccount } }),
      };
      const statement = {
        Effect: 'Allow',
        Principal: { Service: Principal },
        Action,
        Resource: arn,
        Condition: conditions,
      };
      statements.set(arn, [...(statements.get(arn) ?? []), statement]);
    }
    for (const [arn, Statement] of statements) this.services.iam.setResourcePolicy(arn, { Statement });
  }

  async #create(resource: Resource): Promise<void> {
    const { iam, s3, dynamodb, sns, sqs, lambda, stepFunctions, events } = this.services;
    const { name } = resource;
    switch (resource.type) {
      case 'AWS::S3::Bucket': {
        const { VersioningConfiguration, NotificationConfiguration } = resource.properties;
        const { ObjectLockEnabled, ObjectLockConfiguration, LifecycleConfiguration } = resource.properties;
        await s3.createBucket(name, {
          versioning: VersioningConfiguration?.Status === 'Enabled',
          eventBridge: NotificationConfiguration?.EventBridgeConfiguration.EventBridgeEnabled ?? false,
          ...(ObjectLockEnabled && { lock: lockOf(ObjectLockConfiguration?.Rule?.DefaultRetention) }),
          lifecycle: lifecycleOf(LifecycleConfiguration),
        });
        break;
      }
      case 'AWS::S3::BucketPolicy':
        iam.setResourcePolicy(bucketArn(resource.properties.Bucket), resource.properties.PolicyDocument);
        break;
      case 'AWS::DynamoDB::Table':
        await dynamodb.createTable(name, resource.properties);
        break;
      case 'AWS::SQS::Queue': {
        const { VisibilityTimeout, MessageRetentionPeriod } = resource.properties;
        sqs.createQueue(name, { visibilityTimeout: VisibilityTimeout, retention: MessageRetentionPeriod });
        break;
      }
      case 'AWS::SQS::QueuePolicy':
        for (const url of resource.properties.Queues) {
          iam.setResourcePolicy(queueArn(url.split('/').at(-1) ?? ''), resource.properties.PolicyDocument);
        }
        break;
      case 'AWS::SNS::Topic': {
        const subscribers = resource.properties.Subscription ?? [];
        sns.createTopic(
          name,
          subscribers.map((subscriber) => subscriber.Endpoint),
        );
        break;
      }
      case 'AWS::SNS::TopicPolicy':
        for (const topic of resource.properties.Topics) {
          iam.setResourcePolicy(topic, resource.properties.PolicyDocument);
        }
        break;
      case 'AWS::SNS::Subscription':
        sns.subscribe(resource.properties.TopicArn, resource.properties.Endpoint);
        break;
      case 'AWS::Lambda::Function': {
        const { Code, Handler, Role, Runtime, Timeout, MemorySize, Environment } = resource.properties;
        const { ReservedConcurrentExecutions } = resource.properties;
        iam.assertAssumable(Role, 'lambda.amazonaws.com', functionArn(name));
        await lambda.createFunction({
          name,
          roleArn: Role,
          zip: this.#stack.bundle(Code.S3Key),
          handler: Handler,
          runtime: Runtime,
          timeout: Timeout,
          memorySize: MemorySize,
          environment: Environment?.Variables ?? {},
          ...(ReservedConcurrentExecutions === undefined
            ? {}
            : { concurrency: ReservedConcurrentExecutions }),
        });
        break;
      }
      case 'AWS::StepFunctions::StateMachine': {
        const arn = stateMachineArn(name);
        iam.assertAssumable(resource.properties.RoleArn, 'states.amazonaws.com', arn);
        stepFunctions.createStateMachine({
          name,
          arn,
          roleArn: resource.properties.RoleArn,
          definition: definitionOf(resource.properties, name),
        });
        break;
      }
      case 'AWS::Events::Rule':
        for (const target of resource.properties.Targets) {
          if (target.RoleArn) iam.assertAssumable(target.RoleArn, EVENTS_SERVICE, ruleArn(name));
        }
        events.putRule(name, resource.properties);
        break;
      default:
        // Roles and their policies are there already; all other types only have a name here.
        break;
    }
  }

  /** Hands an event to its target. A redelivery that the target had accepted before counts as accepted. */
  async #deliver(delivery: Parameters<ConstructorParameters<typeof Events>[0]['deliver']>[0]): Promise<void> {
    const { iam, sns, stepFunctions } = this.services;
    const { id, targetArn, roleArn: role, input } = delivery;
    if (targetArn.startsWith('arn:aws:sns:')) {
      const caller = iam.serviceCaller(EVENTS_SERVICE, delivery.ruleArn);
      sns.publish({ topicArn: targetArn, message: input, attributes: {} }, caller);
      return;
    }
    if (targetArn.startsWith('arn:aws:lambda:')) {
      const caller = iam.serviceCaller(EVENTS_SERVICE, delivery.ruleArn);
      await this.#invokeLater(targetArn, JSON.parse(input), delivery.attempts, caller);
      return;
    }
    if (role === undefined) throw new UnsupportedLocally('a delivery without a role', targetArn);
    const start = stepFunctions.operations.StartExecution;
    if (start === undefined) throw new UnsupportedLocally('StartExecution', targetArn);
    try {
      await start({ stateMachineArn: targetArn, name: id, input } as never, iam.caller(role));
    } catch (error) {
      if (!(error instanceof ServiceError && error.code === 'ExecutionAlreadyExists')) throw error;
    }
  }

  /**
   * As Lambda does with asynchronous calls: one that the function fails is tried twice more, then goes to the
   * function's destination for failures, or is dropped where it has none.
   */
  async #invokeLater(arn: string, payload: unknown, attempts: number, caller: Caller): Promise<void> {
    const { iam, lambda, sqs } = this.services;
    const config = this.#of('AWS::Lambda::EventInvokeConfig').find(
      ({ properties }) => functionArn(properties.FunctionName) === arn,
    )?.properties;
    try {
      await lambda.invoke(arn, payload, caller);
    } catch (error) {
      // The function's own log says what went wrong.
      if (!(error instanceof FunctionError) || attempts < (config?.MaximumRetryAttempts ?? ASYNC_RETRIES)) {
        throw error;
      }
      const destination = config?.DestinationConfig?.OnFailure?.Destination;
      const role = this.#of('AWS::Lambda::Function').find(({ name }) => functionArn(name) === arn);
      if (destination === undefined || role === undefined) return;
      const record = failedInvocation(arn, payload, attempts + 1, error);
      sqs.send(destination, JSON.stringify(record), {}, iam.caller(role.properties.Role));
    }
  }

  /** The folder of an image: `containers/<name>`, for a repository `…/<name>` or `<stack>-<name>` of the template. */
  #container(imageUri: string): { folder: string } {
    const registry = `${LOCAL_ACCOUNT}.dkr.ecr.${LOCAL_REGION}.amazonaws.com/`;
    const repository = imageUri.startsWith(registry)
      ? imageUri.slice(registry.length).replace(/[:@].*$/, '')
      : undefined;
    const known = this.#of('AWS::ECR::Repository').map(({ name }) => name);
    if (repository === undefined || !known.includes(repository)) {
      throw new ServiceError(
        'ValidationException',
        `There is no image ${imageUri}; the template has the repositories ${known.map((name) => registry + name).join(', ')}.`,
      );
    }
    const last = repository.split('/').at(-1) ?? repository;
    const prefix = `${this.#stack.name}-`;
    const folder = join(
      resolve(this.#options.containers),
      last.startsWith(prefix) ? last.slice(prefix.length) : last,
    );
    if (!existsSync(folder)) {
      throw new ServiceError(
        'ValidationException',
        `The image ${imageUri} would be built from ${folder}, which is not there.`,
      );
    }
    return { folder };
  }

  #of<T extends TypeName>(type: T): Extract<Resource, { type: T }>[] {
    return this.#stack.resources.filter(
      (resource): resource is Extract<Resource, { type: T }> => resource.type === type,
    );
  }
}

/** What Lambda sends to a destination for failures. */
function failedInvocation(arn: string, payload: unknown, count: number, error: FunctionError) {
  return {
    version: '1.0',
    timestamp: new Date().toISOString(),
    requestContext: {
      requestId: randomUUID(),
      functionArn: `${arn}:$LATEST`,
      condition: 'RetriesExhausted',
      approximateInvokeCount: count,
    },
    requestPayload: payload,
    responseContext: { statusCode: 200, executedVersion: '$LATEST', functionError: 'Unhandled' },
    responsePayload: error.payload,
  };
}

function lockOf(
  retention: { Mode: LockMode; Days: number } | { Mode: LockMode; Years: number } | undefined,
): BucketLock {
  if (retention === undefined) return {};
  const days = 'Days' in retention ? retention.Days : retention.Years * DAYS_A_YEAR;
  return { default: { mode: retention.Mode, days } };
}

type BucketProperties = Extract<Resource, { type: 'AWS::S3::Bucket' }>['properties'];

const lifecycleOf = (configuration: BucketProperties['LifecycleConfiguration']): LifecycleRule[] =>
  (configuration?.Rules ?? [])
    .filter(({ Status }) => Status === 'Enabled')
    .map((rule) => ({
      id: rule.Id,
      prefix: rule.Prefix,
      tags: rule.TagFilters.map(({ Key, Value }) => [Key, Value]),
      days: rule.ExpirationInDays,
      noncurrentDays: rule.NoncurrentVersionExpiration?.NoncurrentDays,
      uploadDays: rule.AbortIncompleteMultipartUpload?.DaysAfterInitiation,
    }));

/** A service whose operations get the caller as it sees it. */
function seenBy(service: JsonService, see: (caller: Caller) => Caller): JsonService {
  const operations = Object.entries(service.operations).map(([name, operation]) => {
    return [name, (input: never, caller: Caller) => operation(input, see(caller))] as const;
  });
  return { operations: Object.fromEntries(operations) };
}

function definitionOf(
  properties: Extract<Resource, { type: 'AWS::StepFunctions::StateMachine' }>['properties'],
  name: string,
): unknown {
  const { Definition, DefinitionString, DefinitionSubstitutions } = properties;
  const text = DefinitionString ?? JSON.stringify(Definition);
  if (text === undefined) throw new UnsupportedLocally('a state machine without a definition', name);
  const substituted = text.replace(/\$\{([A-Za-z0-9_]+)\}/g, (found, variable: string) => {
    const value = DefinitionSubstitutions?.[variable];
    return value === undefined ? found : JSON.stringify(value).slice(1, -1);
  });
  return JSON.parse(substituted);
}

/** Takes the state folder, or says who has it and what to do. */
function takeFolder(state: string): () => void {
  try {
    return lock(state);
  } catch (error) {
    if (!(error instanceof FolderLocked)) throw error;
    const running = readEngine(state);
    const endpoint = running?.pid === error.pid ? running.endpoint : undefined;
    throw new StateFolderInUse(
      `The local AWS of ${state} runs already: process ${error.pid}${endpoint ? ` at ${endpoint}` : ', still starting'}. Use that one, stop it, or choose another state folder.`,
    );
  }
}

function readEngine(state: string): z.infer<typeof engineSchema> | undefined {
  try {
    return engineSchema.parse(JSON.parse(readFileSync(join(state, 'engine.json'), 'utf8')));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}

function writeWhole(path: string, content: unknown): void {
  writeFileSync(`${path}.new`, `${JSON.stringify(content, null, 2)}\n`);
  renameSync(`${path}.new`, path);
}
