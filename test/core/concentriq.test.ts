/** The client of Concentriq against a Concentriq on loopback, with the faults that the real one shows. */
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { FoundSlide, WantedSlide } from '../../core/catalogue.ts';
import { Concentriq } from '../../core/concentriq.ts';
import { type Credentials, credentialsSchema } from '../../core/concentriq-client.ts';
import {
  CatalogueInvalid,
  CatalogueMisconfigured,
  CatalogueNotFound,
  CatalogueRefused,
  CatalogueUnavailable,
} from '../../core/errors.ts';
import {
  type ConcentriqContent,
  type Fault,
  type LocalConcentriq,
  startConcentriq,
} from '../../local/concentriq/server.ts';

const ACCOUNT = { username: 'lab@example.org', password: 'pass:word' };
const numbered = (count: number) =>
  Array.from({ length: count }, (_, i) => ({
    id: i + 1,
    name: `slide-${i + 1}.svs`,
    mppx: 0.25,
    mppy: 0.25,
  }));

let server: LocalConcentriq;
afterEach(() => server.close());

const start = async (content: ConcentriqContent = {}) => {
  server = await startConcentriq({
    users: { [ACCOUNT.username]: ACCOUNT.password },
    apiKeys: ['key-1'],
    tokens: ['ready-token'],
    ...content,
  });
};
const client = (
  credentials: object = ACCOUNT,
  options: Partial<ConstructorParameters<typeof Concentriq>[0]> = {},
) =>
  new Concentriq({
    url: server.url,
    credentials: async () => credentialsSchema.parse(credentials),
    keep: [],
    ...options,
    limits: { backOffSeconds: 0.001, ...options.limits },
  });

const find = async (wanted: Omit<WantedSlide, 'line'>[], concentriq = client()): Promise<FoundSlide[]> => {
  const found = await concentriq.find(wanted.map((slide, i) => ({ ...slide, line: i + 2 })));
  expect(found.size).toBe(wanted.length);
  return wanted.map((_, i) => found.get(i + 2) as FoundSlide);
};
const reasonsOf = (found: FoundSlide[]) => found.map(({ reason }) => reason?.error);
/** Answers so many requests with faults before the server gets one. */
const storm = (times: number, fault: Fault, path = '/api/images') => {
  let left = times;
  server.fault = (request) => (request.path === path && left-- > 0 ? fault : undefined);
};
const rejection = async (work: Promise<unknown>): Promise<Error> => {
  try {
    await work;
  } catch (error) {
    return error as Error;
  }
  throw new Error('expected a rejection');
};

describe('a slide is found', () => {
  beforeEach(() =>
    start({
      repositories: [
        {
          id: 7,
          name: 'Colon',
          images: [
            { id: 11, name: 'a.svs', mppx: 0.25, mppy: 0.25, objectivePower: 40 },
            { id: 12, name: 'b', mppx: '0.5', mppy: '0.5' },
            { id: 13, name: 'twice.svs' },
            { id: 14, name: 'twice.svs' },
            { id: 15, name: 'Ä.svs'.normalize('NFD'), mppx: 0.5, mppy: 0.25 },
          ],
        },
        { id: 8, name: 'Other', images: [{ id: '21', name: 'a.svs', imageSetId: '8', mppx: 1, mppy: 1 }] },
        { id: 9, name: 'Closed', images: [], forbidden: true },
      ],
    }),
  );

  it('by its image id, whatever its name', async () => {
    expect(await find([{ slide: 'x.svs', imageId: '11' }])).toEqual([
      { known: true, imageId: '11', repositoryId: '7', mpp: { x: 0.25, y: 0.25 }, metadata: {} },
    ]);
  });

  it('by its name within its repository, with or without extension and however accents are encoded', async () => {
    const found = await find([
      { slide: 'scans/a.svs', repositoryId: '7' },
      { slide: 'b.ndpi', repositoryId: '7' },
      { slide: 'Ä.svs', repositoryId: '7' },
      { slide: 'a.svs', repositoryId: '08' },
    ]);
    expect(found.map((slide) => slide.known && [slide.imageId, slide.mpp])).toEqual([
      ['11', { x: 0.25, y: 0.25 }],
      ['12', { x: 0.5, y: 0.5 }],
      ['15', { x: 0.5, y: 0.25 }],
      ['21', { x: 1, y: 1 }],
    ]);
  });

  it('or not, each for its own reason, and the others are', async () => {
    const found = await find([
      { slide: 'a.svs', imageId: '99' },
      { slide: 'nothing.svs', repositoryId: '7' },
      { slide: 'twice.svs', repositoryId: '7' },
      { slide: 'a.svs', repositoryId: '404' },
      { slide: 'a.svs', repositoryId: '9' },
      { slide: 'a.svs', repositoryId: '8', imageId: '11' },
      { slide: 'a.svs', repositoryId: 'Colon' },
      { slide: 'a.svs', repositoryId: '7', imageId: '11' },
    ]);
    expect(reasonsOf(found)).toEqual([
      'CatalogueImageUnknown',
      'CatalogueImageUnknown',
      'CatalogueImageAmbiguous',
      'CatalogueRepositoryUnknown',
      'CatalogueRepositoryUnknown',
      'CatalogueKeysDisagree',
      'CatalogueKeyInvalid',
      undefined,
    ]);
  });

  it('with only the fields that are kept', async () => {
    const [slide] = await find(
      [{ slide: 'a.svs', imageId: '11' }],
      client(ACCOUNT, { keep: ['objective_power', 'imageSetName'] }),
    );
    expect(slide).toMatchObject({ metadata: { objective_power: '40', imageSetName: 'Colon' } });
    expect(server.counts['GET /api/imageSets/<id>/export/csv']).toBeUndefined();
  });
});

