/**
 * Lambda's Node runtime: runs in a worker of its own, loads the bundle's handler and answers one invocation after
 * the other. Knows only its environment and what the sandbox posts to it.
 */
import { existsSync } from 'node:fs';
import { flushCompileCache, registerHooks } from 'node:module';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { parentPort, workerData } from 'node:worker_threads';

/** What the sandbox starts a runtime with. */
export interface RuntimeData {
  handler: string;
  taskRoot: string;
  functionName: string;
  logGroup: string;
  logStream: string;
  memorySize: number;
}

export interface Invocation {
  requestId: string;
  functionArn: string;
  /** JSON text. */
  payload: string;
  /** Milliseconds since the epoch. */
  deadline: number;
}

/** An error as Lambda answers it. */
export interface ErrorPayload {
  errorType: string;
  errorMessage: string;
  trace: string[];
}

export type RuntimeMessage =
  | { type: 'ready' }
  | { type: 'initError'; error: ErrorPayload }
  | { type: 'log'; text: string }
  | { type: 'result'; requestId: string; payload: string }
  | { type: 'error'; requestId: string; error: ErrorPayload };

type Handler = (event: unknown, context: object) => unknown;

/** An error of the runtime's own, under the name that Lambda gives it. */
class RuntimeError extends Error {
  constructor(name: string, message: string) {
    super(message);
    this.name = name;
  }
}

const post = (message: RuntimeMessage) => parentPort?.postMessage(message);

/** Output goes by the same port as results, so that a log line never comes after its invocation's end. */
function captureOutput(): void {
  for (const stream of [process.stdout, process.stderr]) {
    stream.write = ((chunk: string | Uint8Array, ...rest: unknown[]) => {
      post({ type: 'log', text: typeof chunk === 'string' ? chunk : Buffer.from(chunk).toString('utf8') });
      const done = rest.at(-1);
      if (typeof done === 'function') done();
      return true;
    }) as typeof stream.write;
  }
}

/** Lambda's runtime brings AWS SDK v3; a bundle that leaves it out finds this project's. */
function bringSdk(): void {
  registerHooks({
    resolve(specifier, context, next) {
      try {
        return next(specifier, context);
      } catch (error) {
        if (!/^@(aws-sdk|smithy)\//.test(specifier)) throw error;
        return next(specifier, { ...context, parentURL: import.meta.url });
      }
    },
  });
}

/** Finds the handler as Lambda does: `folder/file.export`, the file ending in .js, .mjs or .cjs. */
async function loadHandler({ handler, taskRoot }: RuntimeData): Promise<Handler> {
  const [, folder = '', file, path] = /^(.*\/)?([^./]+)\.(.+)$/.exec(handler) ?? [];
  if (file === undefined || path === undefined) {
    throw new RuntimeError('Runtime.MalformedHandlerName', `Bad handler '${handler}'`);
  }
  const base = join(taskRoot, folder, file);
  const found = ['.js', '.mjs', '.cjs'].map((ending) => base + ending).find(existsSync);
  if (found === undefined) {
    throw new RuntimeError('Runtime.ImportModuleError', `Error: Cannot find module '${folder}${file}'`);
  }
  const module = await importBundle(found);
  const target =
    lookup(module, path) ?? lookup(Object.hasOwn(module, 'default') ? module.default : undefined, path);
  if (typeof target !== 'function') {
    throw new RuntimeError('Runtime.HandlerNotFound', `${handler} is undefined or not exported`);
  }
  if (target.length > 2) {
    throw new RuntimeError(
      'Runtime.CallbackHandlerDeprecated',
      'This runtime does not support callback-based function handlers; use an async function.',
    );
  }
  return target as Handler;
}

async function importBundle(file: string): Promise<Record<string, unknown>> {
  try {
    return (await import(pathToFileURL(file).href)) as Record<string, unknown>;
  } catch (error) {
    if (error instanceof SyntaxError) {
      throw new RuntimeError('Runtime.UserCodeSyntaxError', `SyntaxError: ${error.message}`);
    }
    const code = error instanceof Error && 'code' in error ? error.code : undefined;
    if (code === 'ERR_MODULE_NOT_FOUND' || code === 'MODULE_NOT_FOUND') {
      throw new RuntimeError('Runtime.ImportModuleError', `Error: ${(error as Error).message}`);
    }
    throw error;
  }
}

function lookup(from: unknown, path: string): unknown {
  return path
    .split('.')
    .reduce<unknown>((inner, name) => (inner as Record<string, unknown> | undefined)?.[name], from);
}

function contextOf(data: RuntimeData, { requestId, functionArn, deadline }: Invocation): object {
  return {
    functionName: data.functionName,
    functionVersion: '$LATEST',
    invokedFunctionArn: functionArn,
    memoryLimitInMB: String(data.memorySize),
    awsRequestId: requestId,
    logGroupName: data.logGroup,
    logStreamName: data.logStream,
    callbackWaitsForEmptyEventLoop: true,
    getRemainingTimeInMillis: () => Math.max(0, deadline - Date.now()),
  };
}

function describe(error: unknown): ErrorPayload {
  if (error instanceof Error) {
    return { errorType: error.name, errorMessage: error.message, trace: (error.stack ?? '').split('\n') };
  }
  return { errorType: typeof error, errorMessage: String(error), trace: [] };
}

async function invoke(handler: Handler, data: RuntimeData, invocation: Invocation): Promise<void> {
  const { requestId } = invocation;
  try {
    const result = await handler(JSON.parse(invocation.payload), contextOf(data, invocation));
    post({ type: 'result', requestId, payload: JSON.stringify(result) ?? 'null' });
  } catch (error) {
    const described = describe(error);
    process.stderr.write(`ERROR Invoke Error ${JSON.stringify(described)}\n`);
    post({ type: 'error', requestId, error: described });
  }
}

// Read when this worker began, and none of the function's business.
delete process.env.NODE_COMPILE_CACHE;
captureOutput();
bringSdk();
const data = workerData as RuntimeData;
try {
  const handler = await loadHandler(data);
  parentPort?.on('message', (invocation: Invocation) => void invoke(handler, data, invocation));
  post({ type: 'ready' });
  // A worker is ended from outside, without its own time to keep what was compiled.
  flushCompileCache();
} catch (error) {
  post({ type: 'initError', error: describe(error) });
}
