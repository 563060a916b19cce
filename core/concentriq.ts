/**
 * Concentriq LS as the catalogue: images found by id or by name within a repository, the repository's own fields, and
 * heatmaps put back as overlays. Its entries may hold patient data: only what the stage names is taken out of them,
 * and nothing of them ever stands in an error.
 */
import { GetSecretValueCommand, type SecretsManagerClient } from '@aws-sdk/client-secrets-manager';
import { parse } from 'csv-parse';
import type { Catalogue, FoundSlide, WantedSlide } from './catalogue.ts';
import {
  ConcentriqClient,
  type Credentials,
  credentialsSchema,
  type Limits,
  NotAllowed,
  type Until,
} from './concentriq-client.ts';
import { forEachConcurrently } from './concurrency.ts';
import type { Reason } from './contracts.ts';
import { CatalogueInvalid, CatalogueMisconfigured, CatalogueNotFound, classify } from './errors.ts';

export interface ConcentriqOptions {
  /** Without `/api`. */
  url: string;
  credentials: () => Promise<Credentials>;
  /** Fields that become metadata of a slide: of an image, or of its repository's metadata. */
  keep: string[];
  limits?: Partial<Limits>;
}

/** Images a page, and image ids a request; the query string holds them. */
const PAGE = 500;
const IDS = 200;
const CONCURRENCY = 4;
/** The module that overlays of ours belong to. */
const MODULE = 'Slideway';

/** Fields of an image itself, folded; all others are looked for in the repository's metadata. */
const IMAGE_FIELDS = new Set(
  [
    ...[
      'id',
      'name',
      'imageSetId',
      'imageSetName',
      'folderParentId',
      'mppx',
      'mppy',
      'imgWidth',
      'imgHeight',
    ],
    ...['fileSize', 'objectivePower', 'slideName', 'status', 'created', 'storageKey', 'thumbURL'],
    ...['hasOverlays', 'hasAnnotations'],
  ].map(fold),
);
const ID_COLUMNS = ['imageid', 'id'];
/** Columns of an export that say whose row it is, the surest first. */
const COLUMNS = [...ID_COLUMNS, 'imagename', 'slidename', 'filename', 'name'];

/** A slide with its keys as the catalogue writes them; empty where the manifest has none. */
type KeyedSlide = Required<WantedSlide>;

/** What is taken of an image. */
interface Image {
  id: string;
  repositoryId: string;
  name: string;
  mpp?: { x: number; y: number };
  metadata: Record<string, string>;
  reason?: Reason;
}

export class Concentriq implements Catalogue {
  readonly kind = 'concentriq';
  readonly host: string;
  readonly #client: ConcentriqClient;
  readonly #keep: string[];
  #module: Promise<number> | undefined;

  /** @throws {CatalogueMisconfigured} for an address over which a password must not go. */
  constructor({ url, credentials, keep, limits = {} }: ConcentriqOptions) {
    const address = addressOf(url);
    this.host = address.host;
    this.#client = new ConcentriqClient({ url: address, credentials, limits });
    this.#keep = keep;
  }

  async find(wanted: WantedSlide[]): Promise<Map<number, FoundSlide>> {
    const until = this.#client.until();
    const found = new Map<number, FoundSlide>();
    const images = new Map<number, Image>();
    const byId: KeyedSlide[] = [];
    const byName: KeyedSlide[] = [];
    for (const { line, slide, ...keys } of wanted) {
      const [repositoryId, imageId] = [idOf(keys.repositoryId), idOf(keys.imageId)];
      if ((keys.repositoryId && !repositoryId) || (keys.imageId && !imageId)) {
        found.set(line, unknown('CatalogueKeyInvalid', KEY_INVALID));
      } else {
        (imageId ? byId : byName).push({
          line,
          slide,
          repositoryId: repositoryId ?? '',
          imageId: imageId ?? '',
        });
      }
    }
    await this.#findById(byId, images, found, until);
    for (const [repositoryId, slides] of Map.groupBy(byName, (slide) => slide.repositoryId)) {
      await this.#findByName(repositoryId, slides, images, found, until);
    }
    await this.#addFields([...images.values()], until);
    for (const [line, { id, repositoryId, name: _, ...image }] of images) {
      found.set(line, { known: true, imageId: id, repositoryId, ...image });
    }
    return found;
  }

