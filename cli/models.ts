/**
 * The register of models: packages at `models/<name>/<version>/model.tar.gz` in the Models bucket, which never change.
 * What people ask of a package stands in the object's metadata, so that a listing reads no package.
 */
import { createReadStream } from 'node:fs';
import { stat } from 'node:fs/promises';
import { HeadObjectCommand, type S3Client } from '@aws-sdk/client-s3';
import { Upload } from '@aws-sdk/lib-storage';
import { forEachConcurrently } from '../core/concurrency.ts';
import type { Model } from '../core/contracts.ts';
import { isNotFound, SlidewayError } from '../core/errors.ts';
import { modelKey } from '../core/keys.ts';
import {
  compareVersions,
  listVersions,
  type ModelFormat,
  type ModelPackage,
  parseModel,
  type RegisterEntry,
  readDescriptor,
  readModelPackage,
  resolveModel,
} from '../core/models.ts';
import { openObject } from '../core/store.ts';
import { EXIT, UserError, usageError } from './terminal.ts';

const MiB = 2 ** 20;
const PARTS = 9_000;
/** S3 keeps 2 KB of metadata. */
const LONGEST = 500;

export interface Registered {
  name: string;
  version: string;
  digest: string;
  bytes: number;
  /** False when it was registered before. */
  added: boolean;
}

/** What the metadata of a registered package says; empty for one that was uploaded in another way. */
export interface About {
  digest?: string;
  license?: string;
  task?: string;
  mode?: string;
  format?: string;
}

export interface RegisteredModel extends RegisterEntry, About {}

/** Other content is registered under the package's name and version. */
export class ModelVersionTaken extends UserError {}

/** What a package file holds. Throws {UserError} when it is no good package. */
export async function readPackageFile(path: string): Promise<ModelPackage & { bytes: number }> {
  const about = await stat(path).catch((error: unknown) => {
    throw usageError(`${path} cannot be read: ${(error as NodeJS.ErrnoException).code ?? error}.`, {
      cause: error,
    });
  });
  try {
    return { ...(await readModelPackage(createReadStream(path))), bytes: about.size };
  } catch (error) {
    const { name, message } = error as Error;
    throw usageError(`${path}: ${message} (${name})`, { cause: error });
  }
}

export interface RegisterOptions {
  signal?: AbortSignal;
  /** Hears how many bytes have been sent. */
  onProgress?(sent: number): void;
}

/**
 * Checks a package and puts it into the register.
 * @throws {ModelVersionTaken}
 * @throws {UserError} when it is no good package.
 */
export async function registerModel(
  s3: S3Client,
  bucket: string,
  path: string,
  { signal, onProgress }: RegisterOptions = {},
): Promise<Registered> {
  const { model, format, digest, bytes } = await readPackageFile(path);
  const { name, version } = model;
  const key = modelKey(name, version);
  const registered = { name, version, digest, bytes };
  if (await isThere(s3, bucket, key, { path, model, digest })) return { ...registered, added: false };
  const upload = new Upload({
    client: s3,
    params: {
      Bucket: bucket,
      Key: key,
      Body: createReadStream(path, { highWaterMark: MiB }),
      ContentType: 'application/gzip',
      Metadata: metadataOf(model, format, digest),
      ChecksumAlgorithm: 'CRC64NVME',
      // Nobody's package is overwritten, whoever comes first.
      IfNoneMatch: '*',
    },
    partSize: Math.max(16 * MiB, Math.ceil(bytes / PARTS / MiB) * MiB),
    queueSize: 3,
  });
  upload.on('httpUploadProgress', ({ loaded = 0 }) => onProgress?.(loaded));
  const abort = () => void upload.abort();
  signal?.addEventListener('abort', abort, { once: true });
  try {
    await upload.done();
  } catch (error) {
    if ((error as Error).name !== 'PreconditionFailed') throw error;
    // Somebody else registered it meanwhile.
    await isThere(s3, bucket, key, { path, model, digest });
    return { ...registered, added: false };
  } finally {
    signal?.removeEventListener('abort', abort);
  }
  return { ...registered, added: true };
}

