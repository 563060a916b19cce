/** How a stage would have its inference done, on a few slides at a time. */
import type { InferenceConfig } from '../../core/inference.ts';

export const inferenceConfig = (jobPrefix: string): InferenceConfig => ({
  jobPrefix,
  instanceType: 'ml.g5.xlarge',
  maxInstances: 2,
  slidesPerInstance: 2,
  volumeSizeInGB: 200,
  maxRuntimeInSeconds: 86_400,
  modelSeconds: 120,
  tiles: {
    instanceType: 'ml.c5.4xlarge',
    maxInstances: 4,
    slidesPerInstance: 1,
    volumeSizeInGB: 100,
    format: 'jpeg',
    quality: 90,
    packBytes: 12_000_000,
    objects: false,
    keepDays: 7,
  },
  join: { instanceType: 'ml.c5.xlarge', maxInstances: 4, slidesPerInstance: 2, volumeSizeInGB: 50 },
  transform: {
    instanceType: 'ml.g5.xlarge',
    maxInstances: 3,
    packsPerInstance: 2,
    maxPayloadInMB: 13,
    invocationTimeoutSeconds: 600,
  },
});
