/** Registers model packages: immutable, `models/<name>/<version>/model.tar.gz` in the Models bucket. */
import { createReadStream } from 'node:fs';
import { stat } from 'node:fs/promises';
import { PutObjectCommand, type S3Client } from '@aws-sdk/client-s3';
import { SlidewayError } from '../core/errors.ts';
import { modelKey } from '../core/keys.ts';
import { readModelPackage, resolveModel } from '../core/models.ts';
import { readObject } from '../core/store.ts';
import { EXIT, UserError, usageError } from './terminal.ts';

export interface Registered {
  name: string;
  version: string;
  /** False when it was registered before. */
  added: boolean;
}

/** Other content is registered under the package's name and version. */
export class ModelVersionTaken extends UserError {}

/**
 * Checks a package and puts it into the register.
 * @throws {ModelVersionTaken}
 * @throws {UserError} when it is no good package.
 */
export async function registerModel(s3: S3Client, bucket: string, path: string): Promise<Registered> {
  const { model, digest } = await readModelPackage(createReadStream(path)).catch((error: unknown) => {
    throw usageError(`${path}: ${(error as Error).message}`, { cause: error });
  });
  const { name, version } = model;
  const key = modelKey(name, version);
  const existing = await readObject(s3, { bucket, key });
  if (existing) {
    const there = await readModelPackage(existing);
    if (there.digest === digest) return { name, version, added: false };
    throw new ModelVersionTaken(
      `Model ${name} ${version} is registered with other content (${there.digest.slice(0, 19)}…, ${path} is ${digest.slice(0, 19)}…). ` +
        'A version never changes: raise "version" in its model.json.',
      EXIT.usage,
    );
  }
  await s3.send(
    new PutObjectCommand({
      Bucket: bucket,
      Key: key,
      Body: createReadStream(path),
      ContentLength: (await stat(path)).size,
      ContentType: 'application/gzip',
      IfNoneMatch: '*',
    }),
  );
  return { name, version, added: true };
}

/**
 * What `--model` means, as the manifest's `model` column says it: a package file is registered, a name is looked up.
 * @throws {UserError}
 */
export async function modelFor(s3: S3Client, bucket: string, given: string): Promise<string> {
  const about = await stat(given).catch(() => undefined);
  if (about?.isFile()) {
    const { name, version } = await registerModel(s3, bucket, given);
    return `${name}@${version}`;
  }
  if (/[/\\]|\.(tar\.gz|tgz)$/.test(given)) throw usageError(`--model: there is no file ${given}.`);
  try {
    await resolveModel(s3, bucket, given);
  } catch (error) {
    if (!(error instanceof SlidewayError)) throw error;
    throw usageError(`--model: ${error.message}`, { cause: error });
  }
  return given;
}
