/**
 * Checks requests as the real service does, before anything runs: against the constraints of AWS's own service
 * model (model.json), then against what those cannot say, then against what the local service does not do.
 */
import { LOCAL_ACCOUNT, LOCAL_REGION, ServiceError, UnsupportedLocally } from '../types.ts';
import model from './model.json' with { type: 'json' };

interface Shape {
  type: string;
  required?: string[];
  members?: Record<string, string>;
  member?: string;
  key?: string;
  value?: string;
  min?: number;
  max?: number;
  pattern?: string;
  enum?: string[];
}

const shapes: Record<string, Shape> = model.shapes;
const operations: Record<string, string> = model.operations;

export interface Tag {
  Key: string;
  Value: string;
}

export interface S3Input {
  S3Uri: string;
  LocalPath: string;
  S3DataType: 'S3Prefix' | 'ManifestFile';
  S3DataDistributionType?: 'FullyReplicated' | 'ShardedByS3Key';
}

export interface S3Output {
  S3Uri: string;
  LocalPath: string;
}

/** CreateProcessingJob's input, as far as the local service goes by it. */
export interface ProcessingJobRequest {
  ProcessingJobName: string;
  ProcessingInputs?: { InputName: string; S3Input: S3Input }[];
  ProcessingOutputConfig?: { Outputs: { OutputName: string; S3Output: S3Output }[]; KmsKeyId?: string };
  ProcessingResources: {
    ClusterConfig: { InstanceCount: number; InstanceType: string; VolumeSizeInGB: number };
  };
  StoppingCondition?: { MaxRuntimeInSeconds: number };
  AppSpecification: { ImageUri: string; ContainerEntrypoint?: string[]; ContainerArguments?: string[] };
  Environment?: Record<string, string>;
  NetworkConfig?: { EnableNetworkIsolation?: boolean };
  RoleArn: string;
  Tags?: Tag[];
}

/** Families whose instances carry their own NVMe disk, for which SageMaker takes no volume key. */
const LOCAL_NVME = /^ml\.(g4dn|g5|g6|g6e|g7|g7e|p5|r5d)\./;

const invalid = (message: string) => new ServiceError('ValidationException', message);

const violation = (value: unknown, path: string, constraint: string) =>
  invalid(
    `1 validation error detected: Value ${value === undefined ? 'null' : `'${typeof value === 'string' ? value : JSON.stringify(value)}'`} at '${path}' failed to satisfy constraint: ${constraint}`,
  );

const memberPath = (parent: string, name: string) => {
  const camel = `${name.charAt(0).toLowerCase()}${name.slice(1)}`;
  return parent === '' ? camel : `${parent}.${camel}`;
};

function checkRange(shape: Shape, size: number, value: unknown, path: string, what: string): void {
  if (shape.min !== undefined && size < shape.min)
    throw violation(value, path, `Member must have ${what} greater than or equal to ${shape.min}`);
  if (shape.max !== undefined && size > shape.max)
    throw violation(value, path, `Member must have ${what} less than or equal to ${shape.max}`);
}

function checkStructure(shape: Shape, value: object, path: string): void {
  const members = shape.members ?? {};
  const entries = new Map<string, unknown>(Object.entries(value));
  for (const name of entries.keys())
    if (!(name in members)) throw invalid(`Unknown member '${memberPath(path, name)}'`);
  for (const [name, member] of Object.entries(members)) {
    const given = entries.get(name);
    if (given !== undefined && given !== null) checkShape(member, given, memberPath(path, name));
    else if (shape.required?.includes(name))
      throw violation(undefined, memberPath(path, name), 'Member must not be null');
  }
}

function checkString(shape: Shape, value: string, path: string): void {
  if (shape.enum && !shape.enum.includes(value))
    throw violation(value, path, `Member must satisfy enum value set: [${shape.enum.join(', ')}]`);
  checkRange(shape, value.length, value, path, 'length');
  if (shape.pattern !== undefined && !new RegExp(`^(?:${shape.pattern})$`, 'u').test(value))
    throw violation(value, path, `Member must satisfy regular expression pattern: ^${shape.pattern}$`);
}

function checkShape(name: string, value: unknown, path: string): void {
  const shape = shapes[name];
  if (shape === undefined) throw new Error(`model.json lacks the shape ${name}`);
  const wrongType = () => violation(value, path, `Member must be of type ${shape.type}`);
  switch (shape.type) {
    case 'structure':
      if (typeof value !== 'object' || value === null || Array.isArray(value)) throw wrongType();
      checkStructure(shape, value, path);
      return;
    case 'list':
      if (!Array.isArray(value)) throw wrongType();
      checkRange(shape, value.length, value, path, 'length');
      value.forEach((item, index) => {
        checkShape(shape.member ?? '', item, `${path}.${index + 1}.member`);
      });
      return;
    case 'map':
      if (typeof value !== 'object' || value === null || Array.isArray(value)) throw wrongType();
      checkRange(shape, Object.keys(value).length, value, path, 'length');
      for (const [key, item] of Object.entries(value)) {
        checkShape(shape.key ?? '', key, `${path}.key`);
        checkShape(shape.value ?? '', item, `${path}.${key}.member`);
      }
      return;
    case 'integer':
      if (typeof value !== 'number' || !Number.isInteger(value)) throw wrongType();
      checkRange(shape, value, value, path, 'value');
      return;
    case 'boolean':
      if (typeof value !== 'boolean') throw wrongType();
      return;
    case 'timestamp':
      if (typeof value !== 'number') throw wrongType();
      return;
    default:
      if (typeof value !== 'string') throw wrongType();
      checkString(shape, value, path);
  }
}

