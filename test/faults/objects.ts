/** Every version of every object below a prefix. */
import { ListObjectVersionsCommand, type S3Client } from '@aws-sdk/client-s3';

export interface Version {
  key: string;
  versionId: string;
  etag: string;
  /** It marks a deletion. */
  deleted: boolean;
}

/** Newest first, key by key. */
export async function versionsOf(s3: S3Client, bucket: string, prefix: string): Promise<Version[]> {
  const all: Version[] = [];
  let from: { KeyMarker?: string | undefined; VersionIdMarker?: string | undefined } = {};
  for (;;) {
    const page = await s3.send(new ListObjectVersionsCommand({ Bucket: bucket, Prefix: prefix, ...from }));
    for (const { Key = '', VersionId = '', ETag = '' } of page.Versions ?? [])
      all.push({ key: Key, versionId: VersionId, etag: ETag, deleted: false });
    for (const { Key = '', VersionId = '' } of page.DeleteMarkers ?? [])
      all.push({ key: Key, versionId: VersionId, etag: '', deleted: true });
    if (!page.IsTruncated) return all;
    from = { KeyMarker: page.NextKeyMarker, VersionIdMarker: page.NextVersionIdMarker };
  }
}
