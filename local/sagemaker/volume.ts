/**
 * The instance's volume, /opt/ml: what SageMaker puts there before the container starts, and what it takes away
 * afterwards. S3 is reached with the job role's credentials, as in the service.
 */
import { createReadStream, createWriteStream } from 'node:fs';
import { mkdir, open, readdir, rename, rm, writeFile } from 'node:fs/promises';
import { dirname, join, relative, sep } from 'node:path';
import type { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { createGunzip } from 'node:zlib';
import { GetObjectCommand, paginateListObjectsV2, type S3Client } from '@aws-sdk/client-s3';
import { Upload } from '@aws-sdk/lib-storage';
import { extract } from 'tar-stream';
import type { ProcessingJobRequest, S3Input } from './requests.ts';

const OPT_ML = '/opt/ml/';
const PARALLEL = 4;
const EXIT_MESSAGE_BYTES = 1024;

/** What SageMaker blames on the caller: data that is not there or not readable. */
export class ClientError extends Error {
  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = 'ClientError';
  }
}

/** Where a path of the container lies on this machine. */
const onMachine = (folder: string, path: string) => join(folder, path.slice(OPT_ML.length));

export function splitUri(uri: string): { bucket: string; key: string } {
  const [, bucket = '', key = ''] = /^(?:s3|https):\/\/([^/]+)\/?(.*)$/s.exec(uri) ?? [];
  return { bucket, key };
}

async function inParallel<T>(items: T[], work: (item: T) => Promise<void>): Promise<void> {
  const queue = items.values();
  await Promise.all(
    Array.from({ length: PARALLEL }, async () => {
      for (const item of queue) await work(item);
    }),
  );
}

/** An object that a job is given. */
export interface Download {
  bucket: string;
  key: string;
  /** Relative to the prefix that the input names, or that its manifest names. */
  name: string;
}

/** An object's name below its prefix: what follows the prefix's folder. */
function nameBelow(prefix: string, key: string): string {
  if (key.startsWith(`${prefix}/`)) return key.slice(prefix.length + 1);
  return key.slice(prefix.lastIndexOf('/') + 1);
}

export async function underPrefix(s3: S3Client, uri: string, signal: AbortSignal): Promise<Download[]> {
  const { bucket, key: prefix } = splitUri(uri);
  const found: Download[] = [];
  // Folder markers hold nothing.
  for await (const page of paginateListObjectsV2(
    { client: s3 },
    { Bucket: bucket, Prefix: prefix },
    { abortSignal: signal },
  ))
    for (const { Key: key = '' } of page.Contents ?? [])
      if (!key.endsWith('/')) found.push({ bucket, key, name: nameBelow(prefix, key) });
  if (found.length === 0) throw new ClientError(`No S3 objects found under S3 URL "${uri}".`);
  return found;
}

export async function inManifest(s3: S3Client, uri: string, signal: AbortSignal): Promise<Download[]> {
  const { bucket, key } = splitUri(uri);
  const { Body } = await s3.send(new GetObjectCommand({ Bucket: bucket, Key: key }), { abortSignal: signal });
  const malformed = new ClientError(
    `The manifest "${uri}" is not a JSON array of {"prefix": "s3://…"} and names below it.`,
  );
  let parsed: unknown;
  try {
    parsed = JSON.parse((await Body?.transformToString()) ?? '');
  } catch {
    throw malformed;
  }
  if (!Array.isArray(parsed)) throw malformed;
  const [head, ...names] = parsed as [{ prefix?: unknown } | undefined, ...unknown[]];
  if (typeof head?.prefix !== 'string') throw malformed;
  const base = splitUri(head.prefix);
  return names.map((name) => {
    if (typeof name !== 'string') throw malformed;
    return { bucket: base.bucket, key: base.key + name, name };
  });
}

async function download(s3: S3Client, item: Download, folder: string, signal: AbortSignal): Promise<void> {
  const path = join(folder, item.name);
  if (relative(folder, path).startsWith('..'))
    throw new ClientError(`The key "${item.key}" would leave the input's folder.`);
  await mkdir(dirname(path), { recursive: true });
  const { Body } = await s3.send(new GetObjectCommand({ Bucket: item.bucket, Key: item.key }), {
    abortSignal: signal,
  });
  const part = `${path}.part`;
  await pipeline(Body as Readable, createWriteStream(part), { signal });
  await rename(part, path);
}

async function layOutInput(
  s3: S3Client,
  input: S3Input,
  folder: string,
  share: { index: number; of: number },
  signal: AbortSignal,
): Promise<void> {
  const target = onMachine(folder, input.LocalPath);
  await mkdir(target, { recursive: true });
  const list = input.S3DataType === 'ManifestFile' ? inManifest : underPrefix;
  const items = await list(s3, input.S3Uri, signal);
  items.sort((a, b) => (a.key < b.key ? -1 : 1));
  const mine =
    input.S3DataDistributionType === 'ShardedByS3Key'
      ? items.filter((_, index) => index % share.of === share.index)
      : items;
  await inParallel(mine, (item) => download(s3, item, target, signal));
}

/**
 * Makes `folder` what the container is to find at /opt/ml: configuration, inputs, empty output folders. What an
 * earlier attempt of the container left there stays, so that it can go on. Throws {@link ClientError}.
 */
