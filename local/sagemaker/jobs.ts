/**
 * What all kinds of SageMaker's jobs have in common: the operations, names that are taken for ever, a record on disk
 * before they are answered for, one turn each, an end by whatever comes first, and going on after an end of the
 * engine. What a kind does in its turn is its own.
 */
import { join } from 'node:path';
import { S3Client } from '@aws-sdk/client-s3';
import type { Logs } from '../logs.ts';
import { type Caller, type JsonOperation, LOCAL_ACCOUNT, LOCAL_REGION, ServiceError } from '../types.ts';
import { type Container, startContainer } from './container.ts';
import {
  DockerExecutor,
  type Executor,
  type Instance,
  ProcessExecutor,
  removeContainer,
} from './executors.ts';
import { endSession } from './processes.ts';
import { type InstanceRecord, type JobRecord, type JobStatus, nameOf, Records } from './records.ts';
import type { Tag } from './requests.ts';
import { type ServiceModel, serviceModel } from './service-model.ts';
import { type Run, Turns } from './turns.ts';
import { ClientError } from './volume.ts';

const MAX_FAILURE_REASON = 1024;
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
  /** Seconds that a server has until it answers its first ping with 200. Default 480, SageMaker's. */
  pingSeconds?: number;
  /** Whether processes may be given a real /opt/ml, where the machine allows it. Default true. */
  mountNamespace?: boolean;
  /** Faults to act out by the name of a job or model, for rehearsing what AWS does at its worst. */
  faults?: (name: string) => Fault | undefined;
}

/** What the kinds of jobs share on one machine. */
export class Machine {
  readonly options: SageMakerOptions;
  readonly turns: Turns;
  readonly #process: ProcessExecutor;
  readonly #docker = new DockerExecutor();

  constructor(options: SageMakerOptions) {
    this.options = options;
    this.turns = new Turns(options.maxConcurrentInstances ?? 2, (options.stopGraceSeconds ?? 30) * 1000);
    this.#process = new ProcessExecutor({
      python: options.python,
      scratch: join(options.folder, '.scratch'),
      mountNamespace: options.mountNamespace ?? true,
    });
  }

  /** Asked for with each request, so that there is no cost before the first one. */
  model(): Promise<ServiceModel> {
    return serviceModel(this.options.python);
  }

  /** S3 as a role sees it. */
  s3(roleArn: string): S3Client {
    return new S3Client({
      region: LOCAL_REGION,
      endpoint: this.options.endpoint(),
      credentials: this.options.credentials(roleArn),
      forcePathStyle: true,
    });
  }

  async executor(imageUri: string): Promise<Executor> {
    const { executor } = this.options;
    if (executor === 'process') return this.#process;
    if (executor === 'docker') return this.#docker;
    return (await this.#docker.image(imageUri)) === null ? this.#process : this.#docker;
  }

  /** Acts out the fault of that name, if it is one at creation. */
  rehearse(name: string): Fault | undefined {
    const fault = this.options.faults?.(name);
    if (fault && 'createError' in fault)
      throw new ServiceError(
        fault.createError,
        `The request for ${name} was answered with ${fault.createError}, as a rehearsal.`,
      );
    return fault;
  }
}

export const arnOf = (kind: string, name: string) =>
  `arn:aws:sagemaker:${LOCAL_REGION}:${LOCAL_ACCOUNT}:${kind}/${name}`;

