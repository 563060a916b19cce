/** RecordJob and FailSlide: how things ended that the functions themselves did not see. */
import type { InferenceJob, JobItem, Reason, RunContext, SlideItem } from './contracts.ts';
import type { Lineage } from './lineage.ts';
import { isFinal, type StateTable } from './state.ts';

export interface JobOutcome {
  run: RunContext;
  job: InferenceJob;
  attempt: number;
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

/** Puts the end of an inference job on record: its state, why, and the instance seconds it took. */
export async function recordJob(
  { run, job, attempt, done, failure }: JobOutcome,
  { state, lineage }: { state: StateTable; lineage: Lineage },
): Promise<Pick<JobItem, 'jobName' | 'state' | 'instanceSeconds'>> {
  const description = failure ? parseCause(failure.cause) : {};
  const start = done?.startTime ?? description.ProcessingStartTime;
  const end = done?.endTime ?? description.ProcessingEndTime;
  const jobName = `${job.jobName}-${attempt}`;
  const imageUri = done?.imageUri ?? imageOf(description);
  const roleArn = done?.roleArn ?? description.RoleArn;
  const endedAt = isoTime(end);
  const item: JobItem = {
    jobName,
    model: job.model,
    version: job.version,
    state: failure ? 'FAILED' : 'SUCCEEDED',
    ...(failure && { reason: jobReason(failure, description) }),
    instanceType: job.instanceType,
    instanceCount: job.instanceCount,
    instanceSeconds:
      Math.round((secondsBetween(start, end) * job.instanceCount + Number.EPSILON) * 1000) / 1000,
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
        model: job.model,
        version: job.version,
        modelDigest: job.modelDigest,
        modelUri: job.modelUri,
        shardsUri: job.shardsUri,
        imageUri,
        imageDigest: imageDigest(imageUri),
        roleArn,
        instanceType: job.instanceType,
        instanceCount: job.instanceCount,
        startedAt: isoTime(start),
        endedAt,
      },
    },
  );
  return { jobName, state: item.state, instanceSeconds: item.instanceSeconds };
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

function jobReason(
  { error, cause }: { error: string; cause: string },
  description: Record<string, unknown>,
): Reason {
  const message = causeMessage(cause);
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
  return { error: 'JobFailed', message };
}

/** Step Functions gives SageMaker's times in milliseconds since 1970. */
function secondsBetween(start: unknown, end: unknown): number {
  const seconds =
    (new Date(end as string | number).getTime() - new Date(start as string | number).getTime()) / 1000;
  return start !== undefined && end !== undefined && seconds > 0 ? seconds : 0;
}
