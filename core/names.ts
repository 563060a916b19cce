/**
 * What a slide is called in Bronze. The stage's template is filled from the manifest and the catalogue; what comes of
 * it is made fit for S3, for file systems and for every tool between them. The slide's id stands in where no name can
 * be made.
 */
import { createHash } from 'node:crypto';
import type { Reason } from './contracts.ts';
import { NameTemplateInvalid } from './errors.ts';

/** A name in bytes of UTF-8: file systems take 255, and companions of the slide carry the name too. */
const MAX_NAME_BYTES = 180;

/** `literal{field}literal{field}…literal` */
export interface NameTemplate {
  fields: { before: string; field: string }[];
  after: string;
}

/** Reads a template such as `{case_id}_{stain}_{slide_id}`. */
export function parseNameTemplate(text: string): NameTemplate {
  const fields: NameTemplate['fields'] = [];
  let rest = text;
  for (let match = next(rest); match; match = next(rest)) {
    const [whole, before = '', field = ''] = match;
    fields.push({ before, field: field.trim().toLowerCase() });
    rest = rest.slice(whole.length);
  }
  if (fields.length === 0 || /[{}]/.test(rest) || /[\\/]/.test(text)) {
    throw new NameTemplateInvalid(
      `canonicalName \`${text}\` must name fields in braces, as {case_id}_{stain}_{slide_id}, and no folders.`,
    );
  }
  return { fields, after: rest };
}

const next = (text: string) => /^([^{}]*)\{([^{}]+)\}/.exec(text);

export interface CanonicalName {
  name: string;
  /** The safe name: the slide's id. */
  fallback: string;
  /** Why the safe name is taken. */
  reason?: Reason;
}

/**
 * The name of a slide: the template with the slide's fields, those that are missing dropped with their separator, and
 * the slide file's extension.
 */
export function canonicalName(
  template: NameTemplate,
  fields: Readonly<Record<string, string>>,
  slide: string,
  slideId: string,
): CanonicalName {
  const extension = extensionOf(slide);
  const fallback = safeName(slideId, extension);
  const stem = fill(template, fields);
  if (stem === '') {
    const named = template.fields.map(({ field }) => field).join(', ');
    return {
      name: fallback,
      fallback,
      reason: {
        error: 'NameEmpty',
        message: `Neither manifest nor catalogue gives the slide any of: ${named}.`,
      },
    };
  }
  const name = `${stem}${extension}`;
  if (Buffer.byteLength(name) > MAX_NAME_BYTES) {
    return {
      name: fallback,
      fallback,
      reason: {
        error: 'NameTooLong',
        message: `The canonical name has ${Buffer.byteLength(name)} bytes; ${MAX_NAME_BYTES} are allowed.`,
      },
    };
  }
  return { name, fallback };
}

/** A name that no other content of the slide can have been given: the slide's id, marked with what is in it. */
export function markedName(slideId: string, slide: string, content: string): string {
  const mark = createHash('sha256').update(content).digest('hex').slice(0, 8);
  return safeName(slideId, `-${mark}${extensionOf(slide)}`);
}

function fill({ fields, after }: NameTemplate, values: Readonly<Record<string, string>>): string {
  let name = '';
  let filled = false;
  for (const [index, { before, field }] of fields.entries()) {
    const value = clean(values[field] ?? '');
    // What stands before the first field is no separator.
    if (index === 0) name += before;
    if (value === '') continue;
    name += index > 0 && filled ? before + value : value;
    filled = true;
  }
  return filled ? trimmed(clean(name + after)) : '';
}

/**
 * Letters and digits of every script, and `. _ - ( ) + = , @`, stay; every other run of characters becomes one `-`.
 * Composed form, so that a name is the same bytes wherever it was typed.
 */
const clean = (text: string): string =>
  text
    .normalize('NFC')
    .replace(/[^\p{L}\p{M}\p{N}._()+=,@-]+/gu, '-')
    .replace(/\.{2,}/g, '.')
    .replace(/^[-.]+|[-.]+$/g, '');

const trimmed = (text: string): string => text.replace(/^[-._]+|[-._]+$/g, '');

/** With its dot; `.ome.tiff` stays whole, and a folder has none. */
const extensionOf = (slide: string): string => /(?:\.ome)?\.[A-Za-z0-9]{1,10}$/i.exec(slide)?.[0] ?? '';

/** The id as a name; one that is too long is cut, and told apart by a hash of the whole. */
function safeName(slideId: string, ending: string): string {
  const stem = clean(slideId);
  if (stem === slideId.normalize('NFC') && Buffer.byteLength(stem + ending) <= MAX_NAME_BYTES)
    return stem + ending;
  const hash = createHash('sha256').update(slideId).digest('hex').slice(0, 8);
  let kept = '';
  for (const character of stem) {
    if (Buffer.byteLength(`${kept}${character}-${hash}${ending}`) > MAX_NAME_BYTES) break;
    kept += character;
  }
  return `${kept ? `${kept}-` : ''}${hash}${ending}`;
}
