/**
 * HTTP as Concentriq LS speaks it: every way of authentication, retries with back-off, limits of time. What is
 * thrown names the request without its query, because names of slides and signed addresses stand there, and nothing
 * that the server said beyond its status.
 */
import { setTimeout as wait } from 'node:timers/promises';
import { z } from 'zod';
import { CatalogueInvalid, CatalogueNotFound, CatalogueRefused, CatalogueUnavailable } from './errors.ts';

const filled = z.string().min(1);
/** The secret of a Concentriq account, as JSON. */
export const credentialsSchema = z.union([
  z.strictObject({ apiKey: filled }),
  z.strictObject({ token: filled }),
  z.strictObject({
    username: filled,
    password: filled,
    /** `basic`: an older server, that takes the password with every request. */
    authentication: z.enum(['token', 'basic']).default('token'),
  }),
]);
export type Credentials = z.infer<typeof credentialsSchema>;

export interface Limits {
  /** For one attempt of one request, and for a whole task with its retries. */
  requestSeconds: number;
  overallSeconds: number;
  /** Before the first repetition; doubled before each further one. */
  backOffSeconds: number;
}

export const LIMITS: Limits = { requestSeconds: 30, overallSeconds: 600, backOffSeconds: 1 };

/** Repetitions of a request that the server could not serve. */
const RETRIES = 5;
const RETRIED = new Set([429, 502, 503, 504]);

interface Request {
  method: 'GET' | 'POST' | 'PUT';
  /** Below `<url>/api`, or a whole signed address. */
  path: string | URL;
  query?: Record<string, unknown>;
  body?: unknown;
}

/** Milliseconds since the epoch by which a task has to be done. */
export type Until = number;

export class ConcentriqClient {
  readonly #url: URL;
  readonly #limits: Limits;
  readonly #readCredentials: () => Promise<Credentials>;
  #credentials: Promise<Credentials> | undefined;
  #token: Promise<string> | undefined;

  /** `credentials` is called once, before the first request. */
  constructor(options: { url: URL; credentials: () => Promise<Credentials>; limits?: Partial<Limits> }) {
    this.#url = options.url;
    this.#limits = { ...LIMITS, ...options.limits };
    this.#readCredentials = options.credentials;
  }

  /** When a task that begins now has to be done. */
  until(): Until {
    return Date.now() + this.#limits.overallSeconds * 1000;
  }

  /** The `data` of an answer and all of it; `query` values other than texts go as JSON. */
  async get(path: string, until: Until, query: Record<string, unknown> = {}): Promise<Answer> {
    return answerOf(path, await this.#authorized({ method: 'GET', path, query }, until));
  }

  async post(path: string, body: unknown, until: Until): Promise<Answer> {
    return answerOf(path, await this.#authorized({ method: 'POST', path, body }, until));
  }

  async text(path: string, until: Until): Promise<string> {
    return this.#authorized({ method: 'GET', path }, until);
  }

  /** Puts bytes where a signed address says; the address is all the right that there is. */
  async putSigned(address: URL, bytes: Uint8Array, until: Until): Promise<void> {
    await this.#send({ method: 'PUT', path: address, body: bytes }, {}, until);
  }

  /** Sends with our credentials; a token that is no longer taken is fetched anew once. */
  async #authorized(request: Request, until: Until): Promise<string> {
    this.#credentials ??= this.#readCredentials();
    const credentials = await this.#credentials;
    if ('apiKey' in credentials) {
      return this.#send(request, { 'concentriq-api-key': credentials.apiKey }, until);
    }
    if ('token' in credentials) return this.#send(request, bearer(credentials.token), until);
    if (credentials.authentication === 'basic') return this.#send(request, basic(credentials), until);

    this.#token ??= this.#fetchToken(credentials, until);
    const used = this.#token;
    try {
      return await this.#send(request, bearer(await used), until);
    } catch (error) {
      if (!(error instanceof NotAuthenticated)) throw error;
      // Several requests may find the token expired at once; the first of them fetches the new one for all.
      if (this.#token === used || !this.#token) this.#token = this.#fetchToken(credentials, until);
      return this.#send(request, bearer(await this.#token), until);
    }
  }

  async #fetchToken(account: { username: string; password: string }, until: Until): Promise<string> {
    const path = '/v3/auth/token';
    try {
      const body = parse(path, await this.#send({ method: 'POST', path }, basic(account), until));
      const token = z.object({ token: filled }).safeParse(body);
      if (!token.success) throw new CatalogueInvalid('POST /api/v3/auth/token: the answer has no token.');
      return token.data.token;
    } catch (error) {
      // What failed is not kept: the next request asks again.
      this.#token = undefined;
      if (!(error instanceof CatalogueRefused)) throw error;
      throw new CatalogueRefused(
        'POST /api/v3/auth/token: the catalogue does not take the user name and password of the secret.',
      );
    }
  }

  /** The body of the answer; repeats what the server could not serve, as long as there is time. */
  async #send(request: Request, authorization: Record<string, string>, until: Until): Promise<string> {
    const what = nameOf(request);
    for (let attempt = 0; ; attempt++) {
      const outcome = await this.#attempt(request, authorization, until);
      if ('body' in outcome) return outcome.body;
      const pause = this.#limits.backOffSeconds * 1000 * 2 ** attempt * (0.75 + Math.random() / 2);
      if (attempt === RETRIES || Date.now() + pause > until) {
        const times = attempt === 0 ? '' : `, ${attempt + 1} times`;
        throw new CatalogueUnavailable(`${what}: ${outcome.trouble}${times}.`);
      }
      await wait(pause);
    }
  }

  async #attempt(
    { method, path, query = {}, body }: Request,
    authorization: Record<string, string>,
    until: Until,
  ): Promise<{ body: string } | { trouble: string }> {
    const what = nameOf({ method, path });
    const seconds = Math.min(this.#limits.requestSeconds, Math.max(until - Date.now(), 1) / 1000);
    let status: number;
    let text: string;
    try {
      const response = await fetch(typeof path === 'string' ? this.#address(path, query) : path, {
        method,
        headers: {
          ...authorization,
          ...(typeof path === 'string' && { accept: 'application/json, text/csv' }),
          ...(body !== undefined && !(body instanceof Uint8Array) && { 'content-type': 'application/json' }),
        },
        ...(body !== undefined && {
          body: body instanceof Uint8Array ? Uint8Array.from(body) : JSON.stringify(body),
        }),
        // Another host must not get our credentials.
        redirect: 'manual',
        signal: AbortSignal.timeout(Math.ceil(seconds * 1000)),
      });
      status = response.status;
      text = await response.text();
    } catch (error) {
      return { trouble: troubleOf(error, seconds) };
    }
    // An error may come in an answer that calls itself well.
    const inside = statusInside(text);
    status = inside ?? status;
    if (status >= 200 && status < 300) return { body: text };
    if (RETRIED.has(status)) return { trouble: `answered ${status}` };
    if (status === 401) throw new NotAuthenticated(`${what}: the catalogue does not take our credentials.`);
    if (status === 403) throw new NotAllowed(`${what}: our account has no right to this.`);
    // Anything else on the network answers 404 too, but not in the catalogue's words.
    if (inside === 404) throw new CatalogueNotFound(`${what}: there is no such thing.`);
    if (status >= 500) throw new CatalogueUnavailable(`${what}: answered ${status}.`);
    throw new CatalogueInvalid(`${what}: answered ${status}. Is its address the right one?`);
  }

