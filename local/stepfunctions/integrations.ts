/**
 * What a Task state can call, one entry a resource: Lambda functions, jobs that are awaited (`.sync`), and single calls.
 * Calls are made with the state machine's role, so that its policies count.
 */
import { randomUUID } from 'node:crypto';
import {
  CreateModelCommand,
  CreateProcessingJobCommand,
  type CreateProcessingJobCommandInput,
  CreateTransformJobCommand,
  type CreateTransformJobCommandInput,
  DeleteModelCommand,
  DescribeProcessingJobCommand,
  DescribeTransformJobCommand,
  SageMakerClient,
  StopProcessingJobCommand,
  StopTransformJobCommand,
} from '@aws-sdk/client-sagemaker';
import { LOCAL_ACCOUNT, LOCAL_REGION, ServiceError, UnsupportedLocally } from '../types.ts';
import { Interrupted, StateError } from './errors.ts';

type Fields = Record<string, unknown>;

/** What the engine gives to those who call. */
export interface Services {
  endpoint(): string;
  credentials(roleArn: string): { accessKeyId: string; secretAccessKey: string };
  invokeLambda(functionArn: string, payload: unknown, roleArn: string): Promise<unknown>;
  /** Waits and intervals × this. */
  timeScale: number;
}

export interface Call {
  /** The task's effective input. */
  input: unknown;
  resource: string;
  roleArn: string;
  signal: AbortSignal;
  /** True when this attempt was begun before a crash: what it would create may be there. */
  begunBefore: boolean;
  /** Puts on record that the attempt is about to create something. */
  begin(): void;
}

export interface Integration {
  /** As the history names it: `lambda`, `sagemaker`. */
  type: string;
  /** As the history names it: `invoke`, `createProcessingJob.sync`. */
  action: string;
  /** Whether an EXPRESS child may call it. */
  express: boolean;
  /** Refuses what it would ignore in the state's Parameters. */
  check(parameters: Fields, where: string): void;
  call(call: Call, services: Services): Promise<unknown>;
}

const LAMBDA_ARN = /^arn:aws:lambda:[^:]*:[^:]*:function:/;

const lambdaFunction: Integration = {
  type: 'lambda',
  action: 'function',
  express: true,
  check() {},
  call: ({ input, resource, roleArn, signal }, services) =>
    invoke(resource, input, roleArn, signal, services),
};

const INTEGRATIONS: Record<string, Integration> = {
  'arn:aws:states:::lambda:invoke': {
    type: 'lambda',
    action: 'invoke',
    express: true,
    check(parameters, where) {
      allow(parameters, ['FunctionName', 'Payload', 'Qualifier'], where);
    },
    async call({ input, roleArn, signal }, services) {
      const { FunctionName: name, Payload: payload = {}, Qualifier: qualifier } = input as Fields;
      const base = LAMBDA_ARN.test(String(name))
        ? String(name)
        : `arn:aws:lambda:${LOCAL_REGION}:${LOCAL_ACCOUNT}:function:${String(name)}`;
      const arn = qualifier === undefined ? base : `${base}:${String(qualifier)}`;
      const version = /:function:[^:]+:(.+)$/.exec(arn)?.[1] ?? '$LATEST';
      return {
        ExecutedVersion: version,
        Payload: await invoke(arn.replace(/:\$LATEST$/, ''), payload, roleArn, signal, services),
        SdkHttpMetadata: { AllHttpHeaders: {}, HttpHeaders: {}, HttpStatusCode: 200 },
        SdkResponseMetadata: { RequestId: randomUUID() },
        StatusCode: 200,
      };
    },
  },
  'arn:aws:states:::sagemaker:createProcessingJob.sync': sageMakerJob<CreateProcessingJobCommandInput>({
    action: 'createProcessingJob.sync',
    name: (input) => input.ProcessingJobName,
    create: (client, input) => client.send(new CreateProcessingJobCommand(input)),
    async describe(client, name) {
      const description = await client.send(new DescribeProcessingJobCommand({ ProcessingJobName: name }));
      return { status: description.ProcessingJobStatus, description };
    },
    stop: (client, name) => client.send(new StopProcessingJobCommand({ ProcessingJobName: name })),
  }),
  'arn:aws:states:::sagemaker:createTransformJob.sync': sageMakerJob<CreateTransformJobCommandInput>({
    action: 'createTransformJob.sync',
    name: (input) => input.TransformJobName,
    create: (client, input) => client.send(new CreateTransformJobCommand(input)),
    async describe(client, name) {
      const description = await client.send(new DescribeTransformJobCommand({ TransformJobName: name }));
      return { status: description.TransformJobStatus, description };
    },
    stop: (client, name) => client.send(new StopTransformJobCommand({ TransformJobName: name })),
  }),
  'arn:aws:states:::sagemaker:createModel': sageMakerCall(
    'createModel',
    (client, input) => client.send(new CreateModelCommand(input as never)),
    (error) => sageMakerFailure(error),
  ),
  // Step Functions has no integration of its own for these two; the SDK's has other names for errors.
  'arn:aws:states:::aws-sdk:sagemaker:deleteModel': sageMakerCall(
    'deleteModel',
    (client, input) => client.send(new DeleteModelCommand(input as never)),
    (error) => sdkFailure(error),
  ),
  'arn:aws:states:::aws-sdk:sagemaker:stopTransformJob': sageMakerCall(
    'stopTransformJob',
    (client, input) => client.send(new StopTransformJobCommand(input as never)),
    (error) => sdkFailure(error),
  ),
};