describe('the metadata of a repository', () => {
  const images = [
    { id: 1, name: 'a.svs' },
    { id: 2, name: 'b.svs' },
  ];
  const stains = async (metadata: string[][]) => {
    await start({ repositories: [{ id: 7, name: 'R', images, metadata }] });
    const found = await find(
      [
        { slide: 'a.svs', imageId: '1' },
        { slide: 'b.svs', repositoryId: '7' },
      ],
      client(ACCOUNT, { keep: ['stain'] }),
    );
    expect(server.counts['GET /api/imageSets/<id>/export/csv']).toBe(1);
    return found.map((slide) => slide.known && slide.metadata);
  };

  it('gives the kept columns by image id, and nothing else', async () => {
    expect(
      await stains([
        ['Image ID', 'Patient', 'Stain'],
        ['2', 'Meier, Anna', 'Ki-67'],
        ['1', 'Huber', 'H&E, fast'],
      ]),
    ).toEqual([{ stain: 'H&E, fast' }, { stain: 'Ki-67' }]);
  });

  it('gives them by name where it has no ids, but not for a name that is there twice', async () => {
    expect(
      await stains([
        ['Slide Name', 'STAIN'],
        ['a.svs', 'H&E'],
        ['b.svs', 'Ki-67'],
        ['b.svs', 'p53'],
      ]),
    ).toEqual([{ stain: 'H&E' }, {}]);
  });

  it('may be empty, or of no use', async () => {
    expect(await stains([])).toEqual([{}, {}]);
    await server.close();
    expect(
      await stains([
        ['Case', 'Stain'],
        ['1', 'H&E'],
      ]),
    ).toEqual([{}, {}]);
  });
});