  async createOverlay(imageId: string, name: string): Promise<string> {
    const until = this.#client.until();
    const moduleId = await this.#moduleId(until);
    const { data } = await this.#client.post(`/images/${imageId}/overlays`, { name, moduleId }, until);
    const id = idOf((data as { id?: unknown } | null)?.id);
    if (!id) throw new CatalogueInvalid('POST /api/images/<id>/overlays: the answer has no id.');
    return id;
  }

  async uploadOverlay(overlayId: string, png: Uint8Array): Promise<void> {
    const until = this.#client.until();
    const { data, whole } = await this.#client.get(`/sign_s3_overlay/${overlayId}`, until);
    const inside = (data ?? {}) as { signed_request?: unknown };
    const signed = inside.signed_request ?? whole.signed_request;
    if (typeof signed !== 'string' || !URL.canParse(signed)) {
      throw new CatalogueInvalid('GET /api/sign_s3_overlay/<id>: the answer has no signed address.');
    }
    await this.#client.putSigned(new URL(signed), png, until);
  }

  // --- images --------------------------------------------------------------------------------------------------

  async #findById(
    wanted: KeyedSlide[],
    images: Map<number, Image>,
    found: Map<number, FoundSlide>,
    until: Until,
  ): Promise<void> {
    const ids = [...new Set(wanted.map(({ imageId }) => imageId))];
    const batches = Array.from({ length: Math.ceil(ids.length / IDS) }, (_, i) =>
      ids.slice(i * IDS, (i + 1) * IDS),
    );
    const byId = new Map<string, Image>();
    await forEachConcurrently(batches, CONCURRENCY, async (batch) => {
      try {
        const listed = this.#images({ imageId: batch.map(Number) }, until);
        for await (const image of listed) byId.set(image.id, image);
      } catch (error) {
        if (!(error instanceof CatalogueNotFound)) throw error;
        // Then it knows none of them.
      }
    });
    for (const { line, imageId, repositoryId } of wanted) {
      const image = byId.get(imageId);
      if (!image) {
        found.set(line, unknown('CatalogueImageUnknown', 'The catalogue has no image of this image_id.'));
      } else if (repositoryId && repositoryId !== image.repositoryId) {
        found.set(
          line,
          unknown(
            'CatalogueKeysDisagree',
            'The image_id is of another repository than the repository_id says.',
          ),
        );
      } else images.set(line, image);
    }
  }

  async #findByName(
    repositoryId: string,
    wanted: KeyedSlide[],
    images: Map<number, Image>,
    found: Map<number, FoundSlide>,
    until: Until,
  ): Promise<void> {
    const names = new Set(wanted.flatMap(({ slide }) => namesOf(slide)));
    const byName = new Map<string, Image[]>();
    try {
      for await (const image of this.#images({ imageSetId: [Number(repositoryId)] }, until)) {
        // The repository may hold a million images; those of the manifest are kept.
        if (!names.has(image.name) || image.repositoryId !== repositoryId) continue;
        byName.set(image.name, [...(byName.get(image.name) ?? []), image]);
      }
    } catch (error) {
      if (!(error instanceof CatalogueNotFound || error instanceof NotAllowed)) throw error;
      const reason = 'The catalogue has no repository of this repository_id that our account may see.';
      for (const { line } of wanted) found.set(line, unknown('CatalogueRepositoryUnknown', reason));
      return;
    }
    for (const { line, slide } of wanted) {
      const [image, ...others] = namesOf(slide)
        .map((name) => byName.get(name) ?? [])
        .find((same) => same.length > 0) ?? [undefined];
      if (!image) {
        found.set(line, unknown('CatalogueImageUnknown', "The slide's repository has no image of its name."));
      } else if (others.length > 0) {
        found.set(
          line,
          unknown(
            'CatalogueImageAmbiguous',
            `The slide's repository has ${others.length + 1} images of its name. Give image_id in the manifest.`,
          ),
        );
      } else images.set(line, image);
    }
  }

  /** The images that a filter lets through, page after page until one is short; each once. */
  async *#images(filters: Record<string, number[]>, until: Until): AsyncGenerator<Image> {
    const seen = new Set<string>();
    let again = false;
    for (let page = 1; ; ) {
      const rows = await this.#page(filters, page, until);
      let fresh = 0;
      for (const row of rows) {
        const image = this.#imageOf(row);
        if (!image || seen.has(image.id)) continue;
        seen.add(image.id);
        fresh += 1;
        yield image;
      }
      if (rows.length < PAGE) return;
      if (fresh > 0) {
        page += 1;
        again = false;
      } else if (!again) again = true;
      else if (await this.#isWhole(filters.imageSetId?.[0], seen.size, until)) return;
      else {
        throw new CatalogueInvalid(
          `GET /api/images: page ${page} repeats images of earlier pages, so that the rest cannot be seen.`,
        );
      }
    }
  }

  async #page(filters: Record<string, number[]>, page: number, until: Until): Promise<unknown[]> {
    const { data } = await this.#client.get('/images', until, {
      filters,
      // Servers know the page's size under one name or the other.
      pagination: { page, itemsPerPage: PAGE, rowsPerPage: PAGE, sortBy: ['created'], descending: false },
    });
    const images = (data as { images?: unknown } | null)?.images;
    if (!Array.isArray(images))
      throw new CatalogueInvalid('GET /api/images: the answer has no list of images.');
    return images;
  }

  /** Whether so many images are all of a repository: a server may give the last page for any beyond it. */
  async #isWhole(repositoryId: number | undefined, seen: number, until: Until): Promise<boolean> {
    if (repositoryId === undefined) return false;
    const { data } = await this.#client.get(`/imageSets/${repositoryId}`, until);
    const count = numberOf((data as { imageCount?: unknown } | null)?.imageCount);
    return count !== undefined && seen >= count;
  }

  #imageOf(row: unknown): Image | undefined {
    if (row === null || typeof row !== 'object') return undefined;
    const fields = row as Record<string, unknown>;
    const id = idOf(fields.id);
    const repositoryId = idOf(fields.imageSetId);
    if (!id || !repositoryId) return undefined;
    const metadata: Record<string, string> = {};
    for (const kept of this.#keep.filter((name) => IMAGE_FIELDS.has(fold(name)))) {
      const [, value] = Object.entries(fields).find(([name]) => fold(name) === fold(kept)) ?? [];
      const text = textOf(value);
      if (text) metadata[kept] = text;
    }
    const name = (textOf(fields.name) ?? '').normalize('NFC');
    return { id, repositoryId, name, metadata, ...mppOf(fields.mppx, fields.mppy) };
  }

  // --- the repositories' own fields ----------------------------------------------------------------------------

  /** Adds the kept fields that are a repository's metadata, from its export. */
  async #addFields(images: Image[], until: Until): Promise<void> {
    const kept = this.#keep.filter((name) => !IMAGE_FIELDS.has(fold(name)));
    if (kept.length === 0) return;
    const repositories = Map.groupBy(images, ({ repositoryId }) => repositoryId);
    await forEachConcurrently(repositories, CONCURRENCY, async ([repositoryId, members]) => {
      try {
        const text = await this.#client.text(`/imageSets/${repositoryId}/export/csv`, until);
        await takeFields(text, kept, members);
      } catch (error) {
        if (!(error instanceof CatalogueNotFound)) throw error;
        // A repository without metadata.
      }
    });
  }

  // --- overlays ------------------------------------------------------------------------------------------------

  /** Our module, found or made. */
  #moduleId(until: Until): Promise<number> {
    this.#module ??= this.#findModule(until).catch((error: unknown) => {
      this.#module = undefined;
      throw error;
    });
    return this.#module;
  }

  async #findModule(until: Until): Promise<number> {
    const path = '/v2/modules';
    const { data } = await this.#client.get(path, until);
    const inside = (data as { modules?: unknown } | null)?.modules ?? data;
    const modules = (Array.isArray(inside) ? inside : []) as ({ id?: unknown; name?: unknown } | null)[];
    const ours = modules.find((module) => module?.name === MODULE);
    const made =
      ours ?? ((await this.#client.post(path, { name: MODULE }, until)).data as { id?: unknown } | null);
    const id = idOf(made?.id);
    if (!id) throw new CatalogueInvalid('/api/v2/modules: the module has no id.');
    return Number(id);
  }
}

