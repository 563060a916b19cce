/**
 * Brings a study's files to Landing as DataSync would: slides first, the manifest last, only what has changed. An
 * object keeps its file's modification time (as DataSync's `file-mtime`), which with the size says whether the file
 * has changed since.
 */
import { createReadStream, type Stats } from 'node:fs';
import { readdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import {
  GetObjectCommand,
  HeadObjectCommand,
  PutObjectCommand,
  paginateListObjectsV2,
  type S3Client,
} from '@aws-sdk/client-s3';
import { Upload } from '@aws-sdk/lib-storage';
import { forEachConcurrently } from '../core/concurrency.ts';
import { isNotFound } from '../core/errors.ts';
import { parseManifest } from '../core/manifest.ts';

const MTIME = 'file-mtime';
const MANIFEST = 'repo.csv';
const MiB = 2 ** 20;
const PARTS = 9_000;
const FILES_AT_ONCE = 2;

/** A file of the study; `path` is relative to its folder, with forward slashes. */
export interface LocalFile {
  path: string;
  size: number;
  mtimeMs: number;
}

/** Every file below `folder`, hidden ones left out; symbolic links are followed. */
export async function listFiles(folder: string): Promise<LocalFile[]> {
  const files: LocalFile[] = [];
  const identity = ({ dev, ino }: Stats) => `${dev}:${ino}`;
  const walk = async (relative: string, above: string[]): Promise<void> => {
    for (const entry of await readdir(join(folder, relative), { withFileTypes: true })) {
      if (entry.name.startsWith('.')) continue;
      const path = relative === '' ? entry.name : `${relative}/${entry.name}`;
      const about = await stat(join(folder, path)).catch(() => undefined);
      if (about?.isFile()) files.push({ path, size: about.size, mtimeMs: Math.trunc(about.mtimeMs) });
      else if (about?.isDirectory()) {
        const self = identity(about);
        // A link to a folder above would never end.
        if (!above.includes(self)) await walk(path, [...above, self]);
      }
    }
  };
  await walk('', [identity(await stat(folder))]);
  return files.sort((a, b) => (a.path < b.path ? -1 : 1));
}

/**
 * The files that a manifest's rows name: the file itself, what lies in a folder that is named (DICOM), and the
 * companion folders of MRXS and VSI. A name that differs in letter case or in the encoding of its accents counts, so
 * that the plan can say what it should be.
 */
export function filesOf(manifest: Uint8Array, files: LocalFile[]): LocalFile[] {
  const fold = (text: string) => text.normalize('NFC').toLowerCase();
  const names = new Set<string>();
  const folders: string[] = [];
  for (const row of parseManifest(manifest)) {
    if (row.reason) continue;
    const name = fold(row.slide);
    names.add(name);
    folders.push(`${name}/`);
    const [, parent = '', stem = '', extension = ''] = /^(.*\/)?([^/]*)\.(mrxs|vsi)$/.exec(name) ?? [];
    if (extension !== '') folders.push(extension === 'mrxs' ? `${parent}${stem}/` : `${parent}_${stem}_/`);
  }
  const prefixes = new Set(folders);
  return files.filter(({ path }) => {
    const folded = fold(path);
    if (names.has(folded)) return true;
    for (let slash = folded.indexOf('/'); slash !== -1; slash = folded.indexOf('/', slash + 1)) {
      if (prefixes.has(folded.slice(0, slash + 1))) return true;
    }
    return false;
  });
}

/** What stands in Landing for a file. */
export interface LandedFile {
  size: number;
  mtime: string | undefined;
}

/** Files that have to be brought: new ones, and those whose size or time differ from what landed. */
export const changed = (files: LocalFile[], landed: Map<string, LandedFile>): LocalFile[] =>
  files.filter(({ path, size, mtimeMs }) => {
    const there = landed.get(path);
    return !there || there.size !== size || there.mtime !== mtimeOf(mtimeMs);
  });

const mtimeOf = (mtimeMs: number): string => `${mtimeMs}ms`;

export interface Landing {
  s3: S3Client;
  bucket: string;
  study: string;
}

/** What stands in Landing for `files`. */
export async function landedFiles(
  { s3, bucket, study }: Landing,
  files: LocalFile[],
): Promise<Map<string, LandedFile>> {
  const sizes = new Map<string, number>();
  for await (const page of paginateListObjectsV2({ client: s3 }, { Bucket: bucket, Prefix: `${study}/` })) {
    for (const { Key = '', Size = 0 } of page.Contents ?? []) sizes.set(Key.slice(study.length + 1), Size);
  }
  const landed = new Map<string, LandedFile>();
  await forEachConcurrently(
    files.filter(({ path, size }) => sizes.get(path) === size),
    16,
    async ({ path, size }) => {
      const head = await s3.send(new HeadObjectCommand({ Bucket: bucket, Key: `${study}/${path}` }));
      landed.set(path, { size, mtime: head.Metadata?.[MTIME] });
    },
  );
  return landed;
}

export interface UploadProgress {
  files: number;
  bytes: number;
  /** The file that is under way. */
  path: string;
}

/** Uploads files from `folder`, streaming; `onProgress` hears what has been done so far. */
export async function uploadFiles(
  { s3, bucket, study }: Landing,
  folder: string,
  files: LocalFile[],
  options: { signal: AbortSignal; onProgress(progress: UploadProgress): void },
): Promise<void> {
  let done = 0;
  let sent = 0;
  await forEachConcurrently(files, FILES_AT_ONCE, async ({ path, size, mtimeMs }) => {
    options.signal.throwIfAborted();
    let sentOfThis = 0;
    const upload = new Upload({
      client: s3,
      params: {
        Bucket: bucket,
        Key: `${study}/${path}`,
        Body: createReadStream(join(folder, path), { highWaterMark: MiB }),
        Metadata: { [MTIME]: mtimeOf(mtimeMs) },
        // The same however the object was uploaded, so that Bronze can be compared with it.
        ChecksumAlgorithm: 'CRC64NVME',
      },
      partSize: Math.max(16 * MiB, Math.ceil(size / PARTS / MiB) * MiB),
      queueSize: 3,
    });
    upload.on('httpUploadProgress', ({ loaded = 0 }) => {
      sent += loaded - sentOfThis;
      sentOfThis = loaded;
      options.onProgress({ files: done, bytes: sent, path });
    });
    const abort = () => void upload.abort();
    options.signal.addEventListener('abort', abort, { once: true });
    try {
      await upload.done();
    } finally {
      options.signal.removeEventListener('abort', abort);
    }
    done += 1;
    sent += size - sentOfThis;
    options.onProgress({ files: done, bytes: sent, path });
  });
}

/** The manifest in Landing: its bytes and version. */
export async function landedManifest({
  s3,
  bucket,
  study,
}: Landing): Promise<{ bytes: Uint8Array; versionId: string | undefined } | undefined> {
  try {
    const answer = await s3.send(new GetObjectCommand({ Bucket: bucket, Key: `${study}/${MANIFEST}` }));
    const bytes = (await answer.Body?.transformToByteArray()) ?? new Uint8Array();
    return { bytes, versionId: answer.VersionId };
  } catch (error) {
    if (isNotFound(error)) return undefined;
    throw error;
  }
}

/** Drops the manifest into Landing, which starts a run; answers its version. */
export async function uploadManifest(
  { s3, bucket, study }: Landing,
  bytes: Uint8Array,
): Promise<string | undefined> {
  const answer = await s3.send(
    new PutObjectCommand({
      Bucket: bucket,
      Key: `${study}/${MANIFEST}`,
      Body: bytes,
      ContentType: 'text/csv',
      ChecksumAlgorithm: 'CRC64NVME',
    }),
  );
  return answer.VersionId;
}
