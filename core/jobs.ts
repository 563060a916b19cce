/** RecordJob and FailSlide: how things ended that the functions themselves did not see. */
import type { InferenceJob, JobItem, JobKind, Reason, RunContext, SlideItem } from './contracts.ts';
import type { Lineage } from './lineage.ts';
import { isFinal, type StateTable } from './state.ts';

export interface JobOutcome {
  run: RunContext;
  job: InferenceJob;
  kind: JobKind;
  /** Of this kind, from 1. */
  attempt: number;
  /** A Transform job as it was planned: machines, the packs it was given, fruitless jobs before it. */
  transform?:
    | {
        instanceType?: string | undefined;
        instanceCount?: number | undefined;
        packs?: number | undefined;
        fruitless?: number | undefined;
      }
    | undefined;
  done?:
    | {
        jobName: string;
        startTime: string | number;
        endTime: string | number;
        imageUri?: string | undefined;
        roleArn?: string | undefined;
      }
    | undefined;
  failure?: { error: string; cause: string } | undefined;
}

export interface RecordDependencies {
  state: StateTable;
  lineage: Lineage;
  /** What SageMaker says of a job; undefined where there is none of that name. */
  describe(kind: JobKind, jobName: string): Promise<object | undefined>;
}

/** Puts the end of a run's job on record: its state, why, and the instance seconds it took. */
export async function recordJob(
  { run, job, kind, attempt, transform, done, failure }: JobOutcome,
  { state, lineage, describe }: RecordDependencies,
): Promise<Pick<JobItem, 'jobName' | 'state' | 'instanceSeconds'>> {
  const jobName = jobNameFor(job, kind, attempt);
  const told = failure ? parseCause(failure.cause) : {};
  // A time-out, for one, says nothing of the job that it gave up.
  const isTold = !failure || startOf(told) !== undefined;
  const description = isTold ? told : { ...told, ...(await describe(kind, jobName)) };
  const start = done?.startTime ?? startOf(description);
  // A job that has no end yet is being stopped.
  const end = done?.endTime ?? endOf(description) ?? (start === undefined ? undefined : Date.now());
  const { instanceType, instanceCount } = instancesOf(job, kind, transform);
  const imageUri = done?.imageUri ?? imageOf(description);
  const roleArn = done?.roleArn ?? description.RoleArn;
  const endedAt = isoTime(end);
  const packs = kind === 'transform' && { packs: transform?.packs, fruitless: transform?.fruitless };
  const item: JobItem = {
    jobName,
    kind,
    model: job.model,
    version: job.version,
    state: failure ? 'FAILED' : 'SUCCEEDED',
    ...(failure && { reason: jobReason(kind, failure, description) }),
    ...packs,
    instanceType,
    instanceCount,
    instanceSeconds: Math.round((secondsBetween(start, end) * instanceCount + Number.EPSILON) * 1000) / 1000,
    ...(endedAt && { endedAt }),
  };
  await state.putJob(run.runId, item);
  await lineage.append(
    { runId: run.runId },
    {
      id: `${run.runId}/job/${jobName}`,
      runId: run.runId,
      action: `JOB_${item.state}`,
      ...(item.reason && { reason: `${item.reason.error}: ${item.reason.message}` }),
      parameters: {
        jobName,
        kind,
        model: job.model,
        version: job.version,
        modelDigest: job.modelDigest,
        modelUri: job.modelUri,
        shardsUri: job.shardsUri,
        imageUri,
        imageDigest: imageDigest(imageUri),
        roleArn,
        ...packs,
        instanceType,
        instanceCount,
        startedAt: isoTime(start),
        endedAt,
      },
    },
  );
  return { jobName, state: item.state, instanceSeconds: item.instanceSeconds };
}

const startOf = ({ ProcessingStartTime, TransformStartTime }: Record<string, unknown>) =>
  ProcessingStartTime ?? TransformStartTime;
const endOf = ({ ProcessingEndTime, TransformEndTime }: Record<string, unknown>) =>
  ProcessingEndTime ?? TransformEndTime;

/** What SageMaker knows the job by; as the state machine puts it together. */
export const jobNameFor = ({ jobName }: InferenceJob, kind: JobKind, attempt: number): string =>
  kind === 'process' ? `${jobName}-${attempt}` : `${jobName}-${kind}-${attempt}`;

/** The machines of that kind of job. */
function instancesOf(
  job: InferenceJob,
  kind: JobKind,
  transform: JobOutcome['transform'],
): { instanceType: string; instanceCount: number } {
  if (kind === 'join' && job.join) return job.join;
  if (kind !== 'transform') return job;
  const instanceType = transform?.instanceType ?? job.transform?.instanceType ?? job.instanceType;
  return { instanceType, instanceCount: transform?.instanceCount ?? 0 };
}

