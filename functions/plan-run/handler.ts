/** Reads and checks the manifest and writes the plan of the run; see README.md. */
import { z } from 'zod';
import { runContextSchema } from '../../core/contracts.ts';
import { parseNameTemplate } from '../../core/names.ts';
import { planRun } from '../../core/plan.ts';
import { openCatalogue } from '../catalogue.ts';
import { environment, handle, late, lineage, s3Client, stateTable } from '../runtime.ts';

const dependencies = {
  s3: s3Client(),
  state: stateTable(),
  lineage: lineage(),
  silverBucket: environment('SILVER_BUCKET'),
  modelsBucket: environment('MODELS_BUCKET'),
  allowModelCode: environment('ALLOW_MODEL_CODE') === 'true',
  codeVersion: environment('CODE_VERSION'),
  late: late(),
  names: parseNameTemplate(environment('CANONICAL_NAME')),
  quietMs: Number(environment('FILES_QUIET_SECONDS')) * 1000,
};
const required = process.env.CATALOGUE_REQUIRED === 'true';

export const handler = handle(z.object({ run: runContextSchema }), ({ run }) => {
  const catalogue = openCatalogue();
  return planRun(run, { ...dependencies, ...(catalogue && { catalogue: { catalogue, required } }) });
});
