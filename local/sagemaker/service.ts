/**
 * SageMaker's Processing jobs on this machine: the service's own protocol and checks, and jobs that really run, in
 * Docker or as processes. Jobs are on disk before they are answered for; after an end of the engine at any moment,
 * `recover()` goes on with them, and no job ever runs twice at once on the same folder.
 */
import { join } from 'node:path';
import { S3Client } from '@aws-sdk/client-s3';
import type { Logs } from '../logs.ts';
import { type Caller, type JsonOperation, type JsonService, LOCAL_REGION, ServiceError } from '../types.ts';
import { type Container, startContainer } from './container.ts';
import {
  DockerExecutor,
  type Executor,
  type Instance,
  ProcessExecutor,
  removeContainer,
} from './executors.ts';
import { endSession } from './processes.ts';
import { type InstanceRecord, type JobRecord, JobRecords, type JobStatus } from './records.ts';
import { checkProcessingJob, processingJobArn, type Tag } from './requests.ts';
import { type ServiceModel, serviceModel } from './service-model.ts';
import { ClientError, dropInputs, exitMessage, hostsOf, layOut, uploadOutputs } from './volume.ts';

export const PROCESSING_LOG_GROUP = '/aws/sagemaker/ProcessingJobs';

const DEFAULT_MAX_RUNTIME_SECONDS = 86_400;
const MAX_FAILURE_REASON = 1024;
const MAX_TAGS = 50;
const PAGE = 100;

/** A fault to act out: at creation (an error's code), or as a job that fails with that reason. */
export type Fault = { createError: string } | { failureReason: string };

export interface SageMakerOptions {
  /** The jobs' own folder. */
  folder: string;
  endpoint(): string;
  credentials(roleArn: string): { accessKeyId: string; secretAccessKey: string };
  logs: Logs;
  /** The folder of an image's Dockerfile and code. Throws {@link ServiceError} when there is no such image. */
  containers: (imageUri: string) => { folder: string };
  /** Interpreter of the container's environment, whose botocore also says what requests must be. */
  python: string;
  executor: 'process' | 'docker' | 'auto';
  /** How many instances run at once; a job of more runs alone. Default 2. */
  maxConcurrentInstances?: number;
  /** Seconds between SIGTERM and SIGKILL. Default 30. */
  stopGraceSeconds?: number;
  /** Whether processes may be given a real /opt/ml, where the machine allows it. Default true. */
  mountNamespace?: boolean;
  /** Faults to act out, for rehearsing what AWS does at its worst. */
  faults?: (jobName: string) => Fault | undefined;
}

/** Why a job is being brought to its end. */
type Ending =
  | { by: 'stop' }
  | { by: 'maxRuntime' }
  | { by: 'failure'; reason: string; exitMessage?: string | undefined }
  | { by: 'close' };

/** A job within this engine, from its turn to its end. */
class Run {
  readonly abort = new AbortController();
  readonly containers: Container[] = [];
  readonly #graceMs: number;
  ending: Ending | undefined;
  #stopped: Promise<unknown> = Promise.resolve();

  constructor(graceMs: number) {
    this.#graceMs = graceMs;
  }

  /** Ends the job. Who comes first says why; only closing, which must not wait, comes over another. */
  end(ending: Ending): Promise<unknown> {
    if (this.ending === undefined || ending.by === 'close') {
      this.ending = ending;
      this.abort.abort();
      const graceMs = ending.by === 'close' ? 0 : this.#graceMs;
      this.#stopped = Promise.all(this.containers.map((container) => container.stop(graceMs)));
    }
    return this.#stopped;
  }
}

interface ListInput {
  CreationTimeAfter?: number;
  CreationTimeBefore?: number;
  LastModifiedTimeAfter?: number;
  LastModifiedTimeBefore?: number;
  NameContains?: string;
  StatusEquals?: JobStatus;
  SortBy?: 'Name' | 'CreationTime' | 'Status';
  SortOrder?: 'Ascending' | 'Descending';
  NextToken?: string;
  MaxResults?: number;
}