export const integrationOf = (resource: string): Integration | undefined =>
  LAMBDA_ARN.test(resource) ? lambdaFunction : INTEGRATIONS[resource];

// --- Lambda -----------------------------------------------------------------------------------------------------

async function invoke(
  arn: string,
  payload: unknown,
  roleArn: string,
  signal: AbortSignal,
  services: Services,
): Promise<unknown> {
  try {
    return (await unlessAborted(services.invokeLambda(arn, payload, roleArn), signal)) ?? null;
  } catch (error) {
    throw lambdaFailure(error);
  }
}

/** The error name of a function is its `errorType`; services' own names pass as they are. */
function lambdaFailure(error: unknown): unknown {
  if (error instanceof StateError || error instanceof Interrupted || !(error instanceof Error)) return error;
  if (error instanceof ServiceError) {
    const name = error.code.startsWith('AccessDenied') ? 'AWSLambdaException' : error.code;
    return new StateError(
      name.startsWith('Lambda.') ? name : `Lambda.${name}`,
      serviceCause('AWSLambda', error),
    );
  }
  if (/^(Lambda|States)\./.test(error.name)) return new StateError(error.name, error.message);
  const trace = (error.stack ?? '').split('\n').filter((line) => line.trim() !== '');
  const cause = { errorType: error.name, errorMessage: error.message, trace };
  return new StateError(error.name, JSON.stringify(cause));
}

// --- SageMaker --------------------------------------------------------------------------------------------------

/** What differs between the kinds of jobs. */
interface JobKind<Input> {
  action: string;
  name(input: Input): string | undefined;
  create(client: SageMakerClient, input: Input & { Tags: Tag[] }): Promise<unknown>;
  describe(
    client: SageMakerClient,
    name: string,
  ): Promise<{ status: string | undefined; description: object }>;
  stop(client: SageMakerClient, name: string): Promise<unknown>;
}

interface Tag {
  Key: string | undefined;
  Value: string | undefined;
}

const POLL_MS = 500;
const MANAGED_TAG: Tag = { Key: 'MANAGED_BY_AWS', Value: 'STARTED_BY_STEP_FUNCTIONS' };
/** Errors of SageMaker that have a name of their own in Step Functions. */
const NAMED = ['ResourceLimitExceeded', 'ResourceInUse', 'ResourceNotFound', 'ConflictException'];

function sageMakerJob<Input extends { Tags?: Tag[] | undefined }>(kind: JobKind<Input>): Integration {
  return {
    type: 'sagemaker',
    action: kind.action,
    express: false,
    // SageMaker itself rejects what it does not know.
    check() {},
    call: (call, services) => withClient(call, services, (client) => runJob(kind, client, call, services)),
  };
}

/** One call that is answered at once. */
function sageMakerCall(
  action: string,
  send: (client: SageMakerClient, input: unknown) => Promise<object>,
  failure: (error: unknown) => unknown,
): Integration {
  return {
    type: 'sagemaker',
    action,
    express: true,
    check() {},
    call: (call, services) =>
      withClient(call, services, async (client) => {
        try {
          return pascalDescription(await unlessAborted(send(client, call.input), call.signal));
        } catch (error) {
          throw call.signal.aborted ? error : failure(error);
        }
      }),
  };
}

async function withClient<Result>(
  { roleArn }: Call,
  services: Services,
  work: (client: SageMakerClient) => Promise<Result>,
): Promise<Result> {
  const client = new SageMakerClient({
    endpoint: services.endpoint(),
    region: LOCAL_REGION,
    credentials: services.credentials(roleArn),
    // Errors are for the state's Retry, as on AWS.
    maxAttempts: 1,
  });
  try {
    return await work(client);
  } finally {
    client.destroy();
  }
}

