/** Model packages: what is inside `model.tar.gz`, and which version of a model a run takes. */
import { createHash } from 'node:crypto';
import type { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { createGunzip } from 'node:zlib';
import { paginateListObjectsV2, type S3Client } from '@aws-sdk/client-s3';
import { extract } from 'tar-stream';
import { z } from 'zod';
import { ATTENTION, type Model, type ModelRef, modelSchema, outputNames } from './contracts.ts';
import { ModelFormatNotSupported, ModelNotFound, ModelPackageInvalid } from './errors.ts';
import { modelKey } from './keys.ts';
import { openObject } from './store.ts';

const DESCRIPTOR = 'model.json';
const DESCRIPTOR_LIMIT = 1 << 20;
/** What tells a package's format, the first that is there: code may load any weights beside it. */
const FORMATS = [
  ['code/inference.py', 'code'],
  ['model.pt', 'torchscript'],
  ['model.onnx', 'onnx'],
] as const;
export type ModelFormat = (typeof FORMATS)[number][1];

/** `Transform` jobs take this much at once: requests under way times their payload. */
const MAX_TRANSFORM_MB = 100;

/** Of results.csv, by one model; they are in the slide's item of the state table too, which may have 400 KB. */
const MAX_COLUMNS = 1000;

export interface ModelPackage {
  model: Model;
  format: ModelFormat;
  /** `sha256:<hex>` of the whole package. */
  digest: string;
}

/**
 * Reads a package to its end: its descriptor, checked, and its digest.
 * @throws {ModelPackageInvalid} saying what is wrong with it.
 */
export async function readModelPackage(bytes: Readable): Promise<ModelPackage> {
  const hash = createHash('sha256');
  const names = new Set<string>();
  let descriptor: string | undefined;
  const unpack = extract();
  unpack.on('entry', (header, stream, next) => {
    const name = header.name.replace(/^\.\//, '');
    names.add(name);
    stream.on('end', next);
    if (name !== DESCRIPTOR) {
      stream.resume();
      return;
    }
    const chunks: Buffer[] = [];
    let size = 0;
    stream.on('data', (chunk) => {
      const part = chunk as Buffer;
      size += part.length;
      if (size <= DESCRIPTOR_LIMIT) chunks.push(part);
    });
    stream.on('end', () => {
      descriptor = Buffer.concat(chunks).toString('utf8');
    });
  });
  // What breaks the reading says nothing about the package.
  let broken: { error: unknown } | undefined;
  async function* hashed() {
    try {
      for await (const chunk of bytes) {
        hash.update(chunk as Buffer);
        yield chunk as Buffer;
      }
    } catch (error) {
      broken = { error };
      throw error;
    }
  }
  try {
    await pipeline(hashed, createGunzip(), unpack);
  } catch (error) {
    if (broken) throw broken.error;
    throw new ModelPackageInvalid(`not a readable model.tar.gz: ${(error as Error).message}`, {
      cause: error,
    });
  }
  if (descriptor === undefined) throw new ModelPackageInvalid('model.json is missing from the package');
  const model = parseModel(descriptor);
  const format = FORMATS.find(([name]) => names.has(name))?.[1];
  if (!format) {
    throw new ModelPackageInvalid(`the package holds none of ${FORMATS.map(([name]) => name).join(', ')}`);
  }
  if (format === 'torchscript' && names.has('model.onnx')) {
    throw new ModelPackageInvalid('the package holds both model.pt and model.onnx; leave one out');
  }
  if (model.head && !names.has(model.head.file)) {
    throw new ModelPackageInvalid(`the package lacks ${model.head.file}, which head.file names`);
  }
  return { model, format, digest: `sha256:${hash.digest('hex')}` };
}

/**
 * Reads no further into a package than to its descriptor; `undefined` where it has none.
 * @throws {ModelPackageInvalid}
 */
export async function readDescriptor(bytes: Readable): Promise<string | undefined> {
  const unpack = extract();
  const flow = pipeline(bytes, createGunzip(), unpack);
  // What ends the reading early is no failure; what breaks it is told by the loop below.
  flow.catch(() => {});
  try {
    for await (const entry of unpack) {
      if (entry.header.name.replace(/^\.\//, '') !== DESCRIPTOR) {
        entry.resume();
        continue;
      }
      const chunks: Buffer[] = [];
      for await (const chunk of entry) chunks.push(chunk as Buffer);
      return Buffer.concat(chunks).toString('utf8');
    }
    return undefined;
  } catch (error) {
    throw new ModelPackageInvalid(`not a readable model.tar.gz: ${(error as Error).message}`, {
      cause: error,
    });
  } finally {
    bytes.destroy();
  }
}

/**
 * What model.json says, checked.
 * @throws {ModelPackageInvalid} naming the field.
 */
export function parseModel(text: string): Model {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new ModelPackageInvalid(`model.json is not JSON: ${(error as Error).message}`);
  }
  const result = modelSchema.safeParse(value);
  if (!result.success)
    throw new ModelPackageInvalid(`model.json: ${z.prettifyError(result.error).replaceAll('\n', ' ')}`);
  const model = result.data;
  const problem = contradiction(model);
  if (problem) throw new ModelPackageInvalid(`model.json: ${problem}`);
  return model;
}

/** What one field of model.json says against another. */
function contradiction({
  task,
  outputs,
  dimensions,
  tile,
  aggregate,
  heatmap,
  head,
  transform,
}: Model): string | undefined {
  if (dimensions !== undefined && task !== 'embedding') return 'dimensions are for an embedding only';
  if (dimensions !== undefined && outputs.length > 0) return 'give outputs or dimensions, not both';
  if (dimensions === undefined && outputs.length === 0) {
    return task === 'embedding' ? 'an embedding needs dimensions' : 'outputs must name at least one';
  }
  if (new Set(outputs).size < outputs.length) return 'outputs must differ from each other';
  if (head && new Set(head.outputs).size < head.outputs.length) {
    return 'head.outputs must differ from each other';
  }
  if (head?.attention && outputs.includes(ATTENTION)) {
    return `no output can be called ${ATTENTION} beside a head that gives one`;
  }
  const drawn = [...outputNames({ outputs, dimensions }), ...(head?.attention ? [ATTENTION] : [])];
  if (heatmap && !drawn.includes(heatmap.output)) {
    return heatmap.output === ATTENTION
      ? `heatmap.output ${ATTENTION} needs a head with "attention": true`
      : `heatmap.output ${heatmap.output} is not among the outputs`;
  }
  if (tile.overlap >= tile.px) return 'tile.overlap must be below tile.px';
  const columns = outputs.length * new Set(aggregate).size;
  if (task !== 'embedding' && columns > MAX_COLUMNS) {
    return `outputs × aggregate are ${columns} columns of results.csv; at most ${MAX_COLUMNS}`;
  }
  const { maxConcurrentTransforms = 1, maxPayloadInMB = 1 } = transform ?? {};
  if (maxConcurrentTransforms * maxPayloadInMB > MAX_TRANSFORM_MB) {
    return `transform.maxConcurrentTransforms × maxPayloadInMB must be at most ${MAX_TRANSFORM_MB}`;
  }
  return undefined;
}

/** Versions in order: numbers compare as numbers, and a version is above its own pre-releases. */
export function compareVersions(a: string, b: string): number {
  const [mainA = '', preA] = a.split(/-(.*)/s);
  const [mainB = '', preB] = b.split(/-(.*)/s);
  const collator = new Intl.Collator('en', { numeric: true });
  if (mainA !== mainB) return collator.compare(mainA, mainB);
  if (preA === undefined || preB === undefined)
    return Number(preA === undefined) - Number(preB === undefined);
  return collator.compare(preA, preB);
}

/**
 * Finds the package that `name` or `name@version` means; without a version, the newest. `allowCode`: packages may
 * bring code of their own.
 * @throws {ModelNotFound | ModelPackageInvalid | ModelFormatNotSupported}
 */
export async function resolveModel(
  s3: S3Client,
  bucket: string,
  wanted: string,
  { allowCode }: { allowCode: boolean },
): Promise<ModelRef & { model: Model }> {
  const [name = '', wantedVersion] = wanted.split('@');
  const version = wantedVersion ?? (await newestVersion(s3, bucket, name));
  const key = version === undefined ? undefined : modelKey(name, version);
  const opened = key && (await openObject(s3, { bucket, key }));
  if (!version || !opened) {
    throw new ModelNotFound(
      `No model \`${wanted}\` is registered. Register its package with \`slideway model add\`.`,
    );
  }
  let found: ModelPackage;
  try {
    found = await readModelPackage(opened.body);
  } catch (error) {
    if (error instanceof ModelPackageInvalid)
      error.message = `Model \`${name}@${version}\`: ${error.message}`;
    throw error;
  }
  const { model, format, digest } = found;
  if (model.name !== name || model.version !== version) {
    throw new ModelPackageInvalid(
      `Model \`${name}@${version}\`: its model.json says ${model.name} ${model.version}; package and key must agree.`,
    );
  }
  if (format === 'code' && !allowCode) {
    throw new ModelFormatNotSupported(
      `Model \`${name}@${version}\` brings code of its own (code/inference.py), which this stage does not run. Export it as model.pt or model.onnx, or set inference.allowModelCode in the stage's settings.`,
    );
  }
  const { body: _, ...ref } = opened;
  return { name, version, digest, ...ref, model };
}

async function newestVersion(s3: S3Client, bucket: string, name: string): Promise<string | undefined> {
  const versions: string[] = [];
  for await (const entry of listVersions(s3, bucket, name)) versions.push(entry.version);
  return versions.sort(compareVersions).at(-1);
}

/** A version of a model as the register's listing tells of it. */
export interface RegisterEntry {
  name: string;
  version: string;
  key: string;
  bytes: number;
  addedAt: Date;
}

/** All versions that are registered, or those of one model, in the order of their keys. */
export async function* listVersions(
  s3: S3Client,
  bucket: string,
  name?: string,
): AsyncGenerator<RegisterEntry> {
  const prefix = name === undefined ? 'models/' : `models/${name}/`;
  for await (const page of paginateListObjectsV2({ client: s3 }, { Bucket: bucket, Prefix: prefix })) {
    for (const { Key = '', Size = 0, LastModified = new Date(0) } of page.Contents ?? []) {
      const [, named = '', version = '', file] = Key.split('/');
      if (file === 'model.tar.gz') {
        yield { name: named, version, key: Key, bytes: Size, addedAt: LastModified };
      }
    }
  }
}
