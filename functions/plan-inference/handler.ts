/** Groups the ingested slides by model into shards; see README.md. */
import { z } from 'zod';
import { runContextSchema } from '../../core/contracts.ts';
import { planInference } from '../../core/inference.ts';
import { environment, handle, lineage, s3Client, stateTable } from '../runtime.ts';

const dependencies = {
  s3: s3Client(),
  state: stateTable(),
  lineage: lineage(),
  silverBucket: environment('SILVER_BUCKET'),
  config: {
    jobPrefix: environment('JOB_PREFIX'),
    instanceType: environment('INSTANCE_TYPE'),
    maxInstances: Number(environment('MAX_INSTANCES')),
    slidesPerInstance: Number(environment('SLIDES_PER_INSTANCE')),
    volumeSizeInGB: Number(environment('VOLUME_SIZE_IN_GB')),
    maxRuntimeInSeconds: Number(environment('MAX_RUNTIME_IN_SECONDS')),
  },
};

export const handler = handle(z.object({ run: runContextSchema }), ({ run }) =>
  planInference(run, dependencies),
);