describe('authentication', () => {
  const repositories = [{ id: 7, name: 'R', images: numbered(1) }];
  const wanted = [{ slide: 's', imageId: '1' }];

  it.each<[string, Credentials | typeof ACCOUNT, number]>([
    ['a token for user name and password', ACCOUNT, 1],
    ['a ready token', { token: 'ready-token' }, 0],
    ['an api key', { apiKey: 'key-1' }, 0],
    ['user name and password with every request', { ...ACCOUNT, authentication: 'basic' }, 0],
  ])('is by %s', async (_, credentials, tokens) => {
    await start({ repositories });
    const concentriq = client(credentials);
    expect(await find(wanted, concentriq)).toMatchObject([{ known: true }]);
    await find(wanted, concentriq);
    expect(server.counts['POST /api/v3/auth/token'] ?? 0).toBe(tokens);
  });

  it('fetches one new token when the old one has expired, also for many requests at once', async () => {
    await start({ repositories: [{ id: 7, name: 'R', images: numbered(1000) }] });
    const concentriq = client();
    const many = numbered(1000).map(({ id }) => ({ slide: 's', imageId: String(id) }));
    await find(many, concentriq);
    server.expire();
    const found = await find(many, concentriq);
    expect(found.every(({ known }) => known)).toBe(true);
    expect(server.counts['POST /api/v3/auth/token']).toBe(2);
  });

  it('gives up when the new token is not taken either', async () => {
    await start({ repositories });
    storm(99, { status: 401 });
    expect(await rejection(find(wanted))).toBeInstanceOf(CatalogueRefused);
    expect(server.counts).toEqual({ 'POST /api/v3/auth/token': 2, 'GET /api/images': 2 });
  });

  it.each([
    ['password', { ...ACCOUNT, password: 'wrong-secret' }, 'POST /api/v3/auth/token'],
    ['token', { token: 'wrong-secret' }, 'GET /api/images'],
    ['api key', { apiKey: 'wrong-secret' }, 'GET /api/images'],
  ])('with a wrong %s is refused at once, without telling it', async (_, credentials, request) => {
    await start({ repositories });
    const error = await rejection(find(wanted, client(credentials)));
    expect(error.name).toBe('CatalogueRefused');
    expect(error.message).not.toContain('wrong-secret');
    expect(server.counts).toEqual({ [request]: 1 });
  });

  it('sends no password over an open line, nor takes one from the address', () => {
    for (const url of [
      'http://concentriq.example.org',
      'https://user:secret@concentriq.example.org',
      'nowhere',
    ]) {
      const open = () =>
        new Concentriq({ url, credentials: () => Promise.reject(new Error('asked')), keep: [] });
      expect(open).toThrow(CatalogueMisconfigured);
      expect(open).not.toThrow(/secret@/);
    }
  });

  it('is not carried to another host', async () => {
    await start({ repositories });
    storm(1, { status: 302, headers: { location: 'https://elsewhere.example.org/' } });
    expect(await rejection(find(wanted, client({ apiKey: 'key-1' })))).toBeInstanceOf(CatalogueInvalid);
  });
});

describe('pages', () => {
  const all = (count: number) => numbered(count).map(({ name }) => ({ slide: name, repositoryId: '7' }));

  it.each([
    [499, 1],
    [500, 2],
    [1201, 3],
  ])('of %i images are asked for until one is short: %i', async (count, pages) => {
    await start({ repositories: [{ id: 7, name: 'R', images: numbered(count) }] });
    const found = await find(all(count));
    expect(new Set(found.map((slide) => slide.known && slide.imageId)).size).toBe(count);
    expect(server.counts['GET /api/images']).toBe(pages);
  });

  it('name their size in both ways', async () => {
    await start({ repositories: [{ id: 7, name: 'R', images: [] }] });
    let asked: unknown;
    server.fault = ({ query }) => {
      if (query.has('pagination')) asked = JSON.parse(query.get('pagination') ?? '');
      return undefined;
    };
    await find([{ slide: 'a', repositoryId: '7' }]);
    expect(asked).toEqual({
      page: 1,
      itemsPerPage: 500,
      rowsPerPage: 500,
      sortBy: ['created'],
      descending: false,
    });
  });

  it('that repeat themselves end in an error instead of an endless loop', async () => {
    await start({ repositories: [{ id: 7, name: 'R', images: numbered(1201) }] });
    server.repeatPages = true;
    const error = await rejection(find(all(2)));
    expect(error).toBeInstanceOf(CatalogueInvalid);
    expect(error.message).toContain('page 2 repeats');
    expect(server.counts['GET /api/images']).toBe(3);
  });

  it('beyond the last may be the last again', async () => {
    await start({ repositories: [{ id: 7, name: 'R', images: numbered(1000) }] });
    server.clampPages = true;
    const found = await find(all(1000));
    expect(found.every(({ known }) => known)).toBe(true);
  });

  it('that repeat an image, because one was added meanwhile, count it once', async () => {
    const images = numbered(700);
    await start({
      repositories: [{ id: 7, name: 'R', images: [...images.slice(0, 500), ...images.slice(480)] }],
    });
    expect(reasonsOf(await find(all(700))).filter(Boolean)).toEqual([]);
  });
});