/** Throws `ValidationException` naming the member unless `input` is what the operation takes. */
export function validate(operation: string, input: unknown): void {
  checkShape(operations[operation] ?? '', input, '');
}

const refuse = (what: string) => {
  throw invalid(new UnsupportedLocally(what, 'CreateProcessingJob').message);
};

function checkLocalPath(value: unknown, path: string): void {
  if (typeof value !== 'string') throw violation(undefined, path, 'Member must not be null');
  const parts = value.split('/');
  if (!value.startsWith('/opt/ml/processing/') || parts.includes('..') || parts.includes('.'))
    throw violation(value, path, 'Member must be an absolute path under /opt/ml/processing/');
}

function checkDistinct(names: string[], path: string): void {
  const twice = names.find((name, index) => names.indexOf(name) !== index);
  if (twice !== undefined) throw violation(twice, path, 'Member must be unique');
}

interface AnyInput {
  InputName: string;
  AppManaged?: boolean;
  S3Input?: S3Input & { S3InputMode?: string; S3CompressionType?: string };
  DatasetDefinition?: object;
}

interface AnyOutput {
  OutputName: string;
  AppManaged?: boolean;
  S3Output?: S3Output & { S3UploadMode?: string };
  FeatureStoreOutput?: object;
}

/**
 * Throws `ValidationException` unless `input` is a job that SageMaker would accept and that can run here:
 * File mode, S3 inputs, outputs at the end of the job; anything else is refused by name.
 */
export function checkProcessingJob(input: unknown): asserts input is ProcessingJobRequest {
  validate('CreateProcessingJob', input);
  const { ProcessingInputs, ProcessingOutputConfig, ProcessingResources, ExperimentConfig } = input as {
    ProcessingInputs?: AnyInput[];
    ProcessingOutputConfig?: { Outputs: AnyOutput[] };
    ProcessingResources: {
      ClusterConfig: {
        InstanceType?: string;
        InstanceCount?: number;
        VolumeKmsKeyId?: string;
        InstancePreferences?: object;
        SelectedInstanceType?: string;
        SelectedInstanceCount?: number;
      };
    };
    ExperimentConfig?: object;
  };
  if (ExperimentConfig !== undefined) refuse('ExperimentConfig');

  const cluster = ProcessingResources.ClusterConfig;
  const clusterPath = 'processingResources.clusterConfig';
  for (const name of ['InstancePreferences', 'SelectedInstanceType', 'SelectedInstanceCount'] as const)
    if (cluster[name] !== undefined) refuse(name);
  for (const name of ['InstanceType', 'InstanceCount'] as const)
    if (cluster[name] === undefined)
      throw violation(undefined, memberPath(clusterPath, name), 'Member must not be null');
  if (cluster.VolumeKmsKeyId !== undefined && LOCAL_NVME.test(cluster.InstanceType ?? ''))
    throw invalid(
      `VolumeKmsKeyId is not supported for ${cluster.InstanceType}: its local storage is encrypted by the hardware`,
    );

  const inputs = ProcessingInputs ?? [];
  checkDistinct(
    inputs.map((item) => item.InputName),
    'processingInputs.inputName',
  );
  inputs.forEach((item, index) => {
    const path = `processingInputs.${index + 1}.member`;
    if (item.AppManaged) refuse('AppManaged inputs');
    if (item.DatasetDefinition !== undefined) refuse('DatasetDefinition');
    if (item.S3Input === undefined) throw violation(undefined, `${path}.s3Input`, 'Member must not be null');
    if (item.S3Input.S3InputMode === 'Pipe') refuse('S3InputMode Pipe');
    if (item.S3Input.S3CompressionType === 'Gzip') refuse('S3CompressionType Gzip');
    checkLocalPath(item.S3Input.LocalPath, `${path}.s3Input.localPath`);
  });

  const outputs = ProcessingOutputConfig?.Outputs ?? [];
  checkDistinct(
    outputs.map((item) => item.OutputName),
    'processingOutputConfig.outputs.outputName',
  );
  outputs.forEach((item, index) => {
    const path = `processingOutputConfig.outputs.${index + 1}.member`;
    if (item.AppManaged) refuse('AppManaged outputs');
    if (item.FeatureStoreOutput !== undefined) refuse('FeatureStoreOutput');
    if (item.S3Output === undefined)
      throw violation(undefined, `${path}.s3Output`, 'Member must not be null');
    if (item.S3Output.S3UploadMode === 'Continuous') refuse('S3UploadMode Continuous');
    checkLocalPath(item.S3Output.LocalPath, `${path}.s3Output.localPath`);
  });
}

export const processingJobArn = (name: string) =>
  `arn:aws:sagemaker:${LOCAL_REGION}:${LOCAL_ACCOUNT}:processing-job/${name}`;
