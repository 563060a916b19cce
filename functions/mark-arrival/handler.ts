/** Marks the late slide that an object of Landing belongs to; see README.md. */
import { objectCreatedSchema } from '../../core/claim.ts';
import { handle, late } from '../runtime.ts';

const table = late();

export const handler = handle(objectCreatedSchema, async ({ detail: { bucket, object } }) => ({
  marked: await table.arrived(bucket.name, object.key),
}));