/** Whether the register has the package already. Throws {@link ModelVersionTaken} where it has another one. */
async function isThere(
  s3: S3Client,
  bucket: string,
  key: string,
  { path, model, digest }: { path: string; model: Model; digest: string },
): Promise<boolean> {
  const about = await aboutOf(s3, bucket, key);
  if (!about) return false;
  const there = about.digest ?? (await digestOf(s3, bucket, key));
  if (there === digest) return true;
  throw new ModelVersionTaken(
    `Model ${model.name} ${model.version} is registered with other content (${there.slice(0, 19)}…, ${path} is ${digest.slice(0, 19)}…). ` +
      'A version never changes: raise "version" in its model.json. (ModelVersionTaken)',
    EXIT.usage,
  );
}

async function digestOf(s3: S3Client, bucket: string, key: string): Promise<string> {
  const opened = await openObject(s3, { bucket, key });
  if (!opened) throw new UserError(`${key} is no longer in the register.`);
  return (await readModelPackage(opened.body)).digest;
}

/** Headers are ASCII: a licence in other letters is written as in an address. */
function metadataOf({ license, task, mode }: Model, format: ModelFormat, digest: string) {
  return { digest, license: encodeURI(license).slice(0, LONGEST), task, mode, format };
}

/** The metadata of a registered package; `undefined` where there is none. */
async function aboutOf(s3: S3Client, bucket: string, key: string): Promise<About | undefined> {
  try {
    const { Metadata = {} } = await s3.send(new HeadObjectCommand({ Bucket: bucket, Key: key }));
    const { digest, license, task, mode, format } = Metadata;
    return {
      ...(digest && { digest }),
      ...(license && { license: decoded(license) }),
      ...(task && { task }),
      ...(mode && { mode }),
      ...(format && { format }),
    };
  } catch (error) {
    if (isNotFound(error)) return undefined;
    throw error;
  }
}

function decoded(text: string): string {
  try {
    return decodeURI(text);
  } catch {
    return text;
  }
}

/** All that is registered, or one model's versions: by name, the newest version first. */
export async function listModels(s3: S3Client, bucket: string, name?: string): Promise<RegisteredModel[]> {
  const models: RegisteredModel[] = [];
  await forEachConcurrently(listVersions(s3, bucket, name), 16, async (entry) => {
    const about = await aboutOf(s3, bucket, entry.key);
    if (about) models.push({ ...entry, ...about });
  });
  const collator = new Intl.Collator('en');
  return models.sort((a, b) => collator.compare(a.name, b.name) || compareVersions(b.version, a.version));
}

/** One registered version, the newest where none is named, and its model.json; `undefined` where there is none. */
export async function findModel(
  s3: S3Client,
  bucket: string,
  wanted: string,
): Promise<(RegisteredModel & { model: Model }) | undefined> {
  const [name = '', version] = wanted.split('@');
  const [entry] = (await listModels(s3, bucket, name)).filter(
    (found) => version === undefined || found.version === version,
  );
  if (!entry) return undefined;
  if (entry.digest === undefined) {
    // Uploaded in another way: only the package itself tells.
    const opened = await openObject(s3, { bucket, key: entry.key });
    if (!opened) return undefined;
    const { model, digest, format } = await readModelPackage(opened.body);
    return { ...entry, digest, format, license: model.license, task: model.task, mode: model.mode, model };
  }
  const opened = await openObject(s3, { bucket, key: entry.key });
  const text = opened && (await readDescriptor(opened.body));
  return text === undefined ? undefined : { ...entry, model: parseModel(text) };
}

/**
 * What `--model` means, as the manifest's `model` column says it: a package file is registered, a name is looked up.
 * @throws {UserError}
 */
export async function modelFor(
  s3: S3Client,
  bucket: string,
  given: string,
  options: RegisterOptions = {},
): Promise<string> {
  const about = await stat(given).catch(() => undefined);
  if (about?.isFile()) {
    const { name, version } = await registerModel(s3, bucket, given, options);
    return `${name}@${version}`;
  }
  if (/[/\\]|\.(tar\.gz|tgz)$/.test(given)) throw usageError(`--model: there is no file ${given}.`);
  try {
    await resolveModel(s3, bucket, given, { allowCode: true });
  } catch (error) {
    if (!(error instanceof SlidewayError)) throw error;
    throw usageError(`--model: ${error.message}`, { cause: error });
  }
  return given;
}
