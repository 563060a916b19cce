/** Puts a run's heatmaps onto the images of the catalogue; see README.md. */
import { z } from 'zod';
import { runContextSchema } from '../../core/contracts.ts';
import { CatalogueMisconfigured } from '../../core/errors.ts';
import { pushOverlays } from '../../core/overlays.ts';
import { openCatalogue } from '../catalogue.ts';
import { environment, handle, lineage, s3Client, stateTable } from '../runtime.ts';

const dependencies = {
  s3: s3Client(),
  state: stateTable(),
  lineage: lineage(),
  silver: environment('SILVER_BUCKET'),
  now: () => new Date(),
};

export const handler = handle(z.object({ run: runContextSchema }), ({ run }, context) => {
  // One overlay is not worth as long a wait as the whole plan.
  const catalogue = openCatalogue({ overallSeconds: 60 });
  if (!catalogue) throw new CatalogueMisconfigured('The stage has no catalogue to push heatmaps to.');
  return pushOverlays(run, {
    ...dependencies,
    catalogue,
    remaining: () => context.getRemainingTimeInMillis(),
  });
});