export async function layOut(
  job: { request: ProcessingJobRequest; arn: string; instances: { host: string }[] },
  host: string,
  folder: string,
  s3: S3Client,
  signal: AbortSignal,
): Promise<void> {
  const { Tags: _tags, ...request } = job.request;
  const hosts = job.instances.map((instance) => instance.host);
  await mkdir(join(folder, 'config'), { recursive: true });
  await mkdir(join(folder, 'output'), { recursive: true });
  // A message of an earlier attempt says nothing of this one.
  await rm(join(folder, 'output', 'message'), { force: true });
  await writeFile(
    join(folder, 'config', 'processingjobconfig.json'),
    JSON.stringify({ ProcessingJobArn: job.arn, ...request }),
  );
  await writeFile(
    join(folder, 'config', 'resourceconfig.json'),
    JSON.stringify({
      current_host: host,
      current_instance_type: request.ProcessingResources.ClusterConfig.InstanceType,
      hosts,
    }),
  );
  for (const { S3Output } of request.ProcessingOutputConfig?.Outputs ?? [])
    await mkdir(onMachine(folder, S3Output.LocalPath), { recursive: true });
  const share = { index: hosts.indexOf(host), of: hosts.length };
  for (const { InputName, S3Input } of request.ProcessingInputs ?? []) {
    try {
      await layOutInput(s3, S3Input, folder, share, signal);
    } catch (error) {
      if (signal.aborted) throw error;
      const { name, message } = error as Error;
      const detail = error instanceof ClientError ? message : `${name}: ${message} (${S3Input.S3Uri})`;
      throw new ClientError(`Failed to download data for the input ${InputName}. ${detail}`, {
        cause: error,
      });
    }
  }
}

/**
 * Makes `folder` what a container that serves finds at /opt/ml: the model package, unpacked in `model/`. Throws
 * {@link ClientError}.
 */
export async function layOutModel(
  uri: string | undefined,
  folder: string,
  s3: S3Client,
  signal: AbortSignal,
): Promise<void> {
  const target = join(folder, 'model');
  await rm(target, { recursive: true, force: true });
  await mkdir(target, { recursive: true });
  if (uri === undefined) return;
  const { bucket, key } = splitUri(uri);
  const unpack = extract();
  unpack.on('entry', ({ name, type }, stream, next) => {
    const path = join(target, name);
    if (type === 'directory') {
      stream.resume();
      stream.on('end', next);
      return;
    }
    const outside = relative(target, path).startsWith('..');
    if (type !== 'file' || outside) {
      // Told to both; the pipeline below throws it.
      stream.on('error', () => undefined);
      unpack.destroy(new Error(outside ? `${name} would leave the folder` : `${name} is no plain file`));
      return;
    }
    mkdir(dirname(path), { recursive: true })
      .then(() => pipeline(stream, createWriteStream(path)))
      .then(() => next(), next);
  });
  try {
    const { Body } = await s3.send(new GetObjectCommand({ Bucket: bucket, Key: key }), {
      abortSignal: signal,
    });
    await pipeline(Body as Readable, createGunzip(), unpack, { signal });
  } catch (error) {
    if (signal.aborted) throw error;
    const { name, message } = error as Error;
    throw new ClientError(`Failed to extract model data archive from URL "${uri}". ${name}: ${message}`, {
      cause: error,
    });
  }
}

/** Uploads every output's files, below their S3 URI; symbolic links are left out. Throws {@link ClientError}. */
export async function uploadOutputs(
  request: ProcessingJobRequest,
  folder: string,
  s3: S3Client,
  signal: AbortSignal,
): Promise<void> {
  const config = request.ProcessingOutputConfig;
  for (const { OutputName, S3Output } of config?.Outputs ?? []) {
    const root = onMachine(folder, S3Output.LocalPath);
    const { bucket, key } = splitUri(S3Output.S3Uri);
    const prefix = key === '' || key.endsWith('/') ? key : `${key}/`;
    try {
      const entries = await readdir(root, { recursive: true, withFileTypes: true });
      const files = entries
        .filter((entry) => entry.isFile())
        .map((entry) => join(entry.parentPath, entry.name));
      await inParallel(files, async (path) => {
        const upload = new Upload({
          client: s3,
          params: {
            Bucket: bucket,
            Key: prefix + relative(root, path).split(sep).join('/'),
            Body: createReadStream(path),
            ...(config?.KmsKeyId && { ServerSideEncryption: 'aws:kms', SSEKMSKeyId: config.KmsKeyId }),
          },
        });
        const abort = () => void upload.abort();
        signal.addEventListener('abort', abort, { once: true });
        await upload.done().finally(() => signal.removeEventListener('abort', abort));
      });
    } catch (error) {
      if (signal.aborted) throw error;
      const { name, message } = error as Error;
      throw new ClientError(
        `Failed to upload the output ${OutputName} to ${S3Output.S3Uri}. ${name}: ${message}`,
        { cause: error },
      );
    }
  }
}

/** What the container wrote to /opt/ml/output/message, the first 1 KB; undefined when nothing. */
export async function exitMessage(folder: string): Promise<string | undefined> {
  let file: Awaited<ReturnType<typeof open>>;
  try {
    file = await open(join(folder, 'output', 'message'));
  } catch {
    return undefined;
  }
  try {
    const { buffer, bytesRead } = await file.read(Buffer.alloc(EXIT_MESSAGE_BYTES), 0, EXIT_MESSAGE_BYTES, 0);
    // In a stream a character that the limit cut in two is held back, not replaced.
    const text = new TextDecoder().decode(buffer.subarray(0, bytesRead), { stream: true }).trim();
    return text === '' ? undefined : text;
  } finally {
    await file.close();
  }
}

/** Removes the inputs, which are copies; what the container made stays for whoever looks into the job. */
export async function dropInputs(request: ProcessingJobRequest, folder: string): Promise<void> {
  for (const { S3Input } of request.ProcessingInputs ?? [])
    await rm(onMachine(folder, S3Input.LocalPath), { recursive: true, force: true });
}
