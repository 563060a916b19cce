/**
 * A Concentriq LS on loopback: the part of its API that public clients use, over a catalogue held in memory, with the
 * faults that the real one shows. It knows nothing of Slideway.
 */
import { randomBytes } from 'node:crypto';
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';

/** An image; what is not given is made up. Values may be of wrong types, as they are in the field. */
export interface ImageFields {
  id: number | string;
  name: string;
  mppx?: unknown;
  mppy?: unknown;
  [field: string]: unknown;
}

export interface Repository {
  id: number;
  name: string;
  images: ImageFields[];
  /** The metadata as it is exported: header and rows. */
  metadata?: string[][];
  /** Accounts without a right to it get 403. */
  forbidden?: boolean;
}

export interface ConcentriqContent {
  /** E-mail address to password. */
  users?: Record<string, string>;
  apiKeys?: string[];
  /** Tokens that are valid from the start. */
  tokens?: string[];
  repositories?: Repository[];
}

export interface Overlay {
  id: number;
  imageId: number;
  name: string;
  moduleId: number;
  /** Absent until the picture is put. */
  png?: Buffer;
}

/** What a fault answers in place of the server; `cut` ends the connection, `hang` never answers. */
export type Fault = { status: number; body?: string; headers?: Record<string, string> } | 'cut' | 'hang';

export interface LocalConcentriq {
  url: string;
  /** Requests so far, by method and path with ids as `<id>`: `GET /api/images`. */
  counts: Record<string, number>;
  overlays: Overlay[];
  modules: { id: number; name: string }[];
  /** Every token and signed address given out so far is no longer taken. */
  expire(): void;
  /** Asked before each request is served; what it answers is answered instead. */
  fault:
    | ((request: { method: string; path: string; query: URLSearchParams }) => Fault | undefined)
    | undefined;
  /** Every page after the first is the first again. */
  repeatPages: boolean;
  /** Pages past the last are the last again. */
  clampPages: boolean;
  close(): Promise<void>;
}

/** Starts the server; `port` 0 takes a free one. */
export async function startConcentriq(
  content: ConcentriqContent,
  options: { port?: number } = {},
): Promise<LocalConcentriq> {
  const service = new Service(content);
  const server = createServer((request, response) => {
    // Whoever hung up gets no answer.
    service.serve(request, response).catch(() => response.destroy());
  });
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen(options.port ?? 0, '127.0.0.1', resolve);
  });
  service.url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  return Object.assign(service, {
    close: () => {
      server.closeAllConnections();
      return new Promise<void>((resolve) => server.close(() => resolve()));
    },
  });
}

/** An error as Concentriq answers it. */
class ApiError extends Error {
  readonly status: number;
  constructor(status: number, name: string, message: string) {
    super(message);
    this.status = status;
    this.name = name;
  }
}

interface Context {
  request: IncomingMessage;
  method: string;
  query: URLSearchParams;
  body: Buffer;
  /** Ids in the path. */
  ids: number[];
}

type Data = { data: unknown; pagination?: object } | { plain: unknown } | { csv: string };

class Service {
  url = '';
  fault: LocalConcentriq['fault'];
  repeatPages = false;
  clampPages = false;
  readonly counts: Record<string, number> = {};
  readonly overlays: Overlay[] = [];
  readonly modules: { id: number; name: string }[] = [{ id: 1, name: 'Default' }];
  readonly #content: Required<ConcentriqContent>;
  readonly #tokens: Set<string>;
  readonly #signed = new Map<string, number>();

  constructor(content: ConcentriqContent) {
    this.#content = { users: {}, apiKeys: [], tokens: [], repositories: [], ...content };
    this.#tokens = new Set(this.#content.tokens);
  }

  expire(): void {
    this.#tokens.clear();
    this.#signed.clear();
  }

