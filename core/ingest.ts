/** IngestSlides: one slide from Landing to Bronze, all of its files or none. */
import { createHash } from 'node:crypto';
import { paginateListObjectsV2, type S3Client } from '@aws-sdk/client-s3';
import { forEachConcurrently } from './concurrency.ts';
import type {
  BronzeFile,
  BronzeSlide,
  PlannedSlide,
  RunContext,
  SlideSource,
  SlideState,
} from './contracts.ts';
import { type CopyLimits, type CopySource, copyObject } from './copy.ts';
import { NameTaken, reasonOf, ServiceUnavailable, SlideChanged, SlidewayError, Throttled } from './errors.ts';
import type { Lineage, LineageObject } from './lineage.ts';
import type { StateTable } from './state.ts';

const FILE_CONCURRENCY = 8;

export interface IngestDependencies {
  s3: S3Client;
  state: StateTable;
  lineage: Lineage;
  bronzeBucket: string;
  /** Requests counted so far for this slide. */
  requests(): Record<string, number>;
  limits?: CopyLimits;
}

/** Takes one EXPECTED slide in; every end that is not a matter for a retry is put on record and returned. */
export async function ingestSlide(
  run: RunContext,
  slide: PlannedSlide,
  dependencies: IngestDependencies,
): Promise<{ slideId: string; state: SlideState }> {
  const { state, lineage, requests } = dependencies;
  const { runId } = run;
  const { slideId } = slide;
  if (!slide.source || !slide.target) throw new Error(`${slideId}: the plan's line has no source or target`);
  await state.transition(runId, slideId, 'COPYING', { slide: slide.slide });
  try {
    const { bronze, sources } = await copySlide(run, slide, slide.source, slide.target, dependencies);
    await lineage.append(
      { slideId },
      {
        id: `${runId}/ingested`,
        runId,
        action: 'SLIDE_INGESTED',
        inputs: sources,
        outputs: bronze.files.map((file) => ({ bucket: bronze.bucket, ...lineageOf(file) })),
        parameters: { study: run.study, slide: slide.slide, checksum: bronze.checksum },
      },
    );
    await state.transition(runId, slideId, 'INGESTED', { slide: slide.slide, bronze, requests: requests() });
  } catch (error) {
    if (
      !(error instanceof SlidewayError) ||
      error instanceof Throttled ||
      error instanceof ServiceUnavailable
    ) {
      throw error;
    }
    const reason = reasonOf(error);
    const ended = error instanceof NameTaken || error instanceof SlideChanged ? 'QUARANTINED' : 'FAILED';
    await lineage.append(
      { slideId },
      {
        id: `${runId}/${ended}`,
        runId,
        action: `SLIDE_${ended}`,
        reason: `${reason.error}: ${reason.message}`,
      },
    );
    await state.transition(runId, slideId, ended, { slide: slide.slide, reason, requests: requests() });
  }
  const item = await state.slide(runId, slideId);
  return { slideId, state: item?.state ?? 'COPYING' };
}

const lineageOf = ({ key, versionId, checksum }: BronzeFile) => ({ key, versionId, checksum });

async function copySlide(
  run: RunContext,
  { slideId }: PlannedSlide,
  source: SlideSource,
  target: { prefix: string; name: string },
  { s3, bronzeBucket, limits }: IngestDependencies,
): Promise<{ bronze: BronzeSlide; sources: LineageObject[] }> {
  const planned = await sourceFiles(s3, source);
  const files: BronzeFile[] = new Array(planned.length);
  const sources: LineageObject[] = new Array(planned.length);
  await forEachConcurrently([...planned.entries()], FILE_CONCURRENCY, async ([index, { etag, ...file }]) => {
    const { source: from, ...copied } = await copyObject(
      s3,
      { bucket: source.bucket, key: file.key, etag },
      {
        bucket: bronzeBucket,
        key: target.prefix + bronzeName(source, target.name, file.key),
        tags: { run: run.runId, slide: slideId, study: run.study },
      },
      limits,
    );
    files[index] = copied;
    sources[index] = from;
  });
  const main = files[0];
  if (!main) throw new SlideChanged(`${source.key} has no files any more. Copy it to Landing again.`);
  return {
    sources,
    bronze: {
      bucket: bronzeBucket,
      key: main.key,
      files,
      size: files.reduce((sum, { size }) => sum + size, 0),
      checksum: slideChecksum(files, target.prefix),
    },
  };
}

/** The objects of a slide; the one that is opened comes first. */
async function sourceFiles(s3: S3Client, source: SlideSource): Promise<CopySource[]> {
  const { bucket, key, etag } = source;
  if (!source.folder) return [{ bucket, key, etag }];
  const files: CopySource[] = [];
  for await (const page of paginateListObjectsV2({ client: s3 }, { Bucket: bucket, Prefix: source.folder })) {
    for (const { Key = '', ETag, Size = 0 } of page.Contents ?? []) {
      if (Size > 0 && !Key.endsWith('/')) files.push({ bucket, key: Key, etag: ETag });
    }
  }
  const own = source.kind === 'dicom' ? [] : [{ bucket, key, etag }];
  if (files.length + own.length !== source.files) {
    throw new SlideChanged(
      `${source.key}: ${source.files} files when the run was planned, ${files.length + own.length} now. Drop the manifest again when the upload is complete.`,
    );
  }
  return [...own, ...files];
}

/** A file's name below the slide's prefix in Bronze: companions keep their places beside the renamed file. */
export function bronzeName(source: SlideSource, name: string, key: string): string {
  if (!source.folder || key === source.key) return name;
  const inside = key.slice(source.folder.length);
  const stem = name.replace(/\.[^.]+$/, '');
  if (source.kind === 'mrxs') return `${stem}/${inside}`;
  if (source.kind === 'vsi') return `_${stem}_/${inside}`;
  return `${name}/${inside}`;
}

/** One file's own checksum; of several, SHA-256 over their names and checksums, sorted. */
export function slideChecksum(files: BronzeFile[], prefix: string): string {
  if (files.length === 1 && files[0]) return files[0].checksum;
  const lines = files.map(({ key, checksum }) => `${key.slice(prefix.length)} ${checksum}\n`).sort();
  return `sha256:${createHash('sha256').update(lines.join('')).digest('hex')}`;
}