export interface ListInput {
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

interface Listed {
  arn: string;
  creationTime: number;
  lastModifiedTime: number;
  status?: JobStatus;
}

/** One page of a listing, and the token of the next. */
export function pageOf<Kind extends Listed>(all: Kind[], input: ListInput): { page: Kind[]; next?: string } {
  const after = (limit: number | undefined, time: number) => limit === undefined || time > limit;
  const before = (limit: number | undefined, time: number) => limit === undefined || time < limit;
  const from = Number(input.NextToken ?? 0);
  if (!Number.isInteger(from) || from < 0)
    throw new ServiceError('ValidationException', `Value '${input.NextToken}' at 'nextToken' is invalid`);
  const sortKey = (record: Kind) => {
    if (input.SortBy === 'Name') return nameOf(record);
    return input.SortBy === 'Status' ? (record.status ?? '') : record.creationTime;
  };
  const found = all
    .filter(
      (record) =>
        nameOf(record).includes(input.NameContains ?? '') &&
        (input.StatusEquals === undefined || record.status === input.StatusEquals) &&
        after(input.CreationTimeAfter, record.creationTime) &&
        before(input.CreationTimeBefore, record.creationTime) &&
        after(input.LastModifiedTimeAfter, record.lastModifiedTime) &&
        before(input.LastModifiedTimeBefore, record.lastModifiedTime),
    )
    .sort((a, b) => (sortKey(a) < sortKey(b) ? -1 : 1));
  if (input.SortOrder !== 'Ascending') found.reverse();
  const to = from + (input.MaxResults ?? PAGE);
  return { page: found.slice(from, to), ...(to < found.length && { next: String(to) }) };
}

/** A request that was accepted, and what else the job is made of. */
export interface Accepted<Job extends JobRecord> {
  request: Job['request'];
  name: string;
  instances: number;
  tags: Tag[];
  more?: Partial<Job>;
}

export abstract class Jobs<Job extends JobRecord> {
  protected readonly machine: Machine;
  protected readonly records: Records<Job>;
  /** `Processing` or `Transform`, as the names of operations and members begin. */
  readonly #stem: string;
  readonly operations: Record<string, JsonOperation>;

  constructor(machine: Machine, folder: string, stem: 'Processing' | 'Transform') {
    this.machine = machine;
    this.records = new Records(folder);
    this.#stem = stem;
    this.operations = {
      [`Create${stem}Job`]: (input: unknown, caller: Caller) => this.#create(input, caller),
      [`Describe${stem}Job`]: (input: Record<string, string>, caller: Caller) =>
        this.#describe(input, caller),
      [`List${stem}Jobs`]: (input: ListInput, caller: Caller) => this.#list(input, caller),
      [`Stop${stem}Job`]: (input: Record<string, string>, caller: Caller) => this.#stop(input, caller),
    };
  }

  /** Throws {@link ServiceError} unless SageMaker would take the request from this caller. */
  protected abstract accept(input: unknown, model: ServiceModel, caller: Caller): Accepted<Job>;
  /** Whose rights the job has. */
  protected abstract roleOf(job: Job): string;
  /** Seconds; undefined where the kind has no limit. */
  protected abstract limitOf(job: Job): number | undefined;
  /** What the job is for. It ends early when `run` is ended, and ends `run` itself when it fails. */
  protected abstract work(job: Job, run: Run, s3: S3Client): Promise<void>;
  /** What a job that did its work has to say. */
  protected abstract messageOf(job: Job): Promise<string | undefined>;
  /** Removes the copies that the job was given. */
  protected abstract clean(job: Job): Promise<void>;
  /** What a description has beyond the request. */
  protected abstract defaultsOf(job: Job): object;

  protected arn(name: string): string {
    return arnOf(`${this.#stem.toLowerCase()}-job`, name);
  }

  /** The tags of the job of that ARN; undefined when there is none. */
  tags(arn: string): Tag[] | undefined {
    return this.records.all().find((job) => job.arn === arn)?.tags;
  }

  tag(arn: string, tags: Tag[]): void {
    const job = this.records.all().find((candidate) => candidate.arn === arn);
    if (job) this.records.save(Object.assign(job, { tags }));
  }

  /** Jobs that an earlier engine left; what still lives of them is ended first. */
  async unfinished(): Promise<Job[]> {
    const jobs = this.records.all().filter((job) => job.status === 'InProgress' || job.status === 'Stopping');
    for (const job of jobs) for (const instance of job.instances) await endLeftover(instance);
    return jobs;
  }

  async goOn(job: Job): Promise<void> {
    if (job.status === 'Stopping') await this.#finish(job, { status: 'Stopped' });
    else this.#queue(job);
  }

  // --- operations ---------------------------------------------------------------------------------------------

