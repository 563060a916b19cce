/**
 * ClaimManifest: one run per manifest version and parameters, however often its event is delivered. What starts a run
 * is a manifest's arrival in Landing, or a follow-up of an earlier run (follow-up.ts).
 */
import { createHash } from 'node:crypto';
import { z } from 'zod';
import type { Parameters, RunContext } from './contracts.ts';
import { ManifestMisplaced } from './errors.ts';
import { type FollowUpInput, followedRun, followUpInputSchema, landingOf } from './follow-up.ts';
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

/** The input of the state machine. */
export const runInputSchema = z.union([objectCreatedSchema, followUpInputSchema]);
export type RunInput = z.infer<typeof runInputSchema>;

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
  { event, executionArn, startedAt }: { event: RunInput; executionArn: string; startedAt: string },
  { state, lineage, config }: { state: StateTable; lineage: Lineage; config: ClaimConfig },
): Promise<{ claimed: boolean; run: RunContext }> {
  const asked = 'followUp' in event ? await following(event, state) : arrived(event, config);
  const { manifest, followUp, defaultModel, parameters } = asked;
  const { codeVersion } = config;
  const run: RunContext = {
    ...asked,
    runId: runIdOf(asked.study, manifest, { defaultModel, parameters, codeVersion }),
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
        parameters: { ...parameters, defaultModel, executionArn, ...(followUp && { followUp }) },
      },
    );
    if (followUp) {
      await lineage.append(
        { runId: followUp.of },
        {
          id: `${followUp.of}/followed/${run.runId}`,
          runId: followUp.of,
          action: 'RUN_FOLLOWED',
          parameters: { kind: followUp.kind, by: run.runId },
        },
      );
    }
  }
  return { claimed, run };
}

type Asked = Omit<RunContext, 'runId' | 'startedAt'>;

function arrived({ detail: { bucket, object } }: ObjectCreated, config: ClaimConfig): Asked {
  return {
    study: studyOf(object.key),
    manifest: {
      bucket: bucket.name,
      key: object.key,
      ...(object['version-id'] && { versionId: object['version-id'] }),
      etag: object.etag,
    },
    defaultModel: config.defaultModel,
    parameters: config.parameters,
  };
}

/** A follow-up is of the study of the run it follows, and has its parameters. */
async function following(
  { followUp: { kind, of, manifest } }: FollowUpInput,
  state: StateTable,
): Promise<Asked> {
  const first = await followedRun(state, of);
  const { study, defaultModel, parameters } = first;
  return { study, manifest, landing: landingOf(first), followUp: { kind, of }, defaultModel, parameters };
}