/** The account that a secret of Secrets Manager holds. @throws {CatalogueMisconfigured} */
export async function readCredentials(
  secrets: SecretsManagerClient,
  secretArn: string,
): Promise<Credentials> {
  let text: string | undefined;
  try {
    text = (await secrets.send(new GetSecretValueCommand({ SecretId: secretArn }))).SecretString;
  } catch (error) {
    const known = classify(error);
    if (known !== error || !(error instanceof Error)) throw known;
    throw new CatalogueMisconfigured(`The catalogue's secret cannot be read: ${error.name}.`);
  }
  try {
    return credentialsSchema.parse(JSON.parse(text ?? ''));
  } catch {
    // What was wrong with it could quote it.
    throw new CatalogueMisconfigured(
      "The catalogue's secret is not JSON with apiKey, or token, or username and password (docs/catalogue.md).",
    );
  }
}

/** @throws {CatalogueMisconfigured} */
function addressOf(url: string): URL {
  const address = URL.canParse(url) ? new URL(url) : undefined;
  const local = address !== undefined && ['127.0.0.1', 'localhost', '[::1]'].includes(address.hostname);
  if (!address || !(address.protocol === 'https:' || (local && address.protocol === 'http:'))) {
    throw new CatalogueMisconfigured("The catalogue's url is not an https address.");
  }
  if (address.username || address.password) {
    throw new CatalogueMisconfigured("The catalogue's url holds credentials; they belong into its secret.");
  }
  return address;
}

