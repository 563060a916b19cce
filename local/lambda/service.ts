/**
 * Lambda: the packaged bundles, each function with its own role, environment and limits, on a pool of warm
 * sandboxes.
 */
import { randomUUID } from 'node:crypto';
import { availableParallelism, devNull } from 'node:os';
import type { Credentials } from '../iam.ts';
import { functionArn } from '../resources.ts';
import { type Caller, LOCAL_REGION, ServiceError, UnsupportedLocally } from '../types.ts';
import { unpack } from './bundle.ts';
import { FunctionError, Sandbox, type SandboxOptions } from './sandbox.ts';

export interface FunctionDefinition {
  name: string;
  roleArn: string;
  /** Path of the bundle. */
  zip: string;
  handler: string;
  /** `nodejs24.x`; must be the Node that runs. */
  runtime: string;
  /** Seconds. */
  timeout: number;
  /** MB. */
  memorySize: number;
  environment: Record<string, string>;
  /** At most so many at once; more wait. Default: the number of cores. */
  concurrency?: number;
}

/** Lambda's limit on a synchronous payload, both ways. */
const MAX_PAYLOAD_BYTES = 6 * 1024 * 1024;
const IDLE_MS = 60_000;

export class Lambda {
  readonly #options: LambdaOptions;
  readonly #pools = new Map<string, Pool>();

  constructor(options: LambdaOptions) {
    this.#options = options;
  }

