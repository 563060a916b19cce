/** Anchors the record once a day; see README.md. */
import { MetricUnit } from '@aws-lambda-powertools/metrics';
import { z } from 'zod';
import { takeAnchor } from '../../core/anchor.ts';
import { environment, handle, lineageReader, logger, metrics, s3Client } from '../runtime.ts';

/** EventBridge's "Scheduled Event". It may come late: the day that counts is the one on which the anchor is taken. */
const inputSchema = z.object({});

const dependencies = {
  s3: s3Client(),
  record: lineageReader(),
  bucket: environment('ANCHORS_BUCKET'),
  actor: environment('POWERTOOLS_SERVICE_NAME'),
  codeVersion: environment('CODE_VERSION'),
};

export const handler = handle(inputSchema, async () => {
  const { anchor, taken } = await takeAnchor(new Date(), dependencies);
  const { date, root, heads, broken } = anchor;
  // A repeated event found the day anchored; it is counted once.
  if (taken) {
    metrics.addMetric('AnchoredChains', MetricUnit.Count, heads.count);
    metrics.addMetric('BrokenChains', MetricUnit.Count, broken.count);
    if (broken.count > 0) {
      logger.error('the record no longer holds what was anchored', {
        count: broken.count,
        first: broken.first,
      });
    }
  }
  return { date, root, chains: heads.count, broken: broken.count, taken };
});
