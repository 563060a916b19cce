/** Checks a Transform job's request as SageMaker does, and then against what the local service does not do. */
import { UnsupportedLocally } from '../types.ts';
import type { Tag } from './requests.ts';
import { invalid, type ServiceModel } from './service-model.ts';

/** MaxConcurrentTransforms × MaxPayloadInMB, at most. */
const MOST_IN_FLIGHT_MB = 100;

/** CreateTransformJob's input, as far as the local service goes by it. */
export interface TransformJobRequest {
  TransformJobName: string;
  ModelName: string;
  MaxConcurrentTransforms?: number;
  ModelClientConfig?: { InvocationsTimeoutInSeconds?: number; InvocationsMaxRetries?: number };
  MaxPayloadInMB?: number;
  BatchStrategy?: 'SingleRecord' | 'MultiRecord';
  Environment?: Record<string, string>;
  TransformInput: {
    DataSource: { S3DataSource: { S3DataType: 'S3Prefix' | 'ManifestFile'; S3Uri: string } };
    ContentType?: string;
  };
  TransformOutput: { S3OutputPath: string; Accept?: string; KmsKeyId?: string };
  TransformResources: { InstanceType: string; InstanceCount: number };
  Tags?: Tag[];
}

const refuse = (what: string) => {
  throw invalid(new UnsupportedLocally(what, 'CreateTransformJob').message);
};

/**
 * Throws `ValidationException` unless `input` is a job that SageMaker would accept and that can run here: whole
 * objects, one a request; anything else is refused by name.
 */
export function checkTransformJob(input: unknown, model: ServiceModel): asserts input is TransformJobRequest {
  model.validate('CreateTransformJob', input);
  const { TransformInput, TransformOutput, ...request } = input as Omit<
    TransformJobRequest,
    'TransformInput'
  > & {
    TransformInput: {
      DataSource: { S3DataSource: { S3DataType: string } };
      SplitType?: string;
      CompressionType?: string;
    };
    TransformOutput: { AssembleWith?: string };
    DataProcessing?: object;
    DataCaptureConfig?: object;
    ExperimentConfig?: object;
  };
  for (const name of ['DataProcessing', 'DataCaptureConfig', 'ExperimentConfig'] as const)
    if (request[name] !== undefined) refuse(name);
  const { S3DataType } = TransformInput.DataSource.S3DataSource;
  if (S3DataType !== 'S3Prefix' && S3DataType !== 'ManifestFile') refuse(`S3DataType ${S3DataType}`);
  const { SplitType = 'None', CompressionType = 'None' } = TransformInput;
  if (SplitType !== 'None') refuse(`SplitType ${SplitType}`);
  if (CompressionType !== 'None') refuse(`CompressionType ${CompressionType}`);
  const { AssembleWith = 'None' } = TransformOutput;
  if (AssembleWith !== 'None') refuse(`AssembleWith ${AssembleWith}`);
  const { MaxConcurrentTransforms: concurrent, MaxPayloadInMB: payload } = request;
  if (payload !== undefined && payload > MOST_IN_FLIGHT_MB)
    throw invalid(`MaxPayloadInMB cannot be greater than ${MOST_IN_FLIGHT_MB} MB.`);
  if (concurrent && payload && concurrent * payload > MOST_IN_FLIGHT_MB)
    throw invalid(
      `MaxConcurrentTransforms * MaxPayloadInMB cannot exceed ${MOST_IN_FLIGHT_MB} MB, but is ${concurrent} * ${payload}.`,
    );
}
