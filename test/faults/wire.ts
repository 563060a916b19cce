/**
 * The line between one invocation of a function and AWS, with what can go wrong on it. It stands where the SDK hands
 * over a signed request, so that the SDK's own retries, parsers and checks are the real ones.
 */
import { Readable } from 'node:stream';
import { DynamoDBClient } from '@aws-sdk/client-dynamodb';
import { S3Client } from '@aws-sdk/client-s3';
import { SFNClient } from '@aws-sdk/client-sfn';
import { SNSClient } from '@aws-sdk/client-sns';
import { DynamoDBDocumentClient } from '@aws-sdk/lib-dynamodb';
import { LOCAL_REGION } from '../../local/types.ts';
import { CREDENTIALS } from '../support/services.ts';
import type { Clients } from './functions.ts';

type RealHandler = S3Client['config']['requestHandler'];
type Request = Parameters<RealHandler['handle']>[0];
type Answer = Awaited<ReturnType<RealHandler['handle']>>;
type RetryStrategy = Awaited<ReturnType<S3Client['config']['retryStrategy']>>;

export type Service = 's3' | 'dynamodb' | 'sns' | 'states';

/** One attempt of a request. */
export interface Op {
  service: Service;
  /** `PUT object`, `POST ?uploads`, `PutItem`, … */
  name: string;
  /** Path of an S3 object, without the run's id, which is another in every replay; else empty. */
  resource: string;
  /** How often this invocation has asked exactly this before. */
  nth: number;
  /** How many requests this invocation has sent before. */
  index: number;
}

export type Fault =
  /** The service refuses; nothing has happened. */
  | { kind: 'refused'; status: number; code: string }
  /** CopyObject and its like answer 200 before they know how it ends: the error comes in the body. */
  | { kind: 'refused-late'; code: string }
  /** The connection breaks before the request is there. */
  | { kind: 'unsent' }
  /** The request takes effect, but the answer never comes. */
  | { kind: 'answer-lost' }
  /** The connection breaks in the middle of the answer's body. */
  | { kind: 'cut-off' }
  /** The function is ended from outside before the request is sent, or once it has taken effect. */
  | { kind: 'killed-before' }
  | { kind: 'killed-after' };

/** What an invocation is ended with from outside. */
export class Killed extends Error {
  constructor(name: string) {
    super('the function was ended from outside');
    this.name = name;
  }
}

export interface WireOptions {
  endpoint: string;
  /** The handler that really sends. */
  real: RealHandler;
  /** What goes wrong with a request, if anything. */
  fault(op: Op): Fault | undefined;
  /** Happens before the request is sent: what others do at this moment. */
  meanwhile(op: Op): Promise<void>;
  /** Told of each fault by its kind. */
  onFault(kind: string, op: Op): void;
  /** Told of each request that the service has answered, whether or not the answer arrives. */
  onEffect(op: Op, status: number): void;
  /** The error name with which a kill ends the invocation. */
  killedAs(): string;
}

/** The clients of one invocation, as a function's runtime makes them, and the way to end it. */
export class Wire {
  readonly #options: WireOptions;
  readonly #seen = new Map<string, number>();
  readonly #death = Promise.withResolvers<never>();
  #dead = false;
  #index = 0;

  constructor(options: WireOptions) {
    this.#options = options;
    this.#death.promise.catch(() => {});
  }

  /** Each is made when it is first asked for, because most invocations need few of them. */
  clients(): Clients {
    const of = (service: Service) => ({
      endpoint: this.#options.endpoint,
      region: LOCAL_REGION,
      credentials: CREDENTIALS,
      retryStrategy: withoutWaiting(),
      requestHandler: {
        handle: (request: Request, options: object) => this.#send(service, request, options),
      },
    });
    const make = {
      s3: () => new S3Client({ ...of('s3'), forcePathStyle: true }),
      sns: () => new SNSClient(of('sns')),
      stepFunctions: () => new SFNClient(of('states')),
      documents: () =>
        DynamoDBDocumentClient.from(new DynamoDBClient(of('dynamodb')), {
          marshallOptions: { removeUndefinedValues: true },
        }),
    };
    const made: Partial<Clients> = {};
    return {
      get s3() {
        made.s3 ??= make.s3();
        return made.s3;
      },
      get sns() {
        made.sns ??= make.sns();
        return made.sns;
      },
      get stepFunctions() {
        made.stepFunctions ??= make.stepFunctions();
        return made.stepFunctions;
      },
      get documents() {
        made.documents ??= make.documents();
        return made.documents;
      },
    };
  }

