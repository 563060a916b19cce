/**
 * Lifecycle rules: what has outlived its days goes. As in S3, the current version of a versioned bucket gets a delete
 * marker, goes for good once it has been noncurrent for so long, and the marker goes when it hides nothing more. What
 * came due while no engine ran counts from when it did. Days are counted from the very time, not from midnight.
 */
import type { Multipart } from './multipart.ts';
import type { Objects } from './objects.ts';
import { isMarker, newVersionId, type Store, type Tag, type Version } from './store.ts';
import { S3Error } from './wire.ts';

const DAY_MS = 24 * 3600 * 1000;

export interface LifecycleRule {
  id: string;
  prefix: string;
  /** Objects must have all of them. */
  tags: Tag[];
  /** After so many days the current version expires. */
  days?: number | undefined;
  /** A version may be noncurrent for so many days. */
  noncurrentDays?: number | undefined;
  /** An upload may be unfinished for so many days. */
  uploadDays?: number | undefined;
}

/** What a rule let go. */
export interface Expired {
  bucket: string;
  rule: string;
  /** Objects that were current. */
  objects: number;
  /** Versions that are gone for good, and their bytes. */
  versions: number;
  bytes: number;
  /** Delete markers that hid nothing more. */
  markers: number;
  uploads: number;
}

export class Lifecycle {
  readonly #store: Store;
  readonly #objects: Objects;
  readonly #multipart: Multipart;

  constructor(store: Store, objects: Objects, multipart: Multipart) {
    this.#store = store;
    this.#objects = objects;
    this.#multipart = multipart;
  }

  /** Ends early, and well, when `signal` says so. */
  async apply(bucket: string, rule: LifecycleRule, now: number, signal: AbortSignal): Promise<Expired> {
    const expired: Expired = {
      bucket,
      rule: rule.id,
      objects: 0,
      versions: 0,
      bytes: 0,
      markers: 0,
      uploads: 0,
    };
    const cursor = this.#store.objects(bucket, rule.prefix, Buffer.alloc(0));
    try {
      for (let entry = await cursor.next(); entry && !signal.aborted; entry = await cursor.next()) {
        const { key, versions } = entry;
        if (this.#remaining(bucket, versions, rule, now) !== versions)
          await this.#expire(bucket, key, rule, now, expired);
      }
    } finally {
      await cursor.close();
    }
    const { uploadDays } = rule;
    if (uploadDays === undefined) return expired;
    for await (const upload of this.#store.uploads(bucket, rule.prefix)) {
      if (signal.aborted) break;
      if (!isDue(upload.initiated, uploadDays, now)) continue;
      try {
        await this.#multipart.expire(upload);
        expired.uploads += 1;
      } catch (error) {
        // Completed or aborted just now.
        if (!(error instanceof S3Error && error.code === 'NoSuchUpload')) throw error;
      }
    }
    return expired;
  }

  async #expire(
    bucket: string,
    key: string,
    rule: LifecycleRule,
    now: number,
    expired: Expired,
  ): Promise<void> {
    await this.#store.alone(`${bucket}/${key}`, async () => {
      // It may have changed since it was listed.
      const versions = await this.#store.versions(bucket, key);
      const kept = this.#remaining(bucket, versions, rule, now);
      if (kept === versions) return;
      const dropped = versions.filter((version) => !kept.includes(version));
      await this.#objects.replace(bucket, key, kept, dropped);
      const [before] = versions;
      if (before && !isMarker(before) && kept[0] !== before) expired.objects += 1;
      for (const version of dropped) {
        if (isMarker(version)) expired.markers += 1;
        else {
          expired.versions += 1;
          expired.bytes += version.size;
        }
      }
    });
  }

  /** What is left of a key's versions; the very same where nothing is due. */
  #remaining(bucket: string, versions: Version[], rule: LifecycleRule, now: number): Version[] {
    const kept = versions.filter((version, index) => {
      // Noncurrent since the next newer one came.
      const since = versions[index - 1]?.modified;
      return since === undefined || !isOf(version, rule) || !isDue(since, rule.noncurrentDays, now, version);
    });
    const [current] = kept;
    if (current && isOf(current, rule) && isDue(current.modified, rule.days, now)) {
      const { versioning } = this.#store.bucket(bucket);
      if (isMarker(current)) return kept.length === 1 ? [] : same(kept, versions);
      if (!versioning) return [];
      const id = versioning === 'Enabled' ? newVersionId() : 'null';
      const marker: Version = { id, modified: current.modified + (rule.days ?? 0) * DAY_MS, deleted: true };
      return this.#remaining(bucket, [marker, ...kept.filter((version) => version.id !== id)], rule, now);
    }
    return same(kept, versions);
  }
}

const same = (kept: Version[], versions: Version[]) => (kept.length === versions.length ? versions : kept);

/** Whether a rule is about a version; markers have no tags. */
const isOf = (version: Version, { tags }: LifecycleRule) =>
  tags.every(
    ([key, value]) => !isMarker(version) && version.tags.some(([own, its]) => own === key && its === value),
  );

/** A version under retention is never due. */
function isDue(since: number, days: number | undefined, now: number, version?: Version): boolean {
  if (days === undefined || now - since < days * DAY_MS) return false;
  return !version || isMarker(version) || (version.retention?.until ?? 0) <= now;
}