  async serve(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const { pathname, searchParams: query } = new URL(request.url ?? '/', 'http://localhost');
    const method = request.method ?? 'GET';
    const shape = pathname.replace(/\/(\d+)(?=\/|$)/g, '/<id>').replace(/^\/storage\/.*/, '/storage/<key>');
    const name = `${method} ${shape}`;
    this.counts[name] = (this.counts[name] ?? 0) + 1;
    const body = await bodyOf(request);
    const fault = this.fault?.({ method, path: pathname, query });
    if (fault === 'hang') return;
    if (fault === 'cut') {
      request.socket.destroy();
      return;
    }
    if (fault) {
      response.writeHead(fault.status, fault.headers).end(fault.body ?? '');
      return;
    }
    const ids = [...pathname.matchAll(/\/(\d+)(?=\/|$)/g)].map(([, id]) => Number(id));
    try {
      const answer = this.#answer(name, pathname, { request, method, query, body, ids });
      if ('csv' in answer) response.writeHead(200, { 'content-type': 'text/csv' }).end(answer.csv);
      else if ('plain' in answer) sendJson(response, 200, answer.plain);
      else sendJson(response, 200, { data: answer.data, meta: { pagination: answer.pagination ?? null } });
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      const { status, name: title, message } = error;
      sendJson(response, status, { error: { status, name: title, code: title.toUpperCase(), message } });
    }
  }

  #answer(name: string, path: string, context: Context): Data {
    if (name === 'PUT /storage/<key>') return this.#put(path, context);
    if (name === 'POST /api/v3/auth/token') {
      if (!this.#isBasic(context.request)) throw notAuthenticated();
      const token = randomBytes(16).toString('hex');
      this.#tokens.add(token);
      return { plain: { token } };
    }
    if (!this.#isKnown(context.request)) throw notAuthenticated();
    const [id = 0] = context.ids;
    switch (name) {
      case 'GET /api/imageSets/<id>':
        return { data: this.#repository(id) };
      case 'GET /api/imageSets/<id>/export/csv':
        return { csv: this.#export(id) };
      case 'GET /api/images':
        return this.#images(context.query);
      case 'GET /api/images/<id>':
        return { data: this.#image(id) };
      case 'GET /api/annotations':
        return { data: { annotations: [] }, pagination: { page: 1, rowsReturned: 0 } };
      case 'GET /api/v2/modules':
        return { data: this.modules };
      case 'POST /api/v2/modules': {
        const module = { id: this.modules.length + 1, name: String(fieldsOf(context).name) };
        this.modules.push(module);
        return { data: module };
      }
      case 'POST /api/images/<id>/overlays':
        return { data: this.#createOverlay(id, fieldsOf(context)) };
      case 'GET /api/sign_s3_overlay/<id>':
        return { plain: { signed_request: this.#sign(id), url: `${this.url}/storage/overlays/${id}` } };
      default:
        throw new ApiError(404, 'NotFoundError', 'Not found');
    }
  }

  // --- who asks ------------------------------------------------------------------------------------------------

  #isBasic({ headers: { authorization = '' } }: IncomingMessage): boolean {
    const [, encoded] = /^Basic (.+)$/.exec(authorization) ?? [];
    const [user = '', ...password] = Buffer.from(encoded ?? '', 'base64')
      .toString('utf8')
      .split(':');
    return Object.hasOwn(this.#content.users, user) && this.#content.users[user] === password.join(':');
  }

  #isKnown(request: IncomingMessage): boolean {
    const { authorization = '', 'concentriq-api-key': apiKey } = request.headers;
    if (typeof apiKey === 'string') return this.#content.apiKeys.includes(apiKey);
    const [, token] = /^Bearer (.+)$/.exec(authorization) ?? [];
    return token === undefined ? this.#isBasic(request) : this.#tokens.has(token);
  }

  // --- repositories and images ---------------------------------------------------------------------------------

  #find(id: number): Repository {
    const repository = this.#content.repositories.find((candidate) => candidate.id === id);
    if (!repository) throw new ApiError(404, 'NotFoundError', `Image set ${id} not found`);
    if (repository.forbidden) throw new ApiError(403, 'ForbiddenError', 'You may not see this image set');
    return repository;
  }

  #repository(id: number): object {
    const { name, images } = this.#find(id);
    return { id, name, imageCount: images.length, totalSize: String(images.length * 1000), groupId: null };
  }

  #export(id: number): string {
    const rows = this.#find(id).metadata ?? [];
    const cell = (text: string) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    return rows.map((row) => `${row.map(cell).join(',')}\r\n`).join('');
  }

  /** The images that may be seen, of all repositories or of these. */
  #all(among?: number[]): Record<string, unknown>[] {
    return this.#content.repositories
      .filter(({ id, forbidden }) => !forbidden && (!among || among.includes(id)))
      .flatMap((repository) => repository.images.map((image) => this.#filled(repository, image)));
  }

  #filled(repository: Repository, image: ImageFields): Record<string, unknown> {
    return {
      imageSetId: repository.id,
      imageSetName: repository.name,
      folderParentId: null,
      mppx: null,
      mppy: null,
      imgWidth: 1000,
      imgHeight: 1000,
      filesize: '1000',
      fileSize: 1000,
      objectivePower: null,
      slideName: '',
      status: 2,
      created: '2026-01-01T00:00:00.000Z',
      storageKey: `slides/${image.id}`,
      thumbURL: null,
      hasOverlays: this.overlays.some(({ imageId }) => imageId === Number(image.id)),
      hasAnnotations: false,
      ...image,
    };
  }

  #image(id: number): Record<string, unknown> {
    const image = this.#all().find((candidate) => Number(candidate.id) === id);
    if (!image) throw new ApiError(404, 'NotFoundError', `Image ${id} not found`);
    return image;
  }

  #images(query: URLSearchParams): Data {
    const filters = jsonOf(query.get('filters')) as {
      imageSetId?: number[];
      imageId?: number[];
      name?: string[];
    };
    for (const id of filters.imageSetId ?? []) this.#find(id);
    const among = (wanted: unknown[] | undefined, value: unknown) => !wanted || wanted.includes(value);
    const images = this.#all(filters.imageSetId).filter(
      (image) => among(filters.imageId, Number(image.id)) && among(filters.name, image.name),
    );
    if (!query.has('pagination')) return { data: { images } };
    const asked = jsonOf(query.get('pagination')) as Record<string, unknown>;
    const size = Number(asked.itemsPerPage ?? asked.rowsPerPage ?? 100);
    const last = Math.max(Math.ceil(images.length / size), 1);
    const wanted = Number(asked.page ?? 1);
    const page = this.repeatPages ? 1 : this.clampPages ? Math.min(wanted, last) : wanted;
    const rows = images.slice((page - 1) * size, page * size);
    return { data: { images: rows }, pagination: { ...asked, rowsReturned: rows.length } };
  }

