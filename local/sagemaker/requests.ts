/**
 * Checks a Processing job's request as the real service does, before anything runs: against the constraints of AWS's own
 * service model, then against what those cannot say, then against what the local service does not do.
 */
import { UnsupportedLocally } from '../types.ts';
import { invalid, memberPath, type ServiceModel, violation } from './service-model.ts';

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
export function checkProcessingJob(
  input: unknown,
  model: ServiceModel,
): asserts input is ProcessingJobRequest {
  model.validate('CreateProcessingJob', input);
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
