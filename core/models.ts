/** Model packages: what is inside `model.tar.gz`, and which version of a model a run takes. */
import { createHash } from 'node:crypto';
import type { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { createGunzip } from 'node:zlib';
import { paginateListObjectsV2, type S3Client } from '@aws-sdk/client-s3';
import { extract } from 'tar-stream';
import { z } from 'zod';
import { type Model, type ModelRef, modelSchema } from './contracts.ts';
import {
  ModelFormatNotSupported,
  ModelModeNotSupported,
  ModelNotFound,
  ModelPackageInvalid,
} from './errors.ts';
import { modelKey } from './keys.ts';
import { openObject } from './store.ts';

const DESCRIPTOR_LIMIT = 1 << 20;
const WEIGHTS = ['model.pt', 'model.onnx', 'code/inference.py'];
const SUPPORTED = 'model.pt';

export interface ModelPackage {
  model: Model;
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
    if (name !== 'model.json') {
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
  if (!WEIGHTS.some((name) => names.has(name))) {
    throw new ModelPackageInvalid(`the package holds none of ${WEIGHTS.join(', ')}`);
  }
  if (!names.has(SUPPORTED)) {
    throw new ModelFormatNotSupported(
      'only TorchScript is run so far: put the model into the package as model.pt',
    );
  }
  return { model, digest: `sha256:${hash.digest('hex')}` };
}

function parseModel(text: string): Model {
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
  if (model.heatmap && !model.outputs.includes(model.heatmap.output)) {
    throw new ModelPackageInvalid(
      `model.json: heatmap.output ${model.heatmap.output} is not among the outputs`,
    );
  }
  if (model.tile.overlap >= model.tile.px)
    throw new ModelPackageInvalid('model.json: tile.overlap must be below tile.px');
  return model;
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
 * Finds the package that `name` or `name@version` means; without a version, the newest.
 * @throws {ModelNotFound | ModelPackageInvalid | ModelModeNotSupported}
 */
export async function resolveModel(
  s3: S3Client,
  bucket: string,
  wanted: string,
): Promise<ModelRef & { model: Model }> {
  const [name = '', wantedVersion] = wanted.split('@');
  const version = wantedVersion ?? (await newestVersion(s3, bucket, name));
  const key = version === undefined ? undefined : modelKey(name, version);
  const opened = key && (await openObject(s3, { bucket, key }));
  if (!version || !opened) {
    throw new ModelNotFound(
      `No model \`${wanted}\` is registered; put its package at models/<name>/<version>/model.tar.gz.`,
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
  const { model, digest } = found;
  if (model.name !== name || model.version !== version) {
    throw new ModelPackageInvalid(
      `Model \`${name}@${version}\`: its model.json says ${model.name} ${model.version}; package and key must agree.`,
    );
  }
  if (model.mode !== 'processing') {
    throw new ModelModeNotSupported(
      `Model \`${name}@${version}\` asks for mode ${model.mode}, which is not available. Set "mode": "processing" in its model.json.`,
    );
  }
  const { body: _, ...ref } = opened;
  return { name, version, digest, ...ref, model };
}

async function newestVersion(s3: S3Client, bucket: string, name: string): Promise<string | undefined> {
  const versions: string[] = [];
  for await (const page of paginateListObjectsV2(
    { client: s3 },
    { Bucket: bucket, Prefix: `models/${name}/` },
  )) {
    for (const { Key = '' } of page.Contents ?? []) {
      const [, , , version, file] = ['', ...Key.split('/')];
      if (version && file === 'model.tar.gz') versions.push(version);
    }
  }
  return versions.sort(compareVersions).at(-1);
}