  /** Ends as `work` does, or when the invocation is killed; what then still runs of `work` can send nothing more. */
  async run<T>(work: Promise<T>): Promise<T> {
    work.catch(() => {});
    return Promise.race([work, this.#death.promise]);
  }

  async #send(service: Service, request: Request, options: object): Promise<Answer> {
    if (this.#dead) return never();
    const op = this.#opOf(service, request);
    await this.#options.meanwhile(op);
    if (this.#dead) return never();
    const fault = this.#options.fault(op);
    if (fault) this.#options.onFault(fault.kind === 'refused' ? fault.code : fault.kind, op);
    switch (fault?.kind) {
      case 'refused':
        return refusal(service, fault);
      case 'refused-late':
        return errorDocument(200, fault.code);
      case 'unsent':
        throw brokenConnection('ECONNRESET');
      case 'killed-before':
        return this.#die();
    }
    const answer = await this.#options.real.handle(request, options);
    this.#options.onEffect(op, answer.response.statusCode);
    if (this.#dead) return never();
    switch (fault?.kind) {
      case 'answer-lost':
        await drained(answer);
        throw timeOut();
      case 'killed-after':
        await drained(answer);
        return this.#die();
      case 'cut-off':
        return cutOff(answer);
    }
    return answer;
  }

  #die(): Promise<never> {
    this.#dead = true;
    this.#death.reject(new Killed(this.#options.killedAs()));
    return never();
  }

  #opOf(service: Service, request: Request): Op {
    const { name, resource } = describe(service, request);
    const id = `${service} ${name} ${resource}`;
    const nth = this.#seen.get(id) ?? 0;
    this.#seen.set(id, nth + 1);
    return { service, name, resource, nth, index: this.#index++ };
  }
}

/** What a killed function waits for. */
const never = () => new Promise<never>(() => {});

/** The SDK's standard retries, five attempts, without their waits. */
function withoutWaiting(): RetryStrategy {
  const token = (count: number) => ({
    getRetryCount: () => count,
    getRetryDelay: () => 0,
    getRetryCost: () => 0,
  });
  const strategy = {
    acquireInitialRetryToken: async () => token(0),
    refreshRetryTokenForRetry: async (
      { getRetryCount }: { getRetryCount(): number },
      { errorType }: { errorType: string },
    ) => {
      if (errorType === 'CLIENT_ERROR' || getRetryCount() >= 4) throw new Error('No retry is left');
      return token(getRetryCount() + 1);
    },
    recordSuccess: () => {},
  };
  return strategy;
}

function describe(service: Service, request: Request): { name: string; resource: string } {
  if (service === 'dynamodb' || service === 'states') {
    return { name: request.headers['x-amz-target']?.split('.').at(-1) ?? '', resource: '' };
  }
  if (service === 'sns') return { name: 'Publish', resource: '' };
  const flags = Object.keys(request.query ?? {}).filter((name) =>
    ['uploads', 'uploadId', 'partNumber', 'list-type'].includes(name),
  );
  const copy = request.headers['x-amz-copy-source'] ? ' copy' : '';
  const resource = decodeURIComponent(request.path).replace(/\/runs\/[^/]+/, '/runs/*');
  return { name: `${request.method}${flags.map((name) => ` ?${name}`).join('')}${copy}`, resource };
}

function refusal(service: Service, { status, code }: { status: number; code: string }): Answer {
  if (service === 's3') return errorDocument(status, code);
  if (service === 'sns') {
    const error = `<Error><Type>Sender</Type><Code>${code}</Code><Message>injected</Message></Error>`;
    return answerOf(status, 'text/xml', `<ErrorResponse>${error}<RequestId>0</RequestId></ErrorResponse>`);
  }
  const body = JSON.stringify({ __type: `com.amazonaws.${service}#${code}`, message: 'injected' });
  return answerOf(status, 'application/x-amz-json-1.0', body);
}

const errorDocument = (status: number, code: string): Answer =>
  answerOf(
    status,
    'application/xml',
    `<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>${code}</Code><Message>injected</Message></Error>`,
  );

function answerOf(statusCode: number, contentType: string, body: string): Answer {
  const response = {
    statusCode,
    headers: { 'content-type': contentType, 'content-length': String(Buffer.byteLength(body)) },
    body: Readable.from([Buffer.from(body)]),
  };
  return { response: response as unknown as Answer['response'] };
}

async function drained({ response }: Answer): Promise<void> {
  for await (const _ of response.body as Readable);
}

/** The answer with its body ending in a reset somewhere in the middle. */
async function cutOff({ response }: Answer): Promise<Answer> {
  const chunks: Buffer[] = [];
  for await (const chunk of response.body as Readable) chunks.push(chunk as Buffer);
  const whole = Buffer.concat(chunks);
  async function* half() {
    yield whole.subarray(0, Math.floor(whole.length / 2));
    throw brokenConnection('ECONNRESET');
  }
  response.body = Readable.from(half());
  return { response };
}

function brokenConnection(code: string): Error {
  return Object.assign(new Error(`read ${code}`), { code });
}

/** As the SDK's own handler says it. */
function timeOut(): Error {
  return Object.assign(new Error('the answer did not come in time'), { name: 'TimeoutError' });
}
