/** Takes a manifest version for one run; see README.md. */
import { z } from 'zod';
import { claimManifest, runInputSchema } from '../../core/claim.ts';
import { parametersSchema } from '../../core/contracts.ts';
import { environment, handle, lineage, stateTable } from '../runtime.ts';

const inputSchema = z.object({ event: runInputSchema, executionArn: z.string(), startedAt: z.string() });

const dependencies = {
  state: stateTable(),
  lineage: lineage(),
  config: {
    defaultModel: environment('DEFAULT_MODEL'),
    codeVersion: environment('CODE_VERSION'),
    parameters: parametersSchema.parse({
      tissueMinFraction: Number(environment('TISSUE_MIN_FRACTION')),
      mppTolerance: Number(environment('MPP_TOLERANCE')),
    }),
  },
};

export const handler = handle(inputSchema, (input) => claimManifest(input, dependencies));
