/** Groups the ingested slides by model into shards; see README.md. */
import { z } from 'zod';
import {
  modelSecondsSchema,
  runContextSchema,
  TILE_FORMATS,
  transformSettingsSchema,
} from '../../core/contracts.ts';
import { planInference } from '../../core/inference.ts';
import { environment, handle, lineage, s3Client, stateTable } from '../runtime.ts';

const number = (name: string) => z.coerce.number().int().positive().parse(environment(name));

/** The machines of a kind of job, whose variables begin alike. */
const instances = (prefix = '') => ({
  instanceType: environment(`${prefix}INSTANCE_TYPE`),
  maxInstances: number(`${prefix}MAX_INSTANCES`),
  slidesPerInstance: number(`${prefix}SLIDES_PER_INSTANCE`),
  volumeSizeInGB: number(`${prefix}VOLUME_SIZE_IN_GB`),
});

const concurrent = environment('TRANSFORM_MAX_CONCURRENT');
const dependencies = {
  s3: s3Client(),
  state: stateTable(),
  lineage: lineage(),
  silverBucket: environment('SILVER_BUCKET'),
  config: {
    ...instances(),
    jobPrefix: environment('JOB_PREFIX'),
    maxRuntimeInSeconds: number('MAX_RUNTIME_IN_SECONDS'),
    modelSeconds: modelSecondsSchema.parse(number('MODEL_SECONDS')),
    tiles: {
      ...instances('TILES_'),
      format: z.enum(TILE_FORMATS).parse(environment('TILE_FORMAT')),
      quality: number('TILE_QUALITY'),
      packBytes: number('PACK_MEGABYTES') * 1_000_000,
      objects: environment('TILE_OBJECTS') === 'true',
      keepDays: number('TILES_KEEP_DAYS'),
    },
    join: instances('JOIN_'),
    transform: transformSettingsSchema.parse({
      instanceType: environment('TRANSFORM_INSTANCE_TYPE'),
      maxInstances: number('TRANSFORM_MAX_INSTANCES'),
      packsPerInstance: number('TRANSFORM_PACKS_PER_INSTANCE'),
      ...(concurrent !== 'auto' && { maxConcurrentTransforms: number('TRANSFORM_MAX_CONCURRENT') }),
      maxPayloadInMB: number('TRANSFORM_MAX_PAYLOAD_IN_MB'),
      invocationTimeoutSeconds: number('TRANSFORM_INVOCATION_TIMEOUT_SECONDS'),
    }),
  },
};

export const handler = handle(z.object({ run: runContextSchema }), ({ run }) =>
  planInference(run, dependencies),
);
