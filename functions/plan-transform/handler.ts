/** Finds the packs that have no predictions yet, and plans a Transform job for them; see README.md. */
import { z } from 'zod';
import { inferenceJobSchema, runContextSchema } from '../../core/contracts.ts';
import { planTransform, previousPlanSchema } from '../../core/transform.ts';
import { environment, handle, s3Client } from '../runtime.ts';

const dependencies = { s3: s3Client(), silverBucket: environment('SILVER_BUCKET') };

const inputSchema = z.object({
  run: runContextSchema,
  job: inferenceJobSchema,
  attempt: z.number().int().min(1),
  previous: previousPlanSchema.optional(),
});

export const handler = handle(inputSchema, ({ run, job, ...plan }) =>
  planTransform(run, job, plan, dependencies),
);