export class SageMaker implements JsonService {
  readonly #options: SageMakerOptions;
  readonly #records: JobRecords;
  readonly #process: ProcessExecutor;
  readonly #docker = new DockerExecutor();
  readonly #queue: JobRecord[] = [];
  readonly #runs = new Map<JobRecord, { run: Run; done: Promise<void> }>();
  #closed = false;

  readonly operations: Record<string, JsonOperation> = {
    CreateProcessingJob: (input: unknown, caller: Caller) => this.#create(input, caller),
    DescribeProcessingJob: (input: { ProcessingJobName: string }, caller: Caller) =>
      this.#describe(input, caller),
    ListProcessingJobs: (input: ListInput, caller: Caller) => this.#list(input, caller),
    StopProcessingJob: (input: { ProcessingJobName: string }, caller: Caller) => this.#stop(input, caller),
    AddTags: (input: { ResourceArn: string; Tags: Tag[] }, caller: Caller) => this.#addTags(input, caller),
    ListTags: (input: { ResourceArn: string }, caller: Caller) => this.#listTags(input, caller),
  };

  constructor(options: SageMakerOptions) {
    this.#options = options;
    this.#records = new JobRecords(options.folder);
    this.#process = new ProcessExecutor({
      python: options.python,
      scratch: join(options.folder, '.scratch'),
      mountNamespace: options.mountNamespace ?? true,
    });
  }

  /** Goes on with the jobs that an earlier engine left: what still lives of them is ended first. */
  async recover(): Promise<void> {
    const unfinished = this.#records
      .all()
      .filter((job) => job.status === 'InProgress' || job.status === 'Stopping')
      .sort((a, b) => a.creationTime - b.creationTime);
    for (const job of unfinished) {
      for (const instance of job.instances) await this.#endLeftover(instance);
      if (job.status === 'Stopping') await this.#finish(job, { status: 'Stopped' });
      else this.#queue.push(job);
    }
    this.#next();
  }

  /** Ends what runs, at once; the jobs stay in progress for the next engine's `recover()`. */
  async close(): Promise<void> {
    this.#closed = true;
    const runs = [...this.#runs.values()];
    await Promise.all(runs.map(({ run }) => run.end({ by: 'close' })));
    await Promise.all(runs.map(({ done }) => done));
  }

  // --- operations ---------------------------------------------------------------------------------------------

  async #create(input: unknown, caller: Caller) {
    checkProcessingJob(input, await this.#model());
    const { ProcessingJobName: name, RoleArn: role, Tags: tags = [] } = input;
    const arn = processingJobArn(name);
    caller.authorize('sagemaker:CreateProcessingJob', arn);
    if (tags.length > 0) caller.authorize('sagemaker:AddTags', arn);
    caller.authorize('iam:PassRole', role);
    this.#options.containers(input.AppSpecification.ImageUri);
    if (this.#records.get(name))
      throw new ServiceError(
        'ResourceInUse',
        `Job name must be unique within an AWS account and region, and a job with this name already exists (${arn})`,
      );
    const fault = this.#options.faults?.(name);
    if (fault && 'createError' in fault)
      throw new ServiceError(
        fault.createError,
        `The request for ${name} was answered with ${fault.createError}, as a rehearsal.`,
      );
    const now = Date.now() / 1000;
    const job: JobRecord = {
      request: input,
      arn,
      status: 'InProgress',
      creationTime: now,
      lastModifiedTime: now,
      tags,
      instances: hostsOf(input).map((host) => ({ host })),
      ...(fault && { fault: fault.failureReason }),
    };
    this.#records.save(job);
    this.#queue.push(job);
    this.#next();
    return { ProcessingJobArn: arn };
  }

  /** Asked for with each request, so that there is no cost before the first one. */
  #model(): Promise<ServiceModel> {
    return serviceModel(this.#options.python);
  }

  #job(name: string): JobRecord {
    const job = this.#records.get(name);
    if (!job) throw new ServiceError('ResourceNotFound', `Could not find requested job with name: ${name}`);
    return job;
  }

  async #describe(input: { ProcessingJobName: string }, caller: Caller) {
    (await this.#model()).validate('DescribeProcessingJob', input);
    caller.authorize('sagemaker:DescribeProcessingJob', processingJobArn(input.ProcessingJobName));
    const job = this.#job(input.ProcessingJobName);
    const { Tags: _tags, ...request } = job.request;
    return {
      ...request,
      ProcessingInputs: request.ProcessingInputs ?? [],
      StoppingCondition: request.StoppingCondition ?? { MaxRuntimeInSeconds: DEFAULT_MAX_RUNTIME_SECONDS },
      ProcessingJobArn: job.arn,
      ProcessingJobStatus: job.status,
      CreationTime: job.creationTime,
      LastModifiedTime: job.lastModifiedTime,
      ProcessingStartTime: job.startTime,
      ProcessingEndTime: job.endTime,
      FailureReason: job.failureReason,
      ExitMessage: job.exitMessage,
    };
  }

  async #list(input: ListInput, caller: Caller) {
    (await this.#model()).validate('ListProcessingJobs', input);
    caller.authorize('sagemaker:ListProcessingJobs', '*');
    const after = (limit: number | undefined, time: number) => limit === undefined || time > limit;
    const before = (limit: number | undefined, time: number) => limit === undefined || time < limit;
    const from = Number(input.NextToken ?? 0);
    if (!Number.isInteger(from) || from < 0)
      throw new ServiceError('ValidationException', `Value '${input.NextToken}' at 'nextToken' is invalid`);
    const sortKey = (job: JobRecord) => {
      if (input.SortBy === 'Name') return job.request.ProcessingJobName;
      return input.SortBy === 'Status' ? job.status : job.creationTime;
    };
    const jobs = this.#records
      .all()
      .filter(
        (job) =>
          job.request.ProcessingJobName.includes(input.NameContains ?? '') &&
          (input.StatusEquals === undefined || job.status === input.StatusEquals) &&
          after(input.CreationTimeAfter, job.creationTime) &&
          before(input.CreationTimeBefore, job.creationTime) &&
          after(input.LastModifiedTimeAfter, job.lastModifiedTime) &&
          before(input.LastModifiedTimeBefore, job.lastModifiedTime),
      )
      .sort((a, b) => (sortKey(a) < sortKey(b) ? -1 : 1));
    if (input.SortOrder !== 'Ascending') jobs.reverse();
    const to = from + (input.MaxResults ?? PAGE);
    return {
      ProcessingJobSummaries: jobs.slice(from, to).map((job) => ({
        ProcessingJobName: job.request.ProcessingJobName,
        ProcessingJobArn: job.arn,
        CreationTime: job.creationTime,
        LastModifiedTime: job.lastModifiedTime,
        ProcessingEndTime: job.endTime,
        ProcessingJobStatus: job.status,
        FailureReason: job.failureReason,
        ExitMessage: job.exitMessage,
      })),
      NextToken: to < jobs.length ? String(to) : undefined,
    };
  }

  async #stop(input: { ProcessingJobName: string }, caller: Caller) {
    (await this.#model()).validate('StopProcessingJob', input);
    caller.authorize('sagemaker:StopProcessingJob', processingJobArn(input.ProcessingJobName));
    const job = this.#job(input.ProcessingJobName);
    if (job.status === 'Stopping') return {};
    if (job.status !== 'InProgress')
      throw new ServiceError(
        'ValidationException',
        `The request was rejected because the processing job is in status ${job.status}.`,
      );
    job.status = 'Stopping';
    this.#records.save(job);
    const running = this.#runs.get(job);
    if (running) {
      // Answered at once, as in the service; a job that cannot be ended is reported by its run.
      void running.run.end({ by: 'stop' }).catch(() => undefined);
    } else {
      this.#queue.splice(this.#queue.indexOf(job), 1);
      await this.#finish(job, { status: 'Stopped' });
    }
    return {};
  }

  #tagged(arn: string): JobRecord {
    const job = this.#records.all().find((candidate) => candidate.arn === arn);
    if (!job) throw new ServiceError('ValidationException', `Could not find the resource ${arn}`);
    return job;
  }

  async #addTags(input: { ResourceArn: string; Tags: Tag[] }, caller: Caller) {
    (await this.#model()).validate('AddTags', input);
    caller.authorize('sagemaker:AddTags', input.ResourceArn);
    const job = this.#tagged(input.ResourceArn);
    const tags = new Map([...job.tags, ...input.Tags].map((tag) => [tag.Key, tag]));
    if (tags.size > MAX_TAGS)
      throw new ServiceError(
        'ResourceLimitExceeded',
        `A resource has at most ${MAX_TAGS} tags; ${input.ResourceArn} would have ${tags.size}.`,
      );
    job.tags = [...tags.values()];
    this.#records.save(job);
    return { Tags: job.tags };
  }

  async #listTags(input: { ResourceArn: string }, caller: Caller) {
    (await this.#model()).validate('ListTags', input);
    caller.authorize('sagemaker:ListTags', input.ResourceArn);
    return { Tags: this.#tagged(input.ResourceArn).tags };
  }

  // --- running ------------------------------------------------------------------------------------------------

  /** Starts the jobs at the head of the queue, as far as there is room. */
  #next(): void {
    const room = this.#options.maxConcurrentInstances ?? 2;
    for (let job = this.#queue[0]; job && !this.#closed; job = this.#queue[0]) {
      const busy = [...this.#runs.keys()].reduce((sum, running) => sum + running.instances.length, 0);
      if (busy > 0 && busy + job.instances.length > room) return;
      this.#queue.shift();
      this.#start(job);
    }
  }

  #start(job: JobRecord): void {
    const run = new Run((this.#options.stopGraceSeconds ?? 30) * 1000);
    const done = this.#execute(job, run)
      .catch((error: Error) => this.#finish(job, { status: 'Failed', failureReason: blame(error) }))
      .finally(() => {
        this.#runs.delete(job);
        this.#next();
      });
    this.#runs.set(job, { run, done });
  }

  async #execute(job: JobRecord, run: Run): Promise<void> {
    if (job.fault !== undefined) return this.#finish(job, { status: 'Failed', failureReason: job.fault });
    job.startTime ??= Date.now() / 1000;
    this.#records.save(job);
    const { request } = job;
    const limitSeconds = request.StoppingCondition?.MaxRuntimeInSeconds ?? DEFAULT_MAX_RUNTIME_SECONDS;
    // Counted anew after a restart of the engine: the time that it was away is not the job's.
    const timer = setTimeout(
      () => void run.end({ by: 'maxRuntime' }).catch(() => undefined),
      limitSeconds * 1000,
    );
    const s3 = new S3Client({
      region: LOCAL_REGION,
      endpoint: this.#options.endpoint(),
      credentials: this.#options.credentials(request.RoleArn),
      forcePathStyle: true,
    });
    try {
      const executor = await this.#executor(request.AppSpecification.ImageUri);
      await Promise.all(
        job.instances.map((instance) =>
          this.#runInstance(job, instance, run, executor, s3).catch((error: Error) =>
            run.end({ by: 'failure', reason: blame(error) }),
          ),
        ),
      );
      for (const { host } of job.instances) {
        if (run.ending) break;
        await uploadOutputs(request, this.#records.instanceFolder(job, host), s3, run.abort.signal);
      }
    } catch (error) {
      // What was broken off because the job is ending already has nothing of its own to say.
      run.ending ??= { by: 'failure', reason: blame(error as Error) };
    } finally {
      clearTimeout(timer);
      s3.destroy();
    }
    await this.#conclude(job, run.ending, limitSeconds);
  }

  async #conclude(job: JobRecord, ending: Ending | undefined, limitSeconds: number): Promise<void> {
    switch (ending?.by) {
      case 'close':
        return;
      case 'stop':
        return this.#finish(job, { status: 'Stopped' });
      case 'maxRuntime':
        return this.#finish(job, {
          status: 'Stopped',
          failureReason: `ClientError: The job ran longer than its MaxRuntimeInSeconds (${limitSeconds}) and was stopped.`,
        });
      case 'failure':
        return this.#finish(job, {
          status: 'Failed',
          failureReason: ending.reason,
          exitMessage: ending.exitMessage,
        });
      default:
        return this.#finish(job, { status: 'Completed', exitMessage: await this.#firstMessage(job) });
    }
  }

  async #firstMessage(job: JobRecord): Promise<string | undefined> {
    for (const { host } of job.instances) {
      const message = await exitMessage(this.#records.instanceFolder(job, host));
      if (message !== undefined) return message;
    }
    return undefined;
  }

  async #executor(imageUri: string): Promise<Executor> {
    const { executor } = this.#options;
    if (executor === 'process') return this.#process;
    if (executor === 'docker') return this.#docker;
    return (await this.#docker.image(imageUri)) === null ? this.#process : this.#docker;
  }

  async #endLeftover(record: InstanceRecord): Promise<void> {
    if (record.process === undefined) return;
    await endSession(record.process);
    if (record.container !== undefined) await removeContainer(record.container);
  }

  /** One instance from its inputs to its container's end. A bad end of the container ends the job. */
  async #runInstance(
    job: JobRecord,
    record: InstanceRecord,
    run: Run,
    executor: Executor,
    s3: S3Client,
  ): Promise<void> {
    if (record.finished) return;
    const { request } = job;
    const folder = this.#records.instanceFolder(job, record.host);
    const instance: Instance = {
      request,
      host: record.host,
      folder,
      container: this.#options.containers(request.AppSpecification.ImageUri).folder,
      credentials: this.#options.credentials(request.RoleArn),
      endpoint: this.#options.endpoint(),
    };
    await layOut(job, record.host, folder, s3, run.abort.signal);
    const command = await executor.command(instance).catch((error: Error) => {
      throw new ClientError(`Cannot start the container: ${error.message}`, { cause: error });
    });
    if (run.ending) return;

    const stream = `${request.ProcessingJobName}/${record.host}-${Date.now()}`;
    const container = await startContainer(
      command,
      (mark) => {
        record.process = mark;
        if (command.container !== undefined) record.container = command.container;
        this.#records.save(job);
      },
      (lines) => this.#options.logs.append(PROCESSING_LOG_GROUP, stream, lines),
    );
    run.containers.push(container);
    // The end may have been called for while the container was being started.
    if (run.ending) await container.stop(0);
    const code = await container.exited;
    if (command.container !== undefined) await removeContainer(command.container);
    delete record.process;
    if (run.ending) return;
    if (code === 0) {
      record.finished = true;
      this.#records.save(job);
      return;
    }
    const message = await exitMessage(folder);
    const reason = `AlgorithmError: See job logs for more information. Exit code ${code}${message ? `: ${message}` : ''}`;
    await run.end({ by: 'failure', reason, exitMessage: message });
  }

  async #finish(
    job: JobRecord,
    end: { status: JobStatus; failureReason?: string; exitMessage?: string | undefined },
  ): Promise<void> {
    job.status = end.status;
    job.endTime = Date.now() / 1000;
    if (end.failureReason !== undefined) job.failureReason = end.failureReason.slice(0, MAX_FAILURE_REASON);
    if (end.exitMessage !== undefined) job.exitMessage = end.exitMessage;
    for (const instance of job.instances) delete instance.process;
    this.#records.save(job);
    // They are copies: what cannot be removed (a container in Docker writes as root) only takes room.
    for (const { host } of job.instances)
      await dropInputs(job.request, this.#records.instanceFolder(job, host)).catch(() => undefined);
  }
}

/** Whose fault it was, in the words with which SageMaker begins a FailureReason. */
const blame = (error: Error) =>
  `${error instanceof ClientError ? 'ClientError' : 'InternalServerError'}: ${error.message}`;