export interface SlideFailure {
  run: RunContext;
  slideId: string;
  slide: string;
  stage: string;
  error: string;
  cause: string;
}

/** Ends a slide FAILED that no function could end itself: a time-out, a crash, an error nobody foresaw. */
export async function failSlide(
  { run, slideId, slide, stage, error, cause }: SlideFailure,
  deps: { state: StateTable; lineage: Lineage },
): Promise<{ slideId: string }> {
  const item = await deps.state.slide(run.runId, slideId);
  // Its last invocation did its work, and was ended before it could say so.
  if (stage === 'IngestSlides' && item?.state === 'INGESTED') return { slideId };
  const reason: Reason = { error, message: `${stage}: ${causeMessage(cause)}` };
  await endFailed({ runId: run.runId, slideId, slide, stage, reason, item }, deps);
  return { slideId };
}

/** Ends a slide FAILED, on record first; one that has ended stays as it ended. Answers how it stands. */
export async function endFailed(
  {
    runId,
    slideId,
    slide,
    stage,
    reason,
    item,
  }: Pick<SlideFailure, 'slideId' | 'slide' | 'stage'> & {
    runId: string;
    reason: Reason;
    /** As it stood just now. */
    item: Pick<SlideItem, 'state'> | undefined;
  },
  { state, lineage }: { state: StateTable; lineage: Lineage },
): Promise<SlideItem | undefined> {
  if (!item || !isFinal(item.state)) {
    await lineage.append(
      { slideId },
      {
        id: `${runId}/failed/${stage}`,
        runId,
        action: 'SLIDE_FAILED',
        reason: `${reason.error}: ${reason.message}`,
      },
    );
    await state.transition(runId, slideId, 'FAILED', { slide, reason });
  }
  return state.slide(runId, slideId);
}

/** What a Lambda error or a failed job says in a state machine's `Cause`, in one line of at most 500 characters. */
export function causeMessage(cause: string): string {
  const { errorMessage, ExitMessage, FailureReason } = parseCause(cause);
  const message = [errorMessage, ExitMessage, FailureReason].find(
    (text) => typeof text === 'string' && text !== '',
  );
  return (typeof message === 'string' ? message : cause || 'no further reason was given')
    .replace(/\s+/g, ' ')
    .slice(0, 500);
}

function parseCause(cause: string): Record<string, unknown> {
  try {
    const value: unknown = JSON.parse(cause);
    return value !== null && typeof value === 'object' ? (value as Record<string, unknown>) : {};
  } catch {
    return {};
  }
}

/** The image that a job's description names. */
function imageOf({ AppSpecification: app }: Record<string, unknown>): string | undefined {
  const uri = app !== null && typeof app === 'object' ? (app as Record<string, unknown>).ImageUri : undefined;
  return typeof uri === 'string' ? uri : undefined;
}

/** The digest of an image that is named by it; SageMaker tells of no other. */
const imageDigest = (uri: string | undefined): string | undefined =>
  /@(sha256:[0-9a-f]{64})$/.exec(uri ?? '')?.[1];

const isoTime = (time: unknown): string | undefined => {
  const date = new Date(time as string | number);
  return time === undefined || Number.isNaN(date.getTime()) ? undefined : date.toISOString();
};

/** What a job of that kind failed with, where nothing more particular is known. */
const FAILED: Record<JobKind, string> = {
  process: 'JobFailed',
  tile: 'TilingFailed',
  transform: 'TransformFailed',
  join: 'JoinFailed',
};

/** Errors of the steps around the jobs, which say more than that a job failed. */
const OWN = new Set(['ModelCreationFailed', 'ModelDigestMismatch', 'PackTooLarge']);

function jobReason(
  kind: JobKind,
  { error, cause }: { error: string; cause: string },
  description: Record<string, unknown>,
): Reason {
  const message = causeMessage(cause);
  if (OWN.has(error)) return { error, message };
  if (error === 'SageMaker.ResourceLimitExceededException') {
    return {
      error: 'JobQuota',
      message: `${message} Ask for a higher quota of this instance type, or lower maxInstances.`,
    };
  }
  if (String(description.FailureReason ?? '').includes('CapacityError')) {
    return {
      error: 'JobCapacity',
      message: `${message} No instance was free for long; try another instance type.`,
    };
  }
  if (error === 'States.Timeout') return { error: 'JobTimedOut', message };
  return { error: FAILED[kind], message };
}

/** Step Functions gives SageMaker's times in milliseconds since 1970. */
function secondsBetween(start: unknown, end: unknown): number {
  const seconds =
    (new Date(end as string | number).getTime() - new Date(start as string | number).getTime()) / 1000;
  return start !== undefined && end !== undefined && seconds > 0 ? seconds : 0;
}