  #address(path: string, query: Record<string, unknown>): URL {
    const address = new URL(this.#url);
    address.pathname = `${address.pathname.replace(/\/+$/, '')}/api${path}`;
    for (const [name, value] of Object.entries(query)) {
      address.searchParams.set(name, typeof value === 'string' ? value : JSON.stringify(value));
    }
    return address;
  }
}

/** A 401: the token may have expired. To the outside it is a refusal like any other. */
class NotAuthenticated extends CatalogueRefused {
  constructor(message: string) {
    super(message);
    this.name = CatalogueRefused.name;
  }
}

/** A 403: not the account is refused, but this one thing. */
export class NotAllowed extends CatalogueRefused {
  constructor(message: string) {
    super(message);
    this.name = CatalogueRefused.name;
  }
}

export interface Answer {
  /** The answer's `data`; the whole of an answer that has none. */
  data: unknown;
  whole: Record<string, unknown>;
}

function answerOf(path: string, text: string): Answer {
  const whole = parse(path, text);
  return { data: 'data' in whole ? whole.data : whole, whole };
}

function parse(path: string, text: string): Record<string, unknown> {
  try {
    const value: unknown = JSON.parse(text);
    if (value !== null && typeof value === 'object') return value as Record<string, unknown>;
  } catch {
    // Said below.
  }
  throw new CatalogueInvalid(
    `/api${path}: the answer is not JSON. Is the catalogue's address the right one?`,
  );
}

/** The status in `{"error": {"status"}}`, whatever the status line says. */
function statusInside(text: string): number | undefined {
  if (!/^\s*\{\s*"error"/.test(text)) return undefined;
  try {
    const { error } = JSON.parse(text) as { error?: { status?: unknown } | null };
    const status = Number(error?.status);
    return Number.isInteger(status) && status >= 400 && status < 600 ? status : undefined;
  } catch {
    return undefined;
  }
}

/** `GET /api/images`; of a signed address the host alone. */
const nameOf = ({ method, path }: Pick<Request, 'method' | 'path'>) =>
  typeof path === 'string' ? `${method} /api${path}` : `${method} to ${path.host}`;

function troubleOf(error: unknown, seconds: number): string {
  if (error instanceof DOMException && error.name === 'TimeoutError') {
    return `no answer within ${Number(seconds.toPrecision(2))} s`;
  }
  const { code } = ((error as Error).cause ?? {}) as { code?: unknown };
  return `could not be reached${typeof code === 'string' ? ` (${code})` : ''}`;
}

const bearer = (token: string) => ({ authorization: `Bearer ${token}` });
const basic = ({ username, password }: { username: string; password: string }) => ({
  authorization: `Basic ${Buffer.from(`${username}:${password}`).toString('base64')}`,
});