  // --- overlays ------------------------------------------------------------------------------------------------

  #createOverlay(imageId: number, { name, moduleId }: Record<string, unknown>): object {
    this.#image(imageId);
    if (!this.modules.some(({ id }) => id === Number(moduleId))) {
      throw new ApiError(400, 'ValidationError', `There is no module ${String(moduleId)}`);
    }
    const overlay = { id: this.overlays.length + 1, imageId, name: String(name), moduleId: Number(moduleId) };
    this.overlays.push(overlay);
    return overlay;
  }

  #sign(overlayId: number): string {
    if (!this.overlays.some(({ id }) => id === overlayId)) {
      throw new ApiError(404, 'NotFoundError', `Overlay ${overlayId} not found`);
    }
    const key = randomBytes(16).toString('hex');
    this.#signed.set(key, overlayId);
    return `${this.url}/storage/${key}?X-Amz-Signature=${key}`;
  }

  /** The storage behind it, which like S3 refuses a request that is signed twice over. */
  #put(path: string, { request, body }: Context): Data {
    if (request.headers.authorization !== undefined || request.headers['concentriq-api-key'] !== undefined) {
      throw new ApiError(400, 'InvalidArgument', 'Only one auth mechanism allowed');
    }
    const overlayId = this.#signed.get(path.split('/').at(-1) ?? '');
    const overlay = this.overlays.find(({ id }) => id === overlayId);
    if (!overlay) throw new ApiError(403, 'AccessDenied', 'Request has expired');
    overlay.png = body;
    return { plain: {} };
  }
}

const notAuthenticated = () => new ApiError(401, 'UnauthorizedError', 'Authentication failed');

async function bodyOf(request: IncomingMessage): Promise<Buffer> {
  const chunks: Buffer[] = [];
  for await (const chunk of request as AsyncIterable<Buffer>) chunks.push(chunk);
  return Buffer.concat(chunks);
}

function sendJson(response: ServerResponse, status: number, value: unknown): void {
  response.writeHead(status, { 'content-type': 'application/json' }).end(JSON.stringify(value));
}

function jsonOf(text: string | null): unknown {
  try {
    return JSON.parse(text ?? '{}');
  } catch {
    throw new ApiError(400, 'ValidationError', 'filters and pagination are JSON');
  }
}

/** Fields of a JSON body, or of a form, as older clients send it. */
function fieldsOf({ request, body }: Context): Record<string, unknown> {
  const text = body.toString('utf8');
  if (request.headers['content-type']?.includes('json')) return jsonOf(text) as Record<string, unknown>;
  return Object.fromEntries(new URLSearchParams(text));
}
