/**
 * Runs that come of an earlier run: slides that were late, and replays. There is one way for both: Slideway writes a
 * manifest of its own into Silver, from the lines of the earlier run's plan, and starts the state machine with
 * `{ followUp }` in place of an event. It is claimed as any manifest version is, under the earlier run's parameters,
 * and is a run of its own that names the run it follows.
 */
import { HeadObjectCommand, PutObjectCommand, type S3Client } from '@aws-sdk/client-s3';
import { z } from 'zod';
import { forEachConcurrently } from './concurrency.ts';
import type { BronzeSlide, FollowUpKind, PlannedSlide, RunContext, RunItem, SlideItem } from './contracts.ts';
import { followUpKindSchema, manifestRefSchema } from './contracts.ts';
import { BronzeChanged, FollowUpTaken, isNotFound, RunNotFound } from './errors.ts';
import { followUpKey, slidesKey } from './keys.ts';
import { isProblem, slideRow } from './results.ts';
import type { StateTable } from './state.ts';
import { readLines, sha256 } from './store.ts';

/** What starts a follow-up run: the input of the state machine. */
export const followUpInputSchema = z.object({
  followUp: z.object({
    kind: followUpKindSchema,
    /** runId of the run that is followed. */
    of: z.string(),
    manifest: manifestRefSchema,
  }),
});
export type FollowUpInput = z.infer<typeof followUpInputSchema>;

/** Reasons that lie in a row itself: nothing but another manifest mends it. */
const IN_THE_ROW = new Set(['RowInvalid', 'PathOutsideStudy', 'SlideIdInvalid', 'MppInvalid']);

/** Whether a line can be done again as it stands: repeated lines and rows that are wrong in themselves cannot. */
export const canFollow = ({ state, reason }: PlannedSlide): boolean =>
  state !== 'DUPLICATE' && !IN_THE_ROW.has(reason?.error ?? '');

/** Whether a line of an ended run did not come to its results. */
export const didNotSucceed = (line: PlannedSlide, item: SlideItem | undefined): boolean =>
  isProblem(slideRow(line, item));

/** The text of a manifest of the lines of a plan; `model` is put in place of the models that they asked for. */
export function followUpManifest(lines: readonly PlannedSlide[], model?: string): string {
  const metadata = [...new Set(lines.flatMap((line) => Object.keys(line.metadata)))];
  const rows = lines.map((line) => [
    line.slide,
    line.slideId,
    line.mppSource === 'manifest' ? String(line.mpp) : '',
    model ?? line.wantedModels?.join('|') ?? '',
    ...metadata.map((name) => line.metadata[name] ?? ''),
  ]);
  return [['slide', 'slide_id', 'mpp', 'model', ...metadata], ...rows]
    .map((cells) => `${cells.map(quoted).join(',')}\n`)
    .join('');
}

const quoted = (cell: string) => `"${cell.replaceAll('"', '""')}"`;

/**
 * Writes the manifest of a follow-up run, once: where there is one under that `id` already with the same bytes, it is
 * that one, so that a repeated call gives the same run.
 * @throws {FollowUpTaken} other content stands under the id.
 */
export async function writeFollowUp(
  s3: S3Client,
  silver: string,
  { kind, of, id, manifest }: { kind: FollowUpKind; of: string; id: string; manifest: string },
): Promise<FollowUpInput> {
  const where = { Bucket: silver, Key: followUpKey(of, kind, id) };
  const digest = sha256(manifest);
  const answer = (found: { VersionId?: string | undefined; ETag?: string | undefined }): FollowUpInput => ({
    followUp: {
      kind,
      of,
      manifest: {
        bucket: silver,
        key: where.Key,
        ...(found.VersionId && { versionId: found.VersionId }),
        etag: (found.ETag ?? '').replaceAll('"', ''),
      },
    },
  });
  try {
    return answer(
      await s3.send(
        new PutObjectCommand({
          ...where,
          Body: manifest,
          ContentType: 'text/csv; charset=utf-8',
          Metadata: { sha256: digest },
          IfNoneMatch: '*',
        }),
      ),
    );
  } catch (error) {
    if (!(error instanceof Error) || error.name !== 'PreconditionFailed') throw error;
    const there = await s3.send(new HeadObjectCommand(where));
    if (there.Metadata?.sha256 !== digest)
      throw new FollowUpTaken(`${where.Key} is there already, with other content. Take another id.`);
    return answer(there);
  }
}

/** The run that is followed, from the state table. */
export async function followedRun(state: StateTable, of: string): Promise<RunItem> {
  const run = await state.run(of);
  if (!run) throw new RunNotFound(`There is no run ${of} in the state table to follow.`);
  return run;
}

/** Where a run's slides arrive: of a follow-up, not where its manifest lies. */
export const landingOf = ({ landing, manifest }: Pick<RunContext, 'landing' | 'manifest'>): string =>
  landing ?? manifest.bucket;

/** What the earlier run had of its slides in Bronze, by slide id, and the ETag in Landing that each was planned with. */
export async function takenIn(
  s3: S3Client,
  state: StateTable,
  silver: string,
  of: string,
): Promise<Map<string, TakenIn>> {
  const bronze = new Map<string, BronzeSlide>();
  for await (const item of state.slides(of)) if (item.bronze) bronze.set(item.slideId, item.bronze);
  const taken = new Map<string, TakenIn>();
  for await (const line of readLines<PlannedSlide>(s3, { bucket: silver, key: slidesKey(of) })) {
    const there = bronze.get(line.slideId) ?? line.bronze;
    if (there && line.state !== 'DUPLICATE') {
      taken.set(line.slideId, {
        slide: line.slide,
        bronze: there,
        ...(line.source && { source: line.source }),
      });
    }
  }
  return taken;
}

export type TakenIn = Pick<PlannedSlide, 'slide' | 'source'> & { bronze: BronzeSlide };

/**
 * Makes sure that a slide lies in Bronze as an earlier run took it in, object for object.
 * @throws {BronzeChanged} it does not.
 */
export async function checkTaken(s3: S3Client, { bucket, files }: BronzeSlide): Promise<void> {
  await forEachConcurrently(files, 8, async ({ key, versionId, size, checksum }) => {
    const there = await s3
      .send(
        new HeadObjectCommand({ Bucket: bucket, Key: key, VersionId: versionId, ChecksumMode: 'ENABLED' }),
      )
      .catch((error: unknown) => {
        if (isNotFound(error)) return undefined;
        throw error;
      });
    if (there?.ContentLength !== size || `crc64nvme:${there.ChecksumCRC64NVME}` !== checksum) {
      throw new BronzeChanged(
        `${key} is not in Bronze as it was taken in. Copy the slide to Landing again and drop its manifest.`,
      );
    }
  });
}
