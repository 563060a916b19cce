/** Turns the tile predictions of one slide into its results and heatmaps; see README.md. */
import { z } from 'zod';
import { inferenceSlideSchema, runContextSchema } from '../../core/contracts.ts';
import { aggregateSlide } from '../../core/slide-result.ts';
import { environment, handle, lineage, meter, s3Client, stateTable } from '../runtime.ts';

const inputSchema = z.object({ run: runContextSchema, slide: inferenceSlideSchema });

const s3 = s3Client();
const state = stateTable();
const record = lineage();
const silver = environment('SILVER_BUCKET');
const codeVersion = environment('CODE_VERSION');

export const handler = handle(inputSchema, (input) =>
  aggregateSlide(input, {
    s3,
    state,
    lineage: record,
    silver,
    codeVersion,
    countedRequests: () => meter.take(),
  }),
);
