/** What there is of a study, as streams: its runs with their plans, states and results, and its objects. */
import {
  ListObjectVersionsCommand,
  type ListObjectVersionsCommandOutput,
  paginateListObjectsV2,
  type S3Client,
} from '@aws-sdk/client-s3';
import type { PlannedSlide, RunItem } from './contracts.ts';
import { slidesKey, slidesPrefix } from './keys.ts';
import type { Sources, StoredObject } from './reconcile.ts';
import type { StateTable } from './state.ts';
import { readLines } from './store.ts';

export interface StudyDependencies {
  s3: S3Client;
  state: StateTable;
  landingBucket: string;
  bronzeBucket: string;
  silverBucket: string;
}

/** The sources of a study's reconciliation; `runs` are those of all studies, in any order. */
export function sourcesOf(
  study: string,
  runs: RunItem[],
  { s3, state, landingBucket, bronzeBucket, silverBucket }: StudyDependencies,
): Sources {
  const own = runs.filter((run) => run.study === study).sort((a, b) => (a.startedAt < b.startedAt ? -1 : 1));
  async function* ofRuns() {
    for (const run of own) {
      yield {
        run,
        planned: readLines<PlannedSlide>(s3, { bucket: silverBucket, key: slidesKey(run.runId) }),
        items: state.slides(run.runId),
        silver: listed(s3, silverBucket, slidesPrefix(run.runId)),
      };
    }
  }
  return {
    study,
    landingBucket,
    bronzeBucket,
    silverBucket,
    runs: ofRuns(),
    landing: listed(s3, landingBucket, `${study}/`),
    bronze: newestVersions(s3, bronzeBucket, `slides/${study}/`),
    nested: [...new Set(runs.map((run) => `${run.study}/`))].filter(
      (name) => name.startsWith(`${study}/`) && name !== `${study}/`,
    ),
  };
}

async function* listed(s3: S3Client, bucket: string, prefix: string): AsyncGenerator<StoredObject> {
  for await (const page of paginateListObjectsV2({ client: s3 }, { Bucket: bucket, Prefix: prefix })) {
    for (const { Key: key = '', Size: size = 0, ETag: etag } of page.Contents ?? []) {
      yield { key, size, ...(etag && { etag }) };
    }
  }
}

async function* newestVersions(s3: S3Client, bucket: string, prefix: string): AsyncGenerator<StoredObject> {
  let page: ListObjectVersionsCommandOutput | undefined;
  do {
    page = await s3.send(
      new ListObjectVersionsCommand({
        Bucket: bucket,
        Prefix: prefix,
        KeyMarker: page?.NextKeyMarker,
        VersionIdMarker: page?.NextVersionIdMarker,
      }),
    );
    for (const {
      Key: key = '',
      Size: size = 0,
      ETag: etag,
      VersionId: versionId,
      IsLatest,
    } of page.Versions ?? []) {
      if (IsLatest) yield { key, size, ...(etag && { etag }), ...(versionId && { versionId }) };
    }
  } while (page.IsTruncated);
}