describe('answers of wrong types', () => {
  const wanted = ['a', 'b', 'c', 'd', 'e', 'f'].map((slide) => ({ slide, repositoryId: '7' }));

  it('cost what is wrong in them, and nothing else', async () => {
    await start({
      repositories: [
        {
          id: 7,
          name: 'R',
          images: [
            { id: '1', name: 'a', imageSetId: '7', mppx: '0.25', mppy: ' 2.5e-1 ' },
            { id: 2, name: 'b', mppx: 'about 0.25', mppy: 0.25 },
            { id: 3, name: 'c', mppx: 0, mppy: 0 },
            { id: 4, name: 'd', mppx: 0.5 },
            { id: 'five', name: 'e', mppx: 0.5, mppy: 0.5 },
            { id: 6, name: 'f', mppx: [0.5], mppy: { value: 0.5 } },
            { id: 7, name: 17 as never, mppx: 0.5, mppy: 0.5 },
          ],
        },
      ],
    });
    const found = await find([...wanted, { slide: '17', repositoryId: '7' }]);
    expect(
      found.map((slide) => (slide.known ? (slide.mpp?.x ?? slide.reason?.error) : slide.reason.error)),
    ).toEqual([
      0.25,
      'CatalogueMppInvalid',
      'CatalogueMppInvalid',
      0.5,
      'CatalogueImageUnknown',
      'CatalogueMppInvalid',
      0.5,
    ]);
  });

  it.each<[string, string]>([
    ['a page of HTML', '<html>Please log in, Dr Meier</html>'],
    ['no list', '{"data":{"images":{"0":{}}},"meta":{}}'],
    ['nothing', '{"data":null}'],
    ['a number', '17'],
  ])('that are no answers at all are said so: %s', async (_, body) => {
    await start();
    storm(1, { status: 200, body });
    const error = await rejection(find(wanted));
    expect(error).toBeInstanceOf(CatalogueInvalid);
    expect(error.message).not.toContain('Meier');
  });

  it('an error may come in an answer that calls itself well', async () => {
    await start();
    const body = JSON.stringify({ error: { status: '403', name: 'F', code: 'F', message: 'Meier' } });
    storm(1, { status: 200, body }, '/api/v3/auth/token');
    const error = await rejection(find(wanted));
    expect(error).toBeInstanceOf(CatalogueRefused);
    expect(error.message).not.toContain('Meier');
  });
});

describe('a server in trouble', () => {
  const repositories = [{ id: 7, name: 'R', images: numbered(1) }];
  const wanted = [
    { slide: 'Meier.svs', repositoryId: '7' },
    { slide: 'x', imageId: '1' },
  ];

  it.each([502, 503, 504, 429])('is asked five more times when it answers %i', async (status) => {
    await start({ repositories });
    storm(5, { status, body: '<html>Bad gateway</html>' });
    expect(await find(wanted.slice(1))).toMatchObject([{ known: true }]);
    expect(server.counts['GET /api/images']).toBe(6);
    storm(6, { status });
    const error = await rejection(find(wanted));
    expect(error).toBeInstanceOf(CatalogueUnavailable);
    expect(error.message).toBe(`GET /api/images: answered ${status}, 6 times.`);
  });

  it('waits longer before every further attempt', async () => {
    await start({ repositories });
    const times: number[] = [];
    server.fault = ({ path }) => {
      if (path !== '/api/images') return undefined;
      times.push(performance.now());
      return { status: 502 };
    };
    await rejection(find(wanted, client(ACCOUNT, { limits: { backOffSeconds: 0.02 } })));
    const waits = times.slice(1).map((time, i) => time - (times[i] ?? 0));
    expect(waits).toHaveLength(5);
    for (const [attempt, wait] of waits.entries()) expect(wait).toBeGreaterThan(12 * 2 ** attempt);
    expect(waits.at(-1)).toBeGreaterThan(200);
  });

  it('is not asked again for an error that stays', async () => {
    await start({ repositories });
    storm(9, { status: 500 });
    expect(await rejection(find(wanted))).toBeInstanceOf(CatalogueUnavailable);
    expect(server.counts['GET /api/images']).toBe(1);
  });

  it('that cuts the line is asked again', async () => {
    await start({ repositories });
    storm(2, 'cut');
    expect(await find(wanted.slice(1))).toMatchObject([{ known: true }]);
  });

  it('that does not answer is given up in time, for a request and over all', async () => {
    await start({ repositories });
    storm(99, 'hang');
    const slow = client(ACCOUNT, {
      limits: { requestSeconds: 0.05, overallSeconds: 0.3, backOffSeconds: 0.05 },
    });
    const error = await rejection(find(wanted, slow));
    expect(error).toBeInstanceOf(CatalogueUnavailable);
    expect(error.message).toContain('no answer within 0.0');
    expect(server.counts['GET /api/images']).toBeLessThan(6);
  });

  it('that is not there is said so, without what was asked', async () => {
    await start({ repositories });
    const { url } = server;
    await server.close();
    const error = await rejection(find(wanted, client({ apiKey: 'key-1' }, { url })));
    expect(error).toBeInstanceOf(CatalogueUnavailable);
    expect(error.message).toBe('GET /api/images: could not be reached (ECONNREFUSED), 6 times.');
  });

  it('whose address is another server says so', async () => {
    await start({ repositories });
    storm(1, { status: 404, body: '<html>Not found</html>' });
    expect(await rejection(find(wanted))).toBeInstanceOf(CatalogueInvalid);
  });
});

