/**
 * What AWS asks for, in USD. Prices change and differ by region: this table has a date, every estimate names it, and a
 * stage can put its own in its place.
 */
import { z } from 'zod';

export interface Prices {
  /** The day on which the prices were read, ISO 8601. */
  date: string;
  region: string;
  /** A state transition of a Standard state machine. */
  transition: number;
  /** A request, by the classes in which core/metering.ts counts, and `lambda` for an invocation. */
  requests: Record<string, number>;
  /** An hour of an instance of a Processing or Transform job, by type; they cost the same. */
  instanceHour: Record<string, number>;
}

export const PRICES: Prices = {
  date: '2026-11-01',
  region: 'us-east-1',
  transition: 0.025 / 1000,
  requests: {
    s3Put: 0.005 / 1000,
    s3Get: 0.0004 / 1000,
    dynamodbWrite: 0.625 / 1e6,
    dynamodbRead: 0.125 / 1e6,
    lambda: 0.2 / 1e6,
  },
  instanceHour: {
    'ml.g5.xlarge': 1.408,
    'ml.g5.2xlarge': 1.515,
    // Sources disagree, 0.98 to 1.13: the higher, so that nobody is promised too little.
    'ml.g6.xlarge': 1.13,
    'ml.g6e.xlarge': 1.861,
    'ml.c5.xlarge': 0.204,
    'ml.c5.2xlarge': 0.408,
    'ml.c5.4xlarge': 0.816,
    'ml.c5.9xlarge': 1.836,
    'ml.m5.xlarge': 0.23,
    'ml.m5.2xlarge': 0.461,
    'ml.m5.4xlarge': 0.922,
  },
};

const overrideSchema = z
  .object({
    date: z.string(),
    region: z.string(),
    transition: z.number().min(0),
    requests: z.record(z.string(), z.number().min(0)),
    instanceHour: z.record(z.string(), z.number().min(0)),
  })
  .partial()
  .strict();

/** The price table with a stage's own prices, given as JSON, in place of its members. */
export function parsePrices(json: string | undefined): Prices {
  const { date, region, transition, requests, instanceHour } = overrideSchema.parse(JSON.parse(json || '{}'));
  return {
    date: date ?? PRICES.date,
    region: region ?? PRICES.region,
    transition: transition ?? PRICES.transition,
    requests: { ...PRICES.requests, ...requests },
    instanceHour: { ...PRICES.instanceHour, ...instanceHour },
  };
}
