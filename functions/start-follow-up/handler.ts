/** Starts runs for slides that were late and have come; see README.md. */
import { SFNClient } from '@aws-sdk/client-sfn';
import { z } from 'zod';
import { FollowUpsFailed } from '../../core/errors.ts';
import { startFollowUps } from '../../core/late.ts';
import { environment, handle, late, logger, s3Client, stateTable } from '../runtime.ts';

const seconds = (name: string) => Number(environment(name)) * 1000;

const dependencies = {
  s3: s3Client(),
  stepFunctions: new SFNClient({ maxAttempts: 5 }),
  state: stateTable(),
  late: late(),
  silverBucket: environment('SILVER_BUCKET'),
  stateMachineArn: environment('STATE_MACHINE_ARN'),
  quietMs: seconds('QUIET_SECONDS'),
  patienceMs: seconds('PATIENCE_SECONDS'),
};

export const handler = handle(z.unknown(), async () => {
  const { started, failed } = await startFollowUps(dependencies);
  for (const { of, execution, slides } of started) logger.info('started', { runId: of, execution, slides });
  for (const { of, error } of failed) logger.error('not started', { runId: of, error: error as Error });
  if (failed.length > 0)
    throw new FollowUpsFailed(
      `${failed.length} runs could not be followed up: ${failed.map(({ of }) => of).join(', ')}`,
    );
  return { started };
});
