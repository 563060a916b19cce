/** Records how a job of a run ended; see README.md. */
import { MetricUnit } from '@aws-lambda-powertools/metrics';
import { z } from 'zod';
import { inferenceJobSchema, jobKindSchema, runContextSchema } from '../../core/contracts.ts';
import { recordJob } from '../../core/jobs.ts';
import { handle, lineage, metrics, stateTable } from '../runtime.ts';

const time = z.union([z.string(), z.number()]);
const inputSchema = z.object({
  run: runContextSchema,
  job: inferenceJobSchema,
  kind: jobKindSchema,
  attempt: z.number().int(),
  transform: z
    .object({
      instanceType: z.string().optional(),
      instanceCount: z.number().int().optional(),
      packs: z.number().int().optional(),
      fruitless: z.number().int().optional(),
    })
    .optional(),
  done: z
    .object({
      jobName: z.string(),
      startTime: time,
      endTime: time,
      imageUri: z.string().optional(),
      roleArn: z.string().optional(),
    })
    .optional(),
  failure: z.object({ error: z.string(), cause: z.string() }).optional(),
});

const dependencies = { state: stateTable(), lineage: lineage() };

export const handler = handle(inputSchema, async (input) => {
  const { jobName, state, instanceSeconds } = await recordJob(input, dependencies);
  metrics.addMetric('InstanceSeconds', MetricUnit.Seconds, instanceSeconds);
  metrics.addMetric('JobsFailed', MetricUnit.Count, state === 'FAILED' ? 1 : 0);
  return { jobName, state };
});
