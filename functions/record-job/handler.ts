/** Records how a job of a run ended; see README.md. */
import { MetricUnit } from '@aws-lambda-powertools/metrics';
import {
  DescribeProcessingJobCommand,
  DescribeTransformJobCommand,
  SageMakerClient,
} from '@aws-sdk/client-sagemaker';
import { z } from 'zod';
import { inferenceJobSchema, type JobKind, jobKindSchema, runContextSchema } from '../../core/contracts.ts';
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

const sageMaker = new SageMakerClient({ maxAttempts: 5 });
const dependencies = { state: stateTable(), lineage: lineage(), describe };

export const handler = handle(inputSchema, async (input) => {
  const { jobName, state, instanceSeconds } = await recordJob(input, dependencies);
  metrics.addMetric('InstanceSeconds', MetricUnit.Seconds, instanceSeconds);
  metrics.addMetric('JobsFailed', MetricUnit.Count, state === 'FAILED' ? 1 : 0);
  return { jobName, state };
});

async function describe(kind: JobKind, name: string): Promise<object | undefined> {
  try {
    return kind === 'transform'
      ? await sageMaker.send(new DescribeTransformJobCommand({ TransformJobName: name }))
      : await sageMaker.send(new DescribeProcessingJobCommand({ ProcessingJobName: name }));
  } catch (error) {
    // SageMaker has two names for it.
    if (error instanceof Error && /could not find/i.test(error.message)) return undefined;
    throw error;
  }
}
