/** Processing jobs: inputs into /opt/ml/processing, the container to its end on every instance, outputs to S3. */
import type { S3Client } from '@aws-sdk/client-s3';
import type { Caller } from '../types.ts';
import { type Accepted, Jobs, type Machine } from './jobs.ts';
import { type InstanceRecord, type JobRecord, nameOf } from './records.ts';
import { checkProcessingJob, type ProcessingJobRequest } from './requests.ts';
import type { ServiceModel } from './service-model.ts';
import type { Run } from './turns.ts';
import { dropInputs, exitMessage, layOut, uploadOutputs } from './volume.ts';

export const PROCESSING_LOG_GROUP = '/aws/sagemaker/ProcessingJobs';
const DEFAULT_MAX_RUNTIME_SECONDS = 86_400;

type ProcessingJob = JobRecord<ProcessingJobRequest>;

export class ProcessingJobs extends Jobs<ProcessingJob> {
  constructor(machine: Machine, folder: string) {
    super(machine, folder, 'Processing');
  }

  protected accept(input: unknown, model: ServiceModel, caller: Caller): Accepted<ProcessingJob> {
    checkProcessingJob(input, model);
    const { ProcessingJobName: name, RoleArn: role, Tags: tags = [] } = input;
    const arn = this.arn(name);
    caller.authorize('sagemaker:CreateProcessingJob', arn);
    if (tags.length > 0) caller.authorize('sagemaker:AddTags', arn);
    caller.authorize('iam:PassRole', role);
    this.machine.options.containers(input.AppSpecification.ImageUri);
    return { request: input, name, tags, instances: input.ProcessingResources.ClusterConfig.InstanceCount };
  }

  protected roleOf({ request }: ProcessingJob): string {
    return request.RoleArn;
  }

  protected limitOf({ request }: ProcessingJob): number {
    return request.StoppingCondition?.MaxRuntimeInSeconds ?? DEFAULT_MAX_RUNTIME_SECONDS;
  }

  protected defaultsOf(job: ProcessingJob): object {
    return {
      ProcessingInputs: job.request.ProcessingInputs ?? [],
      StoppingCondition: { MaxRuntimeInSeconds: this.limitOf(job) },
      LastModifiedTime: job.lastModifiedTime,
      ExitMessage: job.exitMessage,
    };
  }

  protected async work(job: ProcessingJob, run: Run, s3: S3Client): Promise<void> {
    await this.onEach(job, run, (instance) => this.#runInstance(job, instance, run, s3));
    for (const { host } of job.instances) {
      if (run.ending) break;
      await uploadOutputs(job.request, this.records.instanceFolder(job, host), s3, run.abort.signal);
    }
  }

  protected async messageOf(job: ProcessingJob): Promise<string | undefined> {
    for (const { host } of job.instances) {
      const message = await exitMessage(this.records.instanceFolder(job, host));
      if (message !== undefined) return message;
    }
    return undefined;
  }

  protected async clean(job: ProcessingJob): Promise<void> {
    for (const { host } of job.instances)
      await dropInputs(job.request, this.records.instanceFolder(job, host));
  }

  /** One instance from its inputs to its container's end. A bad end of the container ends the job. */
  async #runInstance(job: ProcessingJob, record: InstanceRecord, run: Run, s3: S3Client): Promise<void> {
    if (record.finished) return;
    const { request } = job;
    const { AppSpecification: app } = request;
    const folder = this.records.instanceFolder(job, record.host);
    const name = nameOf(job);
    await layOut(job, record.host, folder, s3, run.abort.signal);
    const { endpoint, credentials, containers } = this.machine.options;
    const launched = await this.launch(
      job,
      record,
      run,
      {
        job: name,
        host: record.host,
        folder,
        imageUri: app.ImageUri,
        container: containers(app.ImageUri).folder,
        entrypoint: app.ContainerEntrypoint,
        arguments: app.ContainerArguments,
        environment: request.Environment ?? {},
        isolated: request.NetworkConfig?.EnableNetworkIsolation === true,
        credentials: credentials(request.RoleArn),
        endpoint: endpoint(),
      },
      { group: PROCESSING_LOG_GROUP, stream: `${name}/${record.host}-${Date.now()}` },
    );
    if (launched === null) return;
    const code = await launched.ended;
    if (run.ending) return;
    if (code === 0) {
      record.finished = true;
      this.records.save(job);
      return;
    }
    const message = await exitMessage(folder);
    const reason = `AlgorithmError: See job logs for more information. Exit code ${code}${message ? `: ${message}` : ''}`;
    await run.end({ by: 'failure', reason, exitMessage: message });
  }
}