  /** Creates the function, or replaces it: running invocations end on the bundle they began with. */
  async createFunction(definition: FunctionDefinition): Promise<void> {
    const { name, runtime } = definition;
    const own = `nodejs${process.versions.node.split('.')[0]}.x`;
    if (runtime !== own) {
      throw new UnsupportedLocally(
        `runtime ${runtime} while Node ${process.version} runs`,
        `function ${name}`,
      );
    }
    const taskRoot = await unpack(definition.zip, this.#options.folder);
    const before = this.#pools.get(functionArn(name));
    this.#pools.set(functionArn(name), this.#pool(definition, taskRoot));
    await before?.retire();
  }

  /**
   * Invokes a function by ARN or name. Rejects with an error whose `name` is the error type: what the function
   * threw, `Sandbox.Timedout`, `Runtime.…`, or a {@link ServiceError}.
   */
  async invoke(arnOrName: string, payload: unknown, caller?: Caller): Promise<unknown> {
    const arn = (arnOrName.startsWith('arn:') ? arnOrName : functionArn(arnOrName)).replace(
      /:(\$LATEST|\d+)$/,
      '',
    );
    const pool = this.#pools.get(arn);
    if (pool === undefined) {
      throw new ServiceError('ResourceNotFoundException', `Function not found: ${arn}`, 404);
    }
    caller?.authorize('lambda:InvokeFunction', arn);
    const text = JSON.stringify(payload ?? {});
    if (Buffer.byteLength(text) > MAX_PAYLOAD_BYTES) {
      throw new ServiceError(
        'RequestTooLargeException',
        `Request must be smaller than ${MAX_PAYLOAD_BYTES} bytes for the InvokeFunction operation`,
        413,
      );
    }
    const answer = await pool.invoke(arn, text);
    if (Buffer.byteLength(answer) > MAX_PAYLOAD_BYTES) {
      const errorMessage = `Response payload size exceeded maximum allowed payload size (${MAX_PAYLOAD_BYTES} bytes).`;
      throw new FunctionError({ errorType: 'Function.ResponseSizeTooLarge', errorMessage, trace: [] });
    }
    return JSON.parse(answer);
  }

  async close(): Promise<void> {
    await Promise.all([...this.#pools.values()].map((pool) => pool.close()));
  }

  #pool(definition: FunctionDefinition, taskRoot: string): Pool {
    const { name, handler, memorySize, timeout, roleArn } = definition;
    const logGroup = `/aws/lambda/${name}`;
    const make = (): Sandbox => {
      const day = new Date().toISOString().slice(0, 10).replaceAll('-', '/');
      const logStream = `${day}/[$LATEST]${randomUUID().replaceAll('-', '')}`;
      const { accessKeyId, secretAccessKey } = this.#options.credentials(roleArn);
      const sandbox: SandboxOptions = {
        data: { handler, taskRoot, functionName: name, logGroup, logStream, memorySize },
        timeoutSeconds: timeout,
        log: (lines) => this.#options.log(logGroup, logStream, lines),
        environment: {
          ...definition.environment,
          AWS_REGION: LOCAL_REGION,
          AWS_DEFAULT_REGION: LOCAL_REGION,
          AWS_ACCESS_KEY_ID: accessKeyId,
          AWS_SECRET_ACCESS_KEY: secretAccessKey,
          AWS_ENDPOINT_URL: this.#options.endpoint(),
          AWS_EXECUTION_ENV: `AWS_Lambda_${definition.runtime}`,
          AWS_LAMBDA_FUNCTION_NAME: name,
          AWS_LAMBDA_FUNCTION_VERSION: '$LATEST',
          AWS_LAMBDA_FUNCTION_MEMORY_SIZE: String(memorySize),
          AWS_LAMBDA_INITIALIZATION_TYPE: 'on-demand',
          AWS_LAMBDA_LOG_GROUP_NAME: logGroup,
          AWS_LAMBDA_LOG_STREAM_NAME: logStream,
          LAMBDA_TASK_ROOT: taskRoot,
          _HANDLER: handler,
          // On Lambda there is no ~/.aws; the person's own must not shine through.
          AWS_CONFIG_FILE: devNull,
          AWS_SHARED_CREDENTIALS_FILE: devNull,
        },
      };
      return new Sandbox(sandbox);
    };
    return new Pool(make, definition.concurrency ?? Math.max(2, availableParallelism()));
  }
}

export interface LambdaOptions {
  /** Where bundles are unpacked. */
  folder: string;
  endpoint(): string;
  credentials(roleArn: string): Credentials;
  log(group: string, stream: string, lines: string[]): void;
}

/** The sandboxes of one function: warm ones are used again, idle ones end, and no more run than are allowed. */
class Pool {
  readonly #make: () => Sandbox;
  readonly #limit: number;
  readonly #idle: { sandbox: Sandbox; timer: NodeJS.Timeout }[] = [];
  readonly #busy = new Set<Sandbox>();
  readonly #waiting: (() => void)[] = [];
  #retired = false;

  constructor(make: () => Sandbox, limit: number) {
    this.#make = make;
    this.#limit = limit;
  }

  async invoke(arn: string, payload: string): Promise<string> {
    while (this.#busy.size >= this.#limit) {
      await new Promise<void>((resolve) => this.#waiting.push(resolve));
    }
    const sandbox = this.#take();
    this.#busy.add(sandbox);
    try {
      return await sandbox.invoke(arn, payload);
    } finally {
      this.#busy.delete(sandbox);
      this.#giveBack(sandbox);
      this.#waiting.shift()?.();
    }
  }

  /** Takes no more sandboxes back; those at work end after their invocation. */
  async retire(): Promise<void> {
    this.#retired = true;
    await Promise.all(
      this.#idle.splice(0).map(({ sandbox, timer }) => {
        clearTimeout(timer);
        return sandbox.end();
      }),
    );
  }

  async close(): Promise<void> {
    await this.retire();
    await Promise.all([...this.#busy].map((sandbox) => sandbox.end()));
  }

  /** The one used last, because it is the warmest. */
  #take(): Sandbox {
    for (let idle = this.#idle.pop(); idle !== undefined; idle = this.#idle.pop()) {
      clearTimeout(idle.timer);
      if (idle.sandbox.usable) return idle.sandbox;
    }
    return this.#make();
  }

  #giveBack(sandbox: Sandbox): void {
    if (!sandbox.usable) return;
    if (this.#retired) {
      void sandbox.end();
      return;
    }
    const timer = setTimeout(() => {
      const index = this.#idle.findIndex((idle) => idle.sandbox === sandbox);
      if (index >= 0) this.#idle.splice(index, 1);
      void sandbox.end();
    }, IDLE_MS);
    timer.unref();
    this.#idle.push({ sandbox, timer });
  }
}
