/**
 * The catalogue: the image management system that knows the slides' metadata. Here is what Slideway asks of one and
 * what it makes of the answers; how Concentriq is spoken to stands in concentriq.ts.
 */
import type { CatalogueEntry, CatalogueSummary, Reason } from './contracts.ts';
import {
  CatalogueInvalid,
  CatalogueMisconfigured,
  CatalogueRefused,
  CatalogueUnavailable,
  reasonOf,
} from './errors.ts';
import type { ManifestRow } from './manifest.ts';

/** A slide to be found: by the image's id, else by its file's name within the repository. */
export interface WantedSlide {
  /** Line of the manifest. */
  line: number;
  /** Path as the manifest has it. */
  slide: string;
  repositoryId?: string;
  imageId?: string;
}

/** What the catalogue says of a slide, or why it says nothing. */
export type FoundSlide =
  | {
      known: true;
      repositoryId: string;
      imageId: string;
      /** µm per pixel, across and down. */
      mpp?: { x: number; y: number };
      /** The fields that the stage keeps. */
      metadata: Record<string, string>;
      /** What of the entry could not be used. */
      reason?: Reason;
    }
  | { known: false; reason: Reason };

export interface Catalogue {
  readonly kind: 'concentriq';
  /** Host of the catalogue, without credentials; says which one an image's id belongs to. */
  readonly host: string;
  /**
   * The entries of slides, by line; every slide that is asked for gets one.
   * @throws {CatalogueUnavailable | CatalogueRefused | CatalogueInvalid | CatalogueMisconfigured}
   */
  find(wanted: WantedSlide[]): Promise<Map<number, FoundSlide>>;
  /** Makes an empty overlay on an image; answers its id. Throws as `find`, or CatalogueNotFound. */
  createOverlay(imageId: string, name: string): Promise<string>;
  /** Gives an overlay its picture. Throws as `createOverlay`. */
  uploadOverlay(overlayId: string, png: Uint8Array): Promise<void>;
}

/** The catalogue of a stage; `undefined` stands for none. */
export interface CatalogueSource {
  catalogue: Catalogue;
  /** A catalogue that cannot be asked fails the run. */
  required: boolean;
}

const NOT_ASKED: Reason = {
  error: 'CatalogueNotAsked',
  message: 'The row has neither repository_id nor image_id, by which the catalogue finds a slide.',
};

/**
 * Asks for every usable row of a manifest. A catalogue that cannot be asked at all fails the run where the stage
 * demands it; else the run goes on without it, and the summary says why.
 */
export async function askCatalogue(
  rows: ManifestRow[],
  source: CatalogueSource | undefined,
): Promise<{ found: Map<number, FoundSlide>; summary?: CatalogueSummary }> {
  if (!source) return { found: new Map() };
  const { catalogue, required } = source;
  const found = new Map<number, FoundSlide>();
  const wanted: WantedSlide[] = [];
  for (const { line, slide, metadata, reason } of rows) {
    if (reason) continue;
    const { repository_id: repositoryId, image_id: imageId } = metadata;
    if (repositoryId === undefined && imageId === undefined) {
      found.set(line, { known: false, reason: NOT_ASKED });
    } else {
      wanted.push({ line, slide, ...(repositoryId && { repositoryId }), ...(imageId && { imageId }) });
    }
  }
  let warning: Reason | undefined;
  try {
    if (wanted.length > 0) for (const [line, slide] of await catalogue.find(wanted)) found.set(line, slide);
  } catch (error) {
    if (required || !isCatalogueFailure(error)) throw error;
    const reason = reasonOf(error);
    warning = reason;
    for (const { line } of wanted) found.set(line, { known: false, reason });
  }
  return { found, summary: summarise(catalogue, wanted, found, warning) };
}

function summarise(
  { kind }: Catalogue,
  wanted: WantedSlide[],
  found: Map<number, FoundSlide>,
  warning: Reason | undefined,
): CatalogueSummary {
  const reasons: Record<string, number> = {};
  let known = 0;
  for (const slide of found.values()) {
    if (slide.known) known += 1;
    if (slide.reason) reasons[slide.reason.error] = (reasons[slide.reason.error] ?? 0) + 1;
  }
  return { kind, asked: wanted.length, known, reasons, ...(warning && { warning }) };
}

/** Whether the catalogue as a whole is the trouble, not one of its things. */
export const isCatalogueFailure = (error: unknown): boolean =>
  error instanceof CatalogueUnavailable ||
  error instanceof CatalogueRefused ||
  error instanceof CatalogueInvalid ||
  error instanceof CatalogueMisconfigured;

/** What a plan's line keeps of the answer. */
export function entryOf(found: FoundSlide): CatalogueEntry {
  if (!found.known) return found;
  const { repositoryId, imageId, reason } = found;
  return { known: true, repositoryId, imageId, ...(reason && { reason }) };
}

/** Pixels whose sides differ by no more than this are square. */
const SQUARE = 0.01;

/**
 * One µm per pixel for both directions: that across, where the pixels are square within 1 %. Slideway tiles square
 * pixels, so that a slide with others needs a person.
 */
export function squareMpp({ x, y }: { x: number; y: number }): { mpp: number } | { reason: Reason } {
  if (Math.abs(x - y) <= SQUARE * Math.max(x, y)) return { mpp: x };
  return {
    reason: {
      error: 'MppNotSquare',
      message: `The catalogue gives ${x} × ${y} µm per pixel, which is not square. Correct it there, or give \`mpp\` in the manifest.`,
    },
  };
}
