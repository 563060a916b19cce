/** Reads and checks the manifest and writes the plan of the run; see README.md. */
import { z } from 'zod';
import { runContextSchema } from '../../core/contracts.ts';
import { planRun } from '../../core/plan.ts';
import { environment, handle, lineage, s3Client, stateTable } from '../runtime.ts';

const dependencies = {
  s3: s3Client(),
  state: stateTable(),
  lineage: lineage(),
  silverBucket: environment('SILVER_BUCKET'),
  modelsBucket: environment('MODELS_BUCKET'),
  codeVersion: environment('CODE_VERSION'),
};

export const handler = handle(z.object({ run: runContextSchema }), ({ run }) => planRun(run, dependencies));
