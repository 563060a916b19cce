/** What lies in Landing: a study's folder as it was listed, and which of its files are slides. */
import { paginateListObjectsV2, type S3Client } from '@aws-sdk/client-s3';
import type { Reason, SlideSource } from './contracts.ts';

/** Something in Landing; `modified` in milliseconds since 1970. */
export interface LandingObject {
  /** Relative to the study's folder. */
  path: string;
  size: number;
  etag: string;
  modified?: number;
}

/** Bytes of the record of one slide: an item of DynamoDB has 400 KB, and some of it is for the rest. */
const RECORD_BYTES = 350_000;
/** On record of each file, beside its path: buckets, versions, checksums. */
const FILE_BYTES = 160;
/** The slide's id and name in Bronze, as they mostly are. */
const NAME_BYTES = 60;

interface Folder {
  files: number;
  /** Bytes of their paths. */
  names: number;
  size: number;
  dicom: boolean;
  /** When its newest file came. */
  newest: number;
}

/** The objects of a study's folder, by path relative to it, and what its folders hold. */
export class LandingListing {
  readonly bucket: string;
  readonly study: string;
  readonly #objects = new Map<string, { size: number; etag: string }>();
  readonly #folders = new Map<string, Folder>();
  /** A slide of several files must have been quiet since then to count as whole. */
  readonly #quietSince: number;
  #folded: Map<string, string> | undefined;

  constructor(bucket: string, study: string, objects: Iterable<LandingObject>, quietSince = Infinity) {
    this.bucket = bucket;
    this.study = study;
    this.#quietSince = quietSince;
    for (const { path, size, etag, modified = 0 } of objects) {
      if (path.endsWith('/')) continue;
      this.#objects.set(path, { size, etag });
      for (let slash = path.indexOf('/'); slash !== -1; slash = path.indexOf('/', slash + 1)) {
        const name = path.slice(0, slash + 1);
        const folder = this.#folders.get(name) ?? { files: 0, names: 0, size: 0, dicom: false, newest: 0 };
        folder.files += 1;
        folder.names += Buffer.byteLength(path);
        folder.size += size;
        folder.newest = Math.max(folder.newest, modified);
        folder.dicom ||= /\.dcm$/i.test(path);
        this.#folders.set(name, folder);
      }
    }
  }

  /** `quietMs`: a slide of several files whose newest is younger is still arriving; 0 takes it as it is. */
  static async read(s3: S3Client, bucket: string, study: string, quietMs = 0): Promise<LandingListing> {
    const prefix = `${study}/`;
    const objects: LandingObject[] = [];
    for await (const page of paginateListObjectsV2({ client: s3 }, { Bucket: bucket, Prefix: prefix })) {
      for (const { Key = '', Size = 0, ETag = '', LastModified } of page.Contents ?? []) {
        objects.push({
          path: Key.slice(prefix.length),
          size: Size,
          etag: ETag,
          modified: LastModified?.getTime() ?? 0,
        });
      }
    }
    return new LandingListing(bucket, study, objects, quietMs > 0 ? Date.now() - quietMs : undefined);
  }

  /** The slide at a path: its source, or the reason why it is not one. */
  find(path: string): SlideSource | { state: 'MISSING' | 'QUARANTINED'; reason: Reason } {
    const object = this.#objects.get(path);
    if (!object) return this.#findFolder(path);
    const { bucket } = this;
    const key = `${this.study}/${path}`;
    if (object.size === 0) {
      return quarantine('SlideEmpty', `${path} has no bytes. Copy it again from the scanner's drive.`);
    }
    const companion = companionFolder(path);
    if (!companion) return { bucket, kind: 'file', key, files: 1, size: object.size, etag: object.etag };
    const folder = this.#folders.get(companion.folder);
    if (!folder) {
      return missing(
        'SlideIncomplete',
        `${path} needs its folder ${companion.folder} beside it, which is not in Landing.`,
      );
    }
    if (folder.newest > this.#quietSince) return stillArriving(path);
    if (this.#isTooMuch(folder)) return tooMany(path, folder.files + 1);
    return {
      bucket,
      kind: companion.kind,
      key,
      folder: `${this.study}/${companion.folder}`,
      files: folder.files + 1,
      size: folder.size + object.size,
      etag: object.etag,
    };
  }

  #findFolder(path: string): ReturnType<LandingListing['find']> {
    const folder = this.#folders.get(`${path}/`);
    if (folder?.dicom) {
      if (folder.newest > this.#quietSince) return stillArriving(path);
      if (this.#isTooMuch(folder)) return tooMany(path, folder.files);
      const key = `${this.study}/${path}/`;
      return { bucket: this.bucket, kind: 'dicom', key, folder: key, files: folder.files, size: folder.size };
    }
    if (folder)
      return quarantine(
        'SlideNotRecognised',
        `${path} is a folder, but not of DICOM files (.dcm). Name the slide's file.`,
      );
    const like = this.#likeNamed(path);
    return missing(
      'SlideMissing',
      like
        ? `${path} is not in Landing, but ${like} is. Correct the name in the manifest.`
        : `${path} is not in Landing under ${this.study}/. Check the name, or copy the slide there.`,
    );
  }

  /** Whether a slide's files, each as it lies in Landing and in Bronze, are too many for one record. */
  #isTooMuch({ files, names }: Folder): boolean {
    const folders = 2 * Buffer.byteLength(this.study) + NAME_BYTES;
    return 2 * (names + files * (folders + FILE_BYTES)) > RECORD_BYTES;
  }

  /** A path that differs in letter case or in the way its accents are encoded only. */
  #likeNamed(path: string): string | undefined {
    const fold = (text: string) => text.normalize('NFC').toLowerCase();
    this.#folded ??= new Map([...this.#objects.keys()].map((name) => [fold(name), name]));
    return this.#folded.get(fold(path));
  }
}

const missing = (error: string, message: string) => ({
  state: 'MISSING' as const,
  reason: { error, message },
});

const stillArriving = (path: string) =>
  missing('SlideArriving', `${path} has files that came only just now; it is taken in when no more come.`);

const tooMany = (path: string, files: number) =>
  quarantine(
    'SlideTooManyFiles',
    `${path} has ${files} files, more than the record of one slide holds (about 500). Convert it to one file, or leave out of its folder what is not the slide.`,
  );

const quarantine = (error: string, message: string) => ({
  state: 'QUARANTINED' as const,
  reason: { error, message },
});

/** The folder that belongs to a file of a format of several files. */
function companionFolder(path: string): { kind: 'mrxs' | 'vsi'; folder: string } | undefined {
  const [, parent = '', name = '', extension = ''] = /^(.*\/)?([^/]*)\.(mrxs|vsi)$/i.exec(path) ?? [];
  if (/mrxs/i.test(extension)) return { kind: 'mrxs', folder: `${parent}${name}/` };
  if (/vsi/i.test(extension)) return { kind: 'vsi', folder: `${parent}_${name}_/` };
  return undefined;
}
