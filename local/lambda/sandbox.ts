/**
 * One execution environment: a worker with its own environment variables, memory limit and log stream, that
 * serves one invocation at a time and is ended when it times out or crashes.
 */
import { randomUUID } from 'node:crypto';
import { getCompileCacheDir } from 'node:module';
import { dirname } from 'node:path';
import { Worker } from 'node:worker_threads';
import type { ErrorPayload, Invocation, RuntimeData, RuntimeMessage } from './runtime.ts';

/**
 * What a function threw, or how its environment ended. `name` is the error type that a state machine matches, and
 * `stack` is the function's own.
 */
export class FunctionError extends Error {
  readonly payload: ErrorPayload;
  constructor(payload: ErrorPayload) {
    super(payload.errorMessage);
    this.name = payload.errorType;
    this.stack = payload.trace.join('\n');
    this.payload = payload;
  }
}

export interface SandboxOptions {
  data: RuntimeData;
  environment: Record<string, string>;
  timeoutSeconds: number;
  log(lines: string[]): void;
}

/** Loading may take longer than Lambda's 10 s on a busy laptop. */
const INIT_LIMIT_MS = 60_000;

export class Sandbox {
  readonly #options: SandboxOptions;
  readonly #worker: Worker;
  readonly #ready: Promise<void>;
  #ended: FunctionError | undefined;
  #partial = '';
  #settle: { resolve(payload: string): void; reject(error: Error): void } | undefined;
  #started: { resolve(): void; reject(error: Error): void } | undefined;

  constructor(options: SandboxOptions) {
    this.#options = options;
    this.#worker = new Worker(new URL('./runtime.ts', import.meta.url), {
      workerData: options.data,
      env: { ...options.environment, ...compileCache() },
      execArgv: [],
      resourceLimits: { maxOldGenerationSizeMb: options.data.memorySize },
    });
    this.#ready = new Promise((resolve, reject) => {
      this.#started = { resolve, reject };
    });
    // Whoever invokes sees the failure; until then nobody waits for it.
    this.#ready.catch(() => {});
    this.#worker.on('message', (message: RuntimeMessage) => this.#receive(message));
    this.#worker.on('error', (error) => this.#end(crash(error)));
    this.#worker.on('exit', (code) => this.#end(exit(code)));
  }

  /** Whether it can serve another invocation. */
  get usable(): boolean {
    return this.#ended === undefined;
  }

  /** Runs one invocation; `payload` and the answer are JSON text. Rejects with {@link FunctionError}. */
  async invoke(functionArn: string, payload: string): Promise<string> {
    const requestId = randomUUID();
    const initLimit = this.#limit(requestId, INIT_LIMIT_MS);
    await this.#ready.finally(() => clearTimeout(initLimit));
    const timeoutMs = this.#options.timeoutSeconds * 1000;
    const startedAt = Date.now();
    this.#options.log([`START RequestId: ${requestId} Version: $LATEST`]);
    const limit = this.#limit(requestId, timeoutMs);
    const invocation: Invocation = { requestId, functionArn, payload, deadline: startedAt + timeoutMs };
    try {
      return await new Promise<string>((resolve, reject) => {
        if (this.#ended) return reject(this.#ended);
        this.#settle = { resolve, reject };
        this.#worker.postMessage(invocation);
      });
    } finally {
      this.#settle = undefined;
      clearTimeout(limit);
      this.#flush();
      const duration = Date.now() - startedAt;
      this.#options.log([
        `END RequestId: ${requestId}`,
        `REPORT RequestId: ${requestId}\tDuration: ${duration} ms\tBilled Duration: ${duration} ms\tMemory Size: ${this.#options.data.memorySize} MB`,
      ]);
    }
  }

  async end(): Promise<void> {
    this.#end(
      new FunctionError({
        errorType: 'Runtime.ExitError',
        errorMessage: 'The local AWS stopped.',
        trace: [],
      }),
    );
    await this.#worker.terminate();
  }

  #limit(requestId: string, ms: number): NodeJS.Timeout {
    return setTimeout(() => {
      const seconds = (ms / 1000).toFixed(2);
      const errorMessage = `RequestId: ${requestId} Error: Task timed out after ${seconds} seconds`;
      this.#options.log([errorMessage]);
      this.#end(new FunctionError({ errorType: 'Sandbox.Timedout', errorMessage, trace: [] }));
      void this.#worker.terminate();
    }, ms);
  }

  #receive(message: RuntimeMessage): void {
    if (message.type === 'ready') this.#started?.resolve();
    else if (message.type === 'log') this.#print(message.text);
    else if (message.type === 'result') this.#settle?.resolve(message.payload);
    else if (message.type === 'error') this.#settle?.reject(new FunctionError(message.error));
    else {
      this.#end(new FunctionError(message.error));
      void this.#worker.terminate();
    }
  }

  /** Only the first reason counts: a worker that was ended for its time also exits. */
  #end(reason: FunctionError): void {
    this.#ended ??= reason;
    this.#started?.reject(this.#ended);
    this.#settle?.reject(this.#ended);
  }

  #print(text: string): void {
    const lines = (this.#partial + text).split('\n');
    this.#partial = lines.pop() ?? '';
    if (lines.length > 0) this.#options.log(lines);
  }

  #flush(): void {
    if (this.#partial !== '') this.#options.log([this.#partial]);
    this.#partial = '';
  }
}

/** Where this process keeps what V8 compiled of it, for the worker too: each loads megabytes of its bundle. */
function compileCache(): Record<string, string> {
  const folder = getCompileCacheDir();
  return folder === undefined ? {} : { NODE_COMPILE_CACHE: dirname(folder) };
}

function crash(error: unknown): FunctionError {
  const { message, stack, code } = error as Error & { code?: string };
  if (code === 'ERR_WORKER_OUT_OF_MEMORY') {
    const errorMessage = 'Error: Runtime exited: the function used more memory than its MemorySize';
    return new FunctionError({ errorType: 'Runtime.OutOfMemory', errorMessage, trace: [] });
  }
  return new FunctionError({
    errorType: 'Runtime.ExitError',
    errorMessage: `Error: Runtime exited with error: ${message}`,
    trace: (stack ?? '').split('\n'),
  });
}

function exit(code: number): FunctionError {
  return new FunctionError({
    errorType: 'Runtime.ExitError',
    errorMessage: `Error: Runtime exited with error: exit status ${code}`,
    trace: [],
  });
}
