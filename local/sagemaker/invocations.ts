/** What SageMaker asks of a container that serves: is it there, how does it like its work, and one answer a request. */
import { createWriteStream } from 'node:fs';
import { type IncomingMessage, request } from 'node:http';
import type { Readable } from 'node:stream';
import { text } from 'node:stream/consumers';
import { pipeline } from 'node:stream/promises';
import { setTimeout as wait } from 'node:timers/promises';

/** Where a server is reached: a port of 127.0.0.1, or a Unix socket where it has a network of its own. */
export type Address = { port: number } | { socketPath: string };

const PING_SECONDS = 2;
const PING_EVERY_MS = 100;
/** As much of a refusal as goes to the logs. */
const MESSAGE_BYTES = 4096;

/** What a container says of itself at /execution-parameters; each part is optional. */
export interface ExecutionParameters {
  MaxConcurrentTransforms?: number;
  MaxPayloadInMB?: number;
  BatchStrategy?: string;
}

/** The container answered, but not with 2xx. */
export class BadStatus extends Error {
  readonly status: number;
  constructor(status: number, message: string) {
    super(message);
    this.name = 'BadStatus';
    this.status = status;
  }
}

interface Send {
  method: 'GET' | 'POST';
  path: string;
  headers?: Record<string, string>;
  body?: Readable;
  signal: AbortSignal;
}

function send(address: Address, { method, path, headers, body, signal }: Send): Promise<IncomingMessage> {
  return new Promise((resolve, reject) => {
    const target = 'port' in address ? { host: '127.0.0.1', port: address.port } : address;
    const outgoing = request({ ...target, method, path, signal, ...(headers && { headers }) });
    outgoing.on('response', resolve);
    outgoing.on('error', reject);
    if (body) pipeline(body, outgoing).catch(reject);
    else outgoing.end();
  });
}

/** Resolves when /ping answers 200. Rejects when it has not within `seconds`, or with the signal's reason. */
export async function awaitPing(address: Address, seconds: number, signal: AbortSignal): Promise<void> {
  const end = Date.now() + seconds * 1000;
  for (;;) {
    signal.throwIfAborted();
    try {
      const within = AbortSignal.any([signal, AbortSignal.timeout(PING_SECONDS * 1000)]);
      const response = await send(address, { method: 'GET', path: '/ping', signal: within });
      response.resume();
      if (response.statusCode === 200) return;
    } catch {
      // Not yet there; the limit says for how long.
    }
    if (Date.now() > end)
      throw new Error(`The container did not answer /ping with 200 within ${seconds} seconds.`);
    await wait(PING_EVERY_MS, undefined, { signal });
  }
}

/** What the container asks for; nothing where it does not say. */
export async function executionParameters(
  address: Address,
  signal: AbortSignal,
): Promise<ExecutionParameters> {
  const within = AbortSignal.any([signal, AbortSignal.timeout(PING_SECONDS * 1000)]);
  try {
    const response = await send(address, { method: 'GET', path: '/execution-parameters', signal: within });
    const body = await text(response);
    const parsed: unknown = response.statusCode === 200 ? JSON.parse(body) : {};
    return typeof parsed === 'object' && parsed !== null ? parsed : {};
  } catch {
    signal.throwIfAborted();
    return {};
  }
}

/**
 * One request with `body`; the answer goes to the file `target`.
 * @throws {BadStatus} or what broke the connection, or the signal's reason.
 */
export async function invoke(
  address: Address,
  headers: Record<string, string>,
  body: Readable,
  target: string,
  signal: AbortSignal,
): Promise<void> {
  const response = await send(address, { method: 'POST', path: '/invocations', headers, body, signal });
  const { statusCode: status = 0 } = response;
  if (status >= 200 && status < 300) {
    await pipeline(response, createWriteStream(target), { signal });
    return;
  }
  throw new BadStatus(status, (await text(response).catch(() => '')).slice(0, MESSAGE_BYTES));
}