// --- reading what may come in other types than it should --------------------------------------------------------

const KEY_INVALID = 'repository_id and image_id are whole numbers in this catalogue.';

const unknown = (error: string, message: string): FoundSlide => ({
  known: false,
  reason: { error, message },
});

/** Names under which a slide's image may go: its file's, with and without extension. */
function namesOf(slide: string): string[] {
  const base = (slide.split('/').at(-1) ?? slide).normalize('NFC');
  return [base, base.replace(/\.[^.]+$/, '')];
}

/** `Image ID`, `imageId` and `image_id` are one name. */
function fold(name: string): string {
  return name.toLowerCase().replace(/[^\p{L}\p{N}]/gu, '');
}

/** A finite number, also as text. */
function numberOf(value: unknown): number | undefined {
  if (typeof value === 'string' && !/^\s*[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?\s*$/i.test(value))
    return undefined;
  if (typeof value !== 'string' && typeof value !== 'number') return undefined;
  const number = Number(value);
  return Number.isFinite(number) ? number : undefined;
}

/** A whole number above zero as its digits; numbers as text and with leading zeros too. */
function idOf(value: unknown): string | undefined {
  const number = numberOf(value);
  return number !== undefined && Number.isSafeInteger(number) && number > 0 ? String(number) : undefined;
}

function textOf(value: unknown): string | undefined {
  if (typeof value === 'number' || typeof value === 'boolean') return String(value);
  return typeof value === 'string' && value.trim() !== '' ? value.trim() : undefined;
}

/** The manifest's own bounds: anything else is no pixel size of a slide. */
const plausible = (mpp: number) => mpp >= 0.02 && mpp <= 20;

/** The pixel size; where only one direction is given, it stands for both. */
function mppOf(mppx: unknown, mppy: unknown): Pick<Image, 'mpp' | 'reason'> {
  const given = [mppx, mppy].filter((value) => value !== null && value !== undefined && value !== '');
  const [x, y = x] = given.map(numberOf);
  if (given.length === 0) return {};
  if (x !== undefined && y !== undefined && plausible(x) && plausible(y)) return { mpp: { x, y } };
  return {
    reason: {
      error: 'CatalogueMppInvalid',
      message:
        "The catalogue's mppx and mppy are not pixel sizes in µm between 0.02 and 20; they are not used.",
    },
  };
}

/** Takes the kept columns of a repository's export for its images, by id, else by name. */
async function takeFields(text: string, kept: string[], images: Image[]): Promise<void> {
  const byId = Map.groupBy(images, ({ id }) => id);
  const byName = Map.groupBy(images, ({ name }) => name);
  const named = new Set<string>();
  const rows = parse(text, {
    bom: true,
    columns: (header: string[]) => header.map(fold),
    relax_column_count: true,
    relax_quotes: true,
    skip_empty_lines: true,
  });
  try {
    for await (const row of rows as AsyncIterable<Record<string, string>>) {
      const column = COLUMNS.find((name) => name in row);
      if (!column) return;
      const key = row[column] ?? '';
      const byItsId = ID_COLUMNS.includes(column);
      const members = byItsId ? byId.get(idOf(key) ?? '') : byName.get(key.trim().normalize('NFC'));
      if (!members) continue;
      // Of two rows under one name nobody knows which is meant.
      const usable = byItsId || !named.has(key);
      named.add(key);
      for (const { metadata } of members) {
        for (const name of kept) {
          const value = usable ? textOf(row[fold(name)]) : undefined;
          if (value) metadata[name] = value;
          else delete metadata[name];
        }
      }
    }
  } catch {
    // The parser's own words quote the line.
    throw new CatalogueInvalid('GET /api/imageSets/<id>/export/csv: the answer is not CSV.');
  }
}
