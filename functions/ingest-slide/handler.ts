/** Copies one slide from Landing to Bronze; see README.md. */
import { z } from 'zod';
import {
  continuationSchema,
  duplicatePolicySchema,
  plannedSlideSchema,
  runContextSchema,
} from '../../core/contracts.ts';
import { ingestSlide } from '../../core/ingest.ts';
import { environment, handle, holdings, lineage, meter, s3Client, stateTable } from '../runtime.ts';

const inputSchema = z.object({
  run: runContextSchema,
  slide: plannedSlideSchema,
  /** What the invocation before this one answered, where it had no time to finish. */
  ingested: z.object({ continue: continuationSchema.optional() }).optional(),
});

const dependencies = {
  s3: s3Client(),
  state: stateTable(),
  lineage: lineage(),
  holdings: holdings(),
  bronzeBucket: environment('BRONZE_BUCKET'),
  duplicates: duplicatePolicySchema.parse(environment('DUPLICATES')),
  requests: () => meter.take(),
};

export const handler = handle(inputSchema, ({ run, slide, ingested }, context) =>
  ingestSlide(
    run,
    slide,
    { ...dependencies, timeLeft: () => context.getRemainingTimeInMillis() },
    ingested?.continue,
  ),
);