describe('an overlay', () => {
  const png = new Uint8Array([137, 80, 78, 71]);
  beforeEach(() => start({ repositories: [{ id: 7, name: 'R', images: numbered(2) }] }));

  it('is made under our module, which is made once, and gets its picture without our credentials', async () => {
    for (const concentriq of [client(), client({ apiKey: 'key-1' })]) {
      const id = await concentriq.createOverlay('2', 'a heatmap');
      await concentriq.uploadOverlay(id, png);
      await concentriq.createOverlay('1', 'another');
    }
    expect(server.modules.map(({ name }) => name)).toEqual(['Default', 'Slideway']);
    expect(server.counts['GET /api/v2/modules']).toBe(2);
    expect(server.overlays[0]).toMatchObject({ imageId: 2, name: 'a heatmap', moduleId: 2 });
    expect(server.overlays[0]?.png).toEqual(Buffer.from(png));
  });

  it('of an image that is not there is an error of its own', async () => {
    expect(await rejection(client().createOverlay('99', 'x'))).toBeInstanceOf(CatalogueNotFound);
  });

  it('goes through a storm', async () => {
    let left = 3;
    server.fault = ({ path }) => (path.startsWith('/storage/') && left-- > 0 ? { status: 503 } : undefined);
    const concentriq = client();
    await concentriq.uploadOverlay(await concentriq.createOverlay('1', 'x'), png);
    expect(server.overlays[0]?.png).toBeDefined();
  });

  it('keeps its signed address out of what is said, as it is all the right one needs', async () => {
    server.fault = ({ path }) => (path.startsWith('/storage/') ? { status: 403 } : undefined);
    const concentriq = client();
    const error = await rejection(concentriq.uploadOverlay(await concentriq.createOverlay('1', 'x'), png));
    expect(error).toBeInstanceOf(CatalogueRefused);
    expect(error.message).not.toMatch(/Signature|storage/);
  });
});

describe("the public clients' calls", () => {
  beforeEach(() => start({ repositories: [{ id: 7, name: 'R', images: numbered(3) }] }));
  const json = async (path: string, init: RequestInit = {}) =>
    (await (await fetch(`${server.url}/api/${path}`, init)).json()) as Record<string, never>;
  const basic = {
    authorization: `Basic ${Buffer.from(`${ACCOUNT.username}:${ACCOUNT.password}`).toString('base64')}`,
  };

  it('get the same images from the local one as ours', async () => {
    const [ours] = await find([{ slide: 'slide-2.svs', repositoryId: '7' }]);
    const { token } = await json('v3/auth/token', { method: 'POST', headers: basic });
    const query = (size: string) =>
      new URLSearchParams({
        filters: JSON.stringify({ imageSetId: [7] }),
        pagination: JSON.stringify({ page: 1, [size]: 2, sortBy: ['created'], descending: false }),
      });
    const byToken = await json(`images?${query('itemsPerPage')}`, {
      headers: { authorization: `Bearer ${token}` },
    });
    const byBasic = await json(`images?${query('rowsPerPage')}`, { headers: basic });
    expect(byBasic.data).toEqual(byToken.data);
    expect(byBasic).toMatchObject({
      data: { images: [{ id: 1 }, { id: 2, name: 'slide-2.svs', mppx: 0.25 }] },
      meta: { pagination: { rowsReturned: 2 } },
    });
    expect(ours).toMatchObject({ imageId: '2', mpp: { x: 0.25, y: 0.25 } });
    expect(await json('imageSets/7', { headers: basic })).toMatchObject({
      data: { id: 7, imageCount: 3, totalSize: '3000' },
      meta: { pagination: null },
    });
    expect(await json('images/99', { headers: basic })).toMatchObject({ error: { status: 404 } });
  });

  it('make an overlay from a form as from JSON', async () => {
    const body = new URLSearchParams({ name: 'x', moduleId: '1' });
    expect(await json('images/1/overlays', { method: 'POST', headers: basic, body })).toMatchObject({
      data: { id: 1, imageId: 1, moduleId: 1 },
    });
  });
});