async function runJob<Input extends { Tags?: Tag[] | undefined }>(
  kind: JobKind<Input>,
  client: SageMakerClient,
  call: Call,
  services: Services,
): Promise<unknown> {
  const input = call.input as Input;
  const name = kind.name(input) ?? '';
  if (!call.begunBefore) call.begin();
  try {
    await kind.create(client, { ...input, Tags: [...(input.Tags ?? []), MANAGED_TAG] });
  } catch (error) {
    const ours = call.begunBefore && (error as Error).name.startsWith('ResourceInUse');
    if (!ours) throw sageMakerFailure(error);
  }
  for (;;) {
    if (call.signal.aborted) {
      const reason: unknown = call.signal.reason;
      // A closing engine leaves its jobs to the next one.
      if (!(reason instanceof Interrupted && reason.why === 'closed')) {
        await kind.stop(client, name).catch(() => undefined);
      }
      throw reason;
    }
    const { status, description } = await kind.describe(client, name).catch((error: unknown) => {
      if (isPassing(error)) return { status: undefined, description: {} };
      throw sageMakerFailure(error);
    });
    const output = pascalDescription(description);
    if (status === 'Completed') return output;
    if (status === 'Failed' || status === 'Stopped') {
      throw new StateError('States.TaskFailed', JSON.stringify(output));
    }
    await delay(POLL_MS * services.timeScale, call.signal).catch(() => undefined);
  }
}

/** The description as Step Functions passes it on: dates are epoch milliseconds. */
function pascalDescription(description: object): Fields {
  const { $metadata: _, ...rest } = description as Fields;
  return JSON.parse(
    JSON.stringify(rest, function (this: Fields, key, value: unknown) {
      const raw = this[key];
      return raw instanceof Date ? raw.getTime() : value;
    }),
  ) as Fields;
}

/** Worth another poll: throttling, a fault of the service, a connection that broke. */
function isPassing(error: unknown): boolean {
  const { name, code, $metadata } = error as {
    name: string;
    code?: string;
    $metadata?: { httpStatusCode?: number };
  };
  const status = $metadata?.httpStatusCode ?? 0;
  return name.startsWith('Throttling') || status >= 500 || /^E[A-Z]+$/.test(code ?? '');
}

function sageMakerFailure(error: unknown): unknown {
  if (!(error instanceof Error)) return error;
  const known = NAMED.find((name) => error.name === name || error.name === `${name}Exception`);
  const name =
    known === undefined ? 'AmazonSageMakerException' : `${known.replace(/Exception$/, '')}Exception`;
  return new StateError(`SageMaker.${name}`, serviceCause('AmazonSageMaker', error));
}

/** Errors that the SDK for Java has no class for come under the service's general name. */
function sdkFailure(error: unknown): unknown {
  if (!(error instanceof Error)) return error;
  const known = NAMED.find((name) => error.name === name || error.name === `${name}Exception`);
  const name = known === undefined ? 'SageMakerException' : `${known.replace(/Exception$/, '')}Exception`;
  return new StateError(`SageMaker.${name}`, serviceCause('SageMaker', error));
}

function serviceCause(service: string, error: Error): string {
  const { $metadata, status } = error as { $metadata?: { httpStatusCode?: number }; status?: number };
  const code = $metadata?.httpStatusCode ?? status ?? 400;
  return `${error.message} (Service: ${service}; Status Code: ${code}; Error Code: ${error.name})`;
}

// --- helpers ----------------------------------------------------------------------------------------------------

function allow(parameters: Fields, names: string[], where: string): void {
  for (const field of Object.keys(parameters)) {
    if (!names.includes(field.replace(/\.\$$/, '')))
      throw new UnsupportedLocally(`the parameter '${field}'`, where);
  }
}

/** Settles as `promise`, or rejects with the signal's reason if that comes first. */
export function unlessAborted<Value>(promise: Promise<Value>, signal: AbortSignal): Promise<Value> {
  return new Promise((resolve, reject) => {
    const abort = () => reject(signal.reason);
    if (signal.aborted) abort();
    signal.addEventListener('abort', abort, { once: true });
    promise.then(resolve, reject).finally(() => signal.removeEventListener('abort', abort));
  });
}

/** Longest delay of a Node timer. */
const MAX_TIMER_MS = 2_147_483_647;

/** Waits `ms`, however long; rejects with the signal's reason. */
export async function delay(ms: number, signal: AbortSignal): Promise<void> {
  const end = Date.now() + ms;
  for (let left = ms; left > 0; left = end - Date.now()) {
    const timer = Promise.withResolvers<void>();
    const timeout = setTimeout(timer.resolve, Math.min(left, MAX_TIMER_MS));
    await unlessAborted(timer.promise, signal).finally(() => clearTimeout(timeout));
  }
  signal.throwIfAborted();
}
