/** Looks for what was forgotten and makes metrics of it; see README.md. */
import { tmpdir } from 'node:os';
import { MetricUnit } from '@aws-lambda-powertools/metrics';
import {
  DeleteModelCommand,
  ListTagsCommand,
  paginateListModels,
  SageMakerClient,
} from '@aws-sdk/client-sagemaker';
import { DescribeExecutionCommand, ExecutionDoesNotExist, SFNClient } from '@aws-sdk/client-sfn';
import { z } from 'zod';
import { type ServedModels, sweep } from '../../core/sweep.ts';
import { environment, handle, metrics, s3Client, stateTable } from '../runtime.ts';

const stepFunctions = new SFNClient({ maxAttempts: 5 });
const sageMaker = new SageMakerClient({ maxAttempts: 5 });
const limit = (name: string) => z.coerce.number().positive().parse(environment(name));

const dependencies = {
  s3: s3Client(),
  state: stateTable(),
  landing: environment('LANDING_BUCKET'),
  silver: environment('SILVER_BUCKET'),
  limits: {
    manifestMinutes: limit('MANIFEST_MINUTES'),
    unnamedHours: limit('UNNAMED_HOURS'),
    stuckHours: limit('STUCK_HOURS'),
    runHours: limit('RUN_HOURS'),
  },
  isRunning,
  models: servedModels(environment('JOB_PREFIX')),
  folder: tmpdir(),
  now: () => new Date(),
};

/** The schedule's event says nothing that counts. */
export const handler = handle(z.unknown(), async () => {
  const found = await sweep(dependencies);
  const counts = {
    SweepStaleManifests: found.staleManifests.count,
    SweepUnnamedSlides: found.unnamedSlides.count,
    SweepStuckSlides: found.stuckSlides.count,
    SweepEndlessRuns: found.endlessRuns.count,
    SweepLeftModels: found.leftModels.count,
  };
  metrics.addMetric('Sweeps', MetricUnit.Count, 1);
  for (const [name, count] of Object.entries(counts)) metrics.addMetric(name, MetricUnit.Count, count);
  return { at: found.at, ...counts };
});

async function isRunning(executionArn: string): Promise<boolean> {
  try {
    const { status } = await stepFunctions.send(new DescribeExecutionCommand({ executionArn }));
    return status === 'RUNNING' || status === 'PENDING_REDRIVE';
  } catch (error) {
    if (error instanceof ExecutionDoesNotExist) return false;
    throw error;
  }
}

/** The models whose names begin with `prefix-`, as all do that the state machine makes. */
function servedModels(prefix: string): ServedModels {
  /** SageMaker says no more of a model that is gone than that it cannot be found. */
  const unlessGone = async <T>(call: Promise<T>): Promise<T | undefined> => {
    try {
      return await call;
    } catch (error) {
      if (error instanceof Error && /could not find/i.test(error.message)) return undefined;
      throw error;
    }
  };
  return {
    async *list() {
      const pages = paginateListModels({ client: sageMaker }, { NameContains: `${prefix}-` });
      for await (const { Models = [] } of pages)
        for (const { ModelName: name = '', ModelArn: arn = '', CreationTime: since = new Date(0) } of Models)
          if (name.startsWith(`${prefix}-`)) yield { name, arn, since };
    },
    async runOf({ arn }) {
      const found = await unlessGone(sageMaker.send(new ListTagsCommand({ ResourceArn: arn })));
      return found?.Tags?.find(({ Key }) => Key === 'slideway:run')?.Value;
    },
    async remove({ name }) {
      await unlessGone(sageMaker.send(new DeleteModelCommand({ ModelName: name })));
    },
  };
}
