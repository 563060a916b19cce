/**
 * Object Lock: a version that is under retention cannot be deleted, and under COMPLIANCE by nobody. What S3 keeps
 * on disk here is only as safe as the disk; the interface refuses what AWS refuses.
 */
import { S3Error, type S3Request } from './wire.ts';

export const LOCK_MODES = ['GOVERNANCE', 'COMPLIANCE'] as const;
export type LockMode = (typeof LOCK_MODES)[number];

/** Retention of one version. */
export interface Retention {
  mode: LockMode;
  /** Milliseconds since 1970. */
  until: number;
}

/** A bucket with Object Lock, and what its new versions get where the request says nothing. */
export interface BucketLock {
  default?: { mode: LockMode; days: number };
}

const MODE = 'x-amz-object-lock-mode';
const UNTIL = 'x-amz-object-lock-retain-until-date';
const DAY_MS = 24 * 3600 * 1000;

/** The retention that a request asks for. Throws `InvalidRequest`, `InvalidArgument`. */
export function requestedRetention(request: S3Request, lock: BucketLock | undefined): Retention | undefined {
  const [mode, date] = [request.header(MODE), request.header(UNTIL)];
  if (mode === undefined && date === undefined) return undefined;
  if (!lock) throw new S3Error('InvalidRequest', 'Bucket is missing Object Lock Configuration', 400);
  request.caller.authorize('s3:PutObjectRetention', request.objectArn);
  const until = Date.parse(date ?? '');
  const known = LOCK_MODES.find((each) => each === mode);
  if (!known || Number.isNaN(until))
    throw new S3Error(
      'InvalidArgument',
      `${UNTIL} and ${MODE} must both be supplied, the mode one of ${LOCK_MODES}.`,
      400,
    );
  if (until <= Date.now())
    throw new S3Error('InvalidArgument', 'The retain until date must be in the future!', 400);
  return { mode: known, until };
}

/** What a new version of the bucket is under. */
export function retentionOf(
  asked: Retention | undefined,
  lock: BucketLock | undefined,
): Retention | undefined {
  if (asked || !lock?.default) return asked;
  return { mode: lock.default.mode, until: Date.now() + lock.default.days * DAY_MS };
}

/** Throws `AccessDenied` where the version is under retention, unless the caller may and does bypass it. */
export function checkUnlocked(request: S3Request, key: string, retention: Retention | undefined): void {
  if (!retention || retention.until <= Date.now()) return;
  const bypass = request.header('x-amz-bypass-governance-retention')?.toLowerCase() === 'true';
  if (retention.mode === 'GOVERNANCE' && bypass) {
    request.caller.authorize('s3:BypassGovernanceRetention', `arn:aws:s3:::${request.bucket}/${key}`);
    return;
  }
  throw new S3Error('AccessDenied', 'Access Denied because object protected by object lock.', 403);
}

export const retentionHeaders = (retention: Retention | undefined): Record<string, string> =>
  retention ? { [MODE]: retention.mode, [UNTIL]: new Date(retention.until).toISOString() } : {};
