/** Records the unexpected failure of one slide; see README.md. */
import { z } from 'zod';
import { runContextSchema } from '../../core/contracts.ts';
import { failSlide } from '../../core/jobs.ts';
import { handle, lineage, stateTable } from '../runtime.ts';

const inputSchema = z.object({
  run: runContextSchema,
  slideId: z.string(),
  slide: z.string(),
  stage: z.string(),
  error: z.string(),
  cause: z.string(),
});

const dependencies = { state: stateTable(), lineage: lineage() };

export const handler = handle(inputSchema, (input) => failSlide(input, dependencies));
