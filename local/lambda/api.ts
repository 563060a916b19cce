/** Lambda's own interface, as much as a person at the keyboard needs: Invoke, waiting for the answer. */
import type { IncomingMessage, ServerResponse } from 'node:http';
import type { BodyService } from '../gateway.ts';
import { type Caller, ServiceError } from '../types.ts';
import { FunctionError } from './sandbox.ts';
import type { Lambda } from './service.ts';

const INVOKE = /^\/2015-03-31\/functions\/([^/]+)\/invocations(?:\?|$)/;

export class LambdaApi implements BodyService {
  readonly #lambda: Lambda;

  constructor(lambda: Lambda) {
    this.#lambda = lambda;
  }

  operation(request: IncomingMessage): string {
    return request.method === 'POST' && INVOKE.test(request.url ?? '') ? 'Invoke' : 'Unknown';
  }

  async handle(
    request: IncomingMessage,
    body: Buffer,
    response: ServerResponse,
    caller: Caller,
  ): Promise<void> {
    const name = INVOKE.exec(request.url ?? '')?.[1];
    const type = request.headers['x-amz-invocation-type'] ?? 'RequestResponse';
    if (name === undefined || request.method !== 'POST' || type !== 'RequestResponse') {
      throw new ServiceError(
        'InvalidRequestException',
        `The local AWS does not support ${request.method} ${request.url} (${type}) of Lambda; it supports Invoke with RequestResponse.`,
      );
    }
    const payload: unknown = body.length === 0 ? {} : JSON.parse(body.toString('utf8'));
    const { answer, failed } = await this.#invoke(decodeURIComponent(name), payload, caller);
    response.writeHead(200, {
      'content-type': 'application/json',
      'x-amz-executed-version': '$LATEST',
      ...(failed && { 'x-amz-function-error': 'Unhandled' }),
    });
    response.end(JSON.stringify(answer ?? null));
  }

  async #invoke(name: string, payload: unknown, caller: Caller) {
    try {
      return { answer: await this.#lambda.invoke(name, payload, caller), failed: false };
    } catch (error) {
      if (!(error instanceof FunctionError)) throw error;
      return { answer: error.payload, failed: true };
    }
  }
}