  async #create(input: unknown, caller: Caller) {
    const { request, name, instances, tags, more } = this.accept(input, await this.machine.model(), caller);
    const arn = this.arn(name);
    if (this.records.get(name))
      throw new ServiceError(
        'ResourceInUse',
        `Job name must be unique within an AWS account and region, and a job with this name already exists (${arn})`,
      );
    const fault = this.machine.rehearse(name);
    const now = Date.now() / 1000;
    const job = {
      ...more,
      request,
      arn,
      status: 'InProgress',
      creationTime: now,
      lastModifiedTime: now,
      tags,
      instances: Array.from({ length: instances }, (_, index) => ({ host: `algo-${index + 1}` })),
      ...(fault && 'failureReason' in fault && { fault: fault.failureReason }),
    } as JobRecord as Job;
    this.records.save(job);
    this.#queue(job);
    return { [`${this.#stem}JobArn`]: arn };
  }

  /** The job that a request names, if its caller may do that to it. */
  async #named(operation: string, input: Record<string, string>, caller: Caller): Promise<Job> {
    (await this.machine.model()).validate(operation, input);
    const name = input[`${this.#stem}JobName`] ?? '';
    caller.authorize(`sagemaker:${operation}`, this.arn(name));
    const job = this.records.get(name);
    if (!job) throw new ServiceError('ResourceNotFound', `Could not find requested job with name: ${name}`);
    return job;
  }

  async #describe(input: Record<string, string>, caller: Caller) {
    const stem = this.#stem;
    const job = await this.#named(`Describe${stem}Job`, input, caller);
    const { Tags: _tags, ...request } = job.request as { Tags?: Tag[] };
    return {
      ...request,
      ...this.defaultsOf(job),
      [`${stem}JobArn`]: job.arn,
      [`${stem}JobStatus`]: job.status,
      CreationTime: job.creationTime,
      [`${stem}StartTime`]: job.startTime,
      [`${stem}EndTime`]: job.endTime,
      FailureReason: job.failureReason,
    };
  }

  async #list(input: ListInput, caller: Caller) {
    const stem = this.#stem;
    (await this.machine.model()).validate(`List${stem}Jobs`, input);
    caller.authorize(`sagemaker:List${stem}Jobs`, '*');
    const { page, next } = pageOf(this.records.all(), input);
    return {
      [`${stem}JobSummaries`]: page.map((job) => ({
        [`${stem}JobName`]: nameOf(job),
        [`${stem}JobArn`]: job.arn,
        CreationTime: job.creationTime,
        LastModifiedTime: job.lastModifiedTime,
        [`${stem}EndTime`]: job.endTime,
        [`${stem}JobStatus`]: job.status,
        FailureReason: job.failureReason,
        ...(job.exitMessage !== undefined && { ExitMessage: job.exitMessage }),
      })),
      NextToken: next,
    };
  }

  async #stop(input: Record<string, string>, caller: Caller) {
    const job = await this.#named(`Stop${this.#stem}Job`, input, caller);
    if (job.status === 'Stopping') return {};
    if (job.status !== 'InProgress')
      throw new ServiceError(
        'ValidationException',
        `The request was rejected because the ${this.#stem.toLowerCase()} job is in status ${job.status}.`,
      );
    job.status = 'Stopping';
    this.records.save(job);
    const run = this.machine.turns.stop(job);
    // Answered at once, as in the service; a job that cannot be ended is reported by its run.
    if (run) void run.end({ by: 'stop' }).catch(() => undefined);
    else await this.#finish(job, { status: 'Stopped' });
    return {};
  }

  // --- running ------------------------------------------------------------------------------------------------

  #queue(job: Job): void {
    this.machine.turns.add({
      job,
      start: (run) =>
        this.#execute(job, run).catch((error: Error) =>
          this.#finish(job, { status: 'Failed', failureReason: blame(error) }),
        ),
    });
  }

  async #execute(job: Job, run: Run): Promise<void> {
    if (job.fault !== undefined) return this.#finish(job, { status: 'Failed', failureReason: job.fault });
    job.startTime ??= Date.now() / 1000;
    this.records.save(job);
    const limit = this.limitOf(job);
    // Counted anew after a restart of the engine: the time that it was away is not the job's.
    const timer =
      limit === undefined
        ? undefined
        : setTimeout(() => void run.end({ by: 'maxRuntime' }).catch(() => undefined), limit * 1000);
    const s3 = this.machine.s3(this.roleOf(job));
    try {
      await this.work(job, run, s3);
    } catch (error) {
      // What was broken off because the job is ending already has nothing of its own to say.
      run.ending ??= { by: 'failure', reason: blame(error as Error) };
    } finally {
      clearTimeout(timer);
      s3.destroy();
    }
    await this.#conclude(job, run, limit);
  }

  async #conclude(job: Job, { ending }: Run, limit: number | undefined): Promise<void> {
    switch (ending?.by) {
      case 'close':
        return;
      case 'stop':
        return this.#finish(job, { status: 'Stopped' });
      case 'maxRuntime':
        return this.#finish(job, {
          status: 'Stopped',
          failureReason: `ClientError: The job ran longer than its MaxRuntimeInSeconds (${limit}) and was stopped.`,
        });
      case 'failure':
        return this.#finish(job, {
          status: 'Failed',
          failureReason: ending.reason,
          exitMessage: ending.exitMessage,
        });
      default:
        return this.#finish(job, { status: 'Completed', exitMessage: await this.messageOf(job) });
    }
  }

  async #finish(
    job: Job,
    end: { status: JobStatus; failureReason?: string; exitMessage?: string | undefined },
  ): Promise<void> {
    job.status = end.status;
    job.endTime = Date.now() / 1000;
    if (end.failureReason !== undefined) job.failureReason = end.failureReason.slice(0, MAX_FAILURE_REASON);
    if (end.exitMessage !== undefined) job.exitMessage = end.exitMessage;
    for (const instance of job.instances) delete instance.process;
    this.records.save(job);
    // They are copies: what cannot be removed (a container in Docker writes as root) only takes room.
    await this.clean(job).catch(() => undefined);
  }

  /** Every instance to its end; one that breaks down ends the job. */
  protected async onEach(
    job: Job,
    run: Run,
    work: (instance: InstanceRecord) => Promise<void>,
  ): Promise<void> {
    await Promise.all(
      job.instances.map((instance) =>
        work(instance).catch((error: Error) => run.end({ by: 'failure', reason: blame(error) })),
      ),
    );
  }

  /** Starts an instance's container, on record first. Null when the job is ending already. */
  protected async launch(
    job: Job,
    record: InstanceRecord,
    run: Run,
    instance: Instance,
    log: { group: string; stream: string },
  ): Promise<{ container: Container; ended: Promise<number>; socket?: string } | null> {
    const executor = await this.machine.executor(instance.imageUri);
    const command = await executor.command(instance).catch((error: Error) => {
      throw new ClientError(`Cannot start the container: ${error.message}`, { cause: error });
    });
    if (run.ending) return null;
    const container = await startContainer(
      command,
      (mark) => {
        record.process = mark;
        if (command.container !== undefined) record.container = command.container;
        this.records.save(job);
      },
      (lines) => this.machine.options.logs.append(log.group, log.stream, lines),
    );
    run.containers.push(container);
    // The end may have been called for while the container was being started.
    if (run.ending) await container.stop(0);
    const ended = container.exited.then(async (code) => {
      if (command.container !== undefined) await removeContainer(command.container);
      delete record.process;
      return code;
    });
    return { container, ended, ...(command.socket !== undefined && { socket: command.socket }) };
  }
}

async function endLeftover(record: InstanceRecord): Promise<void> {
  if (record.process === undefined) return;
  await endSession(record.process);
  if (record.container !== undefined) await removeContainer(record.container);
}

/** Whose fault it was, in the words with which SageMaker begins a FailureReason. */
export const blame = (error: Error) =>
  `${error instanceof ClientError ? 'ClientError' : 'InternalServerError'}: ${error.message}`;
