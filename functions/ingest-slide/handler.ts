/** Copies one slide from Landing to Bronze; see README.md. */
import { z } from 'zod';
import { plannedSlideSchema, runContextSchema } from '../../core/contracts.ts';
import { ingestSlide } from '../../core/ingest.ts';
import { environment, handle, lineage, meter, s3Client, stateTable } from '../runtime.ts';

const dependencies = {
  s3: s3Client(),
  state: stateTable(),
  lineage: lineage(),
  bronzeBucket: environment('BRONZE_BUCKET'),
  requests: () => meter.take(),
};

export const handler = handle(
  z.object({ run: runContextSchema, slide: plannedSlideSchema }),
  ({ run, slide }) => ingestSlide(run, slide, dependencies),
);
