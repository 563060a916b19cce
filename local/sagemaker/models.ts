/** SageMaker's models: an image and a model package under a name. Transform jobs serve them. */
import { HeadObjectCommand } from '@aws-sdk/client-s3';
import { type Caller, type JsonOperation, ServiceError, UnsupportedLocally } from '../types.ts';
import { arnOf, type ListInput, type Machine, pageOf } from './jobs.ts';
import { nameOf, Records } from './records.ts';
import type { Tag } from './requests.ts';
import { invalid, type ServiceModel, violation } from './service-model.ts';
import { splitUri } from './volume.ts';

/** CreateModel's input, as far as the local service goes by it. */
export interface ModelRequest {
  ModelName: string;
  PrimaryContainer: { Image: string; ModelDataUrl?: string; Environment?: Record<string, string> };
  ExecutionRoleArn: string;
  EnableNetworkIsolation?: boolean;
  Tags?: Tag[];
}

/** Times are epoch seconds, as on the wire. */
export interface ModelRecord {
  request: ModelRequest;
  arn: string;
  creationTime: number;
  lastModifiedTime: number;
  tags: Tag[];
}

const refuse = (what: string) => {
  throw invalid(new UnsupportedLocally(what, 'CreateModel').message);
};

/** Throws `ValidationException` unless SageMaker would take the request, of one container with one package. */
function checkModel(input: unknown, model: ServiceModel): asserts input is ModelRequest {
  model.validate('CreateModel', input);
  const { PrimaryContainer: container, ...rest } = input as Record<string, unknown>;
  for (const name of ['Containers', 'InferenceExecutionConfig', 'VpcConfig'])
    if (rest[name] !== undefined) refuse(name);
  if (rest.ExecutionRoleArn === undefined)
    throw violation(undefined, 'executionRoleArn', 'Member must not be null');
  if (container === undefined) throw violation(undefined, 'primaryContainer', 'Member must not be null');
  const { Image, ModelDataUrl, Mode, Environment: _, ...others } = container as Record<string, unknown>;
  const [other] = Object.keys(others);
  if (other !== undefined) refuse(`PrimaryContainer.${other}`);
  if (Mode === 'MultiModel') refuse('PrimaryContainer.Mode MultiModel');
  if (Image === undefined) throw violation(undefined, 'primaryContainer.image', 'Member must not be null');
  if (ModelDataUrl !== undefined && !String(ModelDataUrl).endsWith('.tar.gz'))
    throw invalid(`The model data at ${ModelDataUrl} must be a .tar.gz file.`);
}

export class Models {
  readonly #machine: Machine;
  readonly #records: Records<ModelRecord>;
  readonly operations: Record<string, JsonOperation> = {
    CreateModel: (input: unknown, caller: Caller) => this.#create(input, caller),
    DescribeModel: (input: { ModelName: string }, caller: Caller) => this.#describe(input, caller),
    ListModels: (input: ListInput, caller: Caller) => this.#list(input, caller),
    DeleteModel: (input: { ModelName: string }, caller: Caller) => this.#delete(input, caller),
  };

  constructor(machine: Machine, folder: string) {
    this.#machine = machine;
    this.#records = new Records(folder);
  }

  /** The model of that name, as it is now. Throws `ValidationException` when there is none. */
  get(name: string): ModelRecord {
    const model = this.#records.get(name);
    if (!model) throw invalid(`Could not find model "${arnOf('model', name)}".`);
    return model;
  }

  /** The tags of the model of that ARN; undefined when there is none. */
  tags(arn: string): Tag[] | undefined {
    return this.#records.all().find((model) => model.arn === arn)?.tags;
  }

  tag(arn: string, tags: Tag[]): void {
    const model = this.#records.all().find((candidate) => candidate.arn === arn);
    if (model) this.#records.save(Object.assign(model, { tags }));
  }

  async #create(input: unknown, caller: Caller) {
    checkModel(input, await this.#machine.model());
    const { ModelName: name, ExecutionRoleArn: role, PrimaryContainer: container, Tags: tags = [] } = input;
    const arn = arnOf('model', name);
    caller.authorize('sagemaker:CreateModel', arn);
    if (tags.length > 0) caller.authorize('sagemaker:AddTags', arn);
    caller.authorize('iam:PassRole', role);
    if (this.#records.get(name)) throw invalid(`Cannot create already existing model "${arn}".`);
    this.#machine.rehearse(name);
    try {
      this.#machine.options.containers(container.Image);
    } catch (error) {
      if (!(error instanceof ServiceError)) throw error;
      throw invalid(`Requested image ${container.Image} not found.`);
    }
    if (container.ModelDataUrl !== undefined) await this.#findPackage(container.ModelDataUrl, role);
    // Another request of that name may have come while the package was looked for.
    if (this.#records.get(name)) throw invalid(`Cannot create already existing model "${arn}".`);
    const now = Date.now() / 1000;
    this.#records.save({ request: input, arn, tags, creationTime: now, lastModifiedTime: now });
    return { ModelArn: arn };
  }

  /** With the model's own role, as the service looks for it. */
  async #findPackage(uri: string, role: string): Promise<void> {
    const { bucket, key } = splitUri(uri);
    const s3 = this.#machine.s3(role);
    try {
      await s3.send(new HeadObjectCommand({ Bucket: bucket, Key: key }));
    } catch (error) {
      const { $metadata } = error as { $metadata?: { httpStatusCode?: number } };
      if ($metadata?.httpStatusCode === 403)
        throw invalid(
          `Could not access model data at ${uri}. Please ensure that the role "${role}" exists and that its trust relationship policy allows the action "sts:AssumeRole" for the service principal "sagemaker.amazonaws.com". Also ensure that the role has "s3:GetObject" permissions and that the object is located in us-east-1.`,
        );
      if ($metadata?.httpStatusCode === 404) throw invalid(`Could not find model data at ${uri}.`);
      throw error;
    } finally {
      s3.destroy();
    }
  }

  async #describe(input: { ModelName: string }, caller: Caller) {
    (await this.#machine.model()).validate('DescribeModel', input);
    caller.authorize('sagemaker:DescribeModel', arnOf('model', input.ModelName));
    const { request, arn, creationTime } = this.get(input.ModelName);
    const { Tags: _tags, ...rest } = request;
    return {
      EnableNetworkIsolation: false,
      ...rest,
      ModelArn: arn,
      CreationTime: creationTime,
    };
  }

  async #list(input: ListInput, caller: Caller) {
    (await this.#machine.model()).validate('ListModels', input);
    caller.authorize('sagemaker:ListModels', '*');
    const { page, next } = pageOf(this.#records.all(), input);
    return {
      Models: page.map((model) => ({
        ModelName: nameOf(model),
        ModelArn: model.arn,
        CreationTime: model.creationTime,
      })),
      NextToken: next,
    };
  }

  async #delete(input: { ModelName: string }, caller: Caller) {
    (await this.#machine.model()).validate('DeleteModel', input);
    caller.authorize('sagemaker:DeleteModel', arnOf('model', input.ModelName));
    this.#records.remove(this.get(input.ModelName));
    return {};
  }
}
