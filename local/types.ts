/**
 * What the services of the local AWS share: who calls, how a service is offered to the gateway, and how it fails.
 */
import type { IncomingMessage, ServerResponse } from 'node:http';

export const LOCAL_ACCOUNT = '000000000000';
export const LOCAL_REGION = 'us-east-1';

/** The principal behind a request, known by its access key. */
export interface Caller {
  /** ARN of the role, or of the account's root for the person at the keyboard. */
  arn: string;
  /**
   * Throws {@link ServiceError} `AccessDenied` unless the principal's policies allow `action` on `resource`; `context`
   * has the values of the service's own condition keys, by lower-case name.
   */
  authorize(action: string, resource: string, context?: Record<string, string>): void;
}

/** A service that reads the HTTP request itself (S3, DynamoDB, SNS's query protocol). */
export interface HttpService {
  handle(request: IncomingMessage, response: ServerResponse, caller: Caller): Promise<void>;
}

/** An operation of a service that speaks AWS JSON; the gateway does the HTTP. */
export type JsonOperation = (input: never, caller: Caller) => Promise<unknown>;

/** A service that speaks AWS JSON 1.0/1.1: operations by the name after the dot of `X-Amz-Target`. */
export interface JsonService {
  operations: Record<string, JsonOperation>;
}

/** An error as AWS would answer it; the gateway or the service puts it on the wire. */
export class ServiceError extends Error {
  readonly code: string;
  readonly status: number;
  constructor(code: string, message: string, status = 400) {
    super(message);
    this.name = code;
    this.code = code;
    this.status = status;
  }
}

/** Something in the template or the state machine that the local AWS does not do; refused by name, never ignored. */
export class UnsupportedLocally extends Error {
  constructor(what: string, where: string) {
    super(`The local AWS does not support ${what} (in ${where}). It refuses rather than ignore it.`);
    this.name = 'UnsupportedLocally';
  }
}
