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
const prices = parsePrices(process.env.PRICES);
const links = process.env.LINKS;
const pushHeatmaps = process.env.CATALOGUE_KIND === 'concentriq' && process.env.PUSH_HEATMAPS === 'true';

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
    ...(links && { links }),
    now: () => new Date(),
  });
  if (published.first) {
    const { counts, seconds } = published;
    const ended = metrics.singleMetric();
    ended.addDimension('state', published.state);
    ended.addMetric('RunsEnded', MetricUnit.Count, 1);
    metrics.addMetric('RunDuration', MetricUnit.Seconds, published.durationSeconds);
    metrics.addMetric('EstimatedUsd', MetricUnit.NoUnit, published.estimatedUsd);
    metrics.addMetric('SlidesAggregated', MetricUnit.Count, counts.AGGREGATED ?? 0);
    metrics.addMetric('SlidesFailed', MetricUnit.Count, counts.FAILED ?? 0);
    metrics.addMetric('SlidesQuarantined', MetricUnit.Count, counts.QUARANTINED ?? 0);
    metrics.addMetric('SlidesMissing', MetricUnit.Count, counts.MISSING ?? 0);
    metrics.addMetric('SlidesDuplicate', MetricUnit.Count, counts.DUPLICATE ?? 0);
    metrics.addMetric('Tiles', MetricUnit.Count, published.tiles.ok);
    metrics.addMetric('TilesUnreadable', MetricUnit.Count, published.tiles.unreadable);
    if (counts.AGGREGATED) {
      metrics.addMetric(
        'EstimatedUsdPerSlide',
        MetricUnit.NoUnit,
        published.estimatedUsd / counts.AGGREGATED,
      );
    }
    const steps = {
      PlanSeconds: seconds.plan,
      IngestSeconds: seconds.ingest,
      InferenceSeconds: seconds.inference,
      AggregateSeconds: seconds.aggregate,
    };
    for (const [name, value] of Object.entries(steps)) {
      if (value !== undefined) metrics.addMetric(name, MetricUnit.Seconds, value);
    }
  }
  const { runId, state: ended } = published;
  // Where nothing came through, there is no heatmap to push.
  return { runId, state: ended, ...(pushHeatmaps && ended !== 'FAILED' && { overlays: true }) };
});
