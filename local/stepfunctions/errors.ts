/** How states fail, in the names that `Retry`, `Catch` and the history use. */
import { ServiceError } from '../types.ts';

/** AWS: 256 KiB of UTF-8 for every input and output of a state. */
export const PAYLOAD_LIMIT = 256 * 1024;
/** AWS cuts causes at this many characters. */
const CAUSE_LIMIT = 32_768;

/** A state's failure: `name` is `$.Error`, `message` is `$.Cause`. */
export class StateError extends Error {
  /** Read by the interpreter: whether a `Catch` of the state may take it. */
  isCatchable = true;
  constructor(error: string, cause: string) {
    super(cause.slice(0, CAUSE_LIMIT));
    this.name = error;
  }
}

/** Why a walk was cut short from outside: no state of the definition may catch it. */
export class Interrupted extends Error {
  readonly isCatchable = false;
  readonly why: 'closed' | 'stopped' | 'timeout' | 'superseded';
  constructor(why: 'closed' | 'stopped' | 'timeout' | 'superseded') {
    super(`The execution was interrupted (${why}).`);
    this.name = 'Interrupted';
    this.why = why;
  }
}

/** The failure as states see it; what is not one already is a fault of the definition or of the engine. */
export function asFailure(error: unknown): StateError | Interrupted {
  if (error instanceof StateError || error instanceof Interrupted) return error;
  return new StateError('States.Runtime', error instanceof Error ? error.message : String(error));
}

/** AWS's rule for `ErrorEquals`: what the wildcards take, and what they never take. */
export function matches(errorEquals: string[], error: string): boolean {
  if (errorEquals.includes(error)) return true;
  if (error === 'States.DataLimitExceeded' || error === 'States.Runtime') return false;
  if (errorEquals.includes('States.ALL')) return true;
  return errorEquals.includes('States.TaskFailed') && error !== 'States.Timeout';
}

/** Bytes of a payload; throws `States.DataLimitExceeded` above 256 KiB. */
export function payloadSize(payload: unknown, of: string): number {
  const size = Buffer.byteLength(JSON.stringify(payload) ?? 'null');
  if (size > PAYLOAD_LIMIT) {
    throw new StateError(
      'States.DataLimitExceeded',
      `${of} is ${size} bytes, above the limit of ${PAYLOAD_LIMIT}; put it in S3 and pass the key.`,
    );
  }
  return size;
}

export class InvalidDefinition extends ServiceError {
  constructor(message: string) {
    super('InvalidDefinition', `Invalid State Machine Definition: ${message}`);
  }
}
