/** Writes the run's summary, table and report, and announces its end; see README.md. */
import { MetricUnit } from '@aws-lambda-powertools/metrics';
import { SNSClient } from '@aws-sdk/client-sns';

import { parsePrices } from '../../core/prices.ts';
import { publish, publishInputSchema } from '../../core/publish.ts';
import { environment, handle, lineage, metrics, s3Client, stateTable } from '../runtime.ts';

const s3 = s3Client();
const sns = new SNSClient({ maxAttempts: 5 });
const state = stateTable();
const record = lineage();
const silver = environment('SILVER_BUCKET');
const topicArn = environment('TOPIC_ARN');
const codeVersion = environment('CODE_VERSION');
const stage = environment('STAGE');
const prices = parsePrices(process.env.PRICES);

export const handler = handle(publishInputSchema, async (input) => {
  const published = await publish(input, {
    s3,
    sns,
    state,
    lineage: record,
    silver,
    topicArn,
    codeVersion,
    prices,
    now: () => new Date(),
  });
  if (published.first) {
    const { counts } = published;
    metrics.addDimensions({ stage, state: published.state });
    metrics.addMetric('RunsEnded', MetricUnit.Count, 1);
    metrics.addMetric('RunDuration', MetricUnit.Seconds, published.durationSeconds);
    metrics.addMetric('EstimatedUsd', MetricUnit.NoUnit, published.estimatedUsd);
    metrics.addMetric('SlidesAggregated', MetricUnit.Count, counts.AGGREGATED ?? 0);
    metrics.addMetric('SlidesFailed', MetricUnit.Count, counts.FAILED ?? 0);
    metrics.addMetric('SlidesQuarantined', MetricUnit.Count, counts.QUARANTINED ?? 0);
    metrics.addMetric('SlidesMissing', MetricUnit.Count, counts.MISSING ?? 0);
  }
  return { runId: published.runId, state: published.state };
});
