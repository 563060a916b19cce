/** ClaimManifest: one run per manifest version and parameters, however often its event is delivered. */
import { createHash } from 'node:crypto';
import { z } from 'zod';
import type { Parameters, RunContext } from './contracts.ts';
import { ManifestMisplaced } from './errors.ts';
import { canonicalJson, type Lineage } from './lineage.ts';
import type { StateTable } from './state.ts';

/** The part of EventBridge's S3 "Object Created" event that counts. */
export const objectCreatedSchema = z.object({
  detail: z.object({
    bucket: z.object({ name: z.string() }),
    object: z.object({ key: z.string(), etag: z.string(), 'version-id': z.string().optional() }),
  }),
});
export type ObjectCreated = z.infer<typeof objectCreatedSchema>;

export interface ClaimConfig {
  defaultModel: string;
  parameters: Parameters;
  codeVersion: string;
}

/** Folder of the manifest: what a study is called. */
export function studyOf(key: string): string {
  const slash = key.lastIndexOf('/');
  if (slash <= 0) {
    throw new ManifestMisplaced(`${key} lies in no study's folder. Put the manifest at <study>/repo.csv.`);
  }
  return key.slice(0, slash);
}

/** `<study>-<12 hex digits>`, derived from the manifest version and everything else that decides the results. */
export function runIdOf(study: string, manifest: RunContext['manifest'], config: ClaimConfig): string {
  const slug = study
    .normalize('NFKD')
    .replace(/\p{M}/gu, '')
    .toLowerCase()
    .replace(/[^a-z0-9]+/g, '-')
    .slice(0, 30)
    .replace(/^-+|-+$/g, '');
  const { bucket, key, versionId, etag } = manifest;
  const identity = canonicalJson({ bucket, key, version: versionId ?? etag, ...config });
  return `${slug || 'study'}-${createHash('sha256').update(identity).digest('hex').slice(0, 12)}`;
}

export async function claimManifest(
  { event, executionArn, startedAt }: { event: ObjectCreated; executionArn: string; startedAt: string },
  { state, lineage, config }: { state: StateTable; lineage: Lineage; config: ClaimConfig },
): Promise<{ claimed: boolean; run: RunContext }> {
  const { bucket, object } = event.detail;
  const study = studyOf(object.key);
  const manifest = {
    bucket: bucket.name,
    key: object.key,
    ...(object['version-id'] && { versionId: object['version-id'] }),
    etag: object.etag,
  };
  const run: RunContext = {
    runId: runIdOf(study, manifest, config),
    study,
    manifest,
    defaultModel: config.defaultModel,
    parameters: config.parameters,
    startedAt,
  };
  const claimed = await state.claimRun({ ...run, state: 'RUNNING', executionArn });
  if (claimed) {
    await lineage.append(
      { runId: run.runId },
      {
        id: `${run.runId}/claimed`,
        runId: run.runId,
        action: 'RUN_CLAIMED',
        inputs: [
          {
            bucket: manifest.bucket,
            key: manifest.key,
            ...(manifest.versionId && { versionId: manifest.versionId }),
            checksum: `etag:${manifest.etag}`,
          },
        ],
        parameters: { ...config.parameters, defaultModel: config.defaultModel, executionArn },
      },
    );
  }
  return { claimed, run };
}
