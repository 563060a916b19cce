/**
 * What every handler has in common: the clients, made once; the input, checked; logs, metrics and errors by
 * middy and Powertools. A handler parses, calls core, and lets errors through under the names that the state
 * machine retries on.
 */
import { Logger } from '@aws-lambda-powertools/logger';
import { injectLambdaContext } from '@aws-lambda-powertools/logger/middleware';
import { Metrics } from '@aws-lambda-powertools/metrics';
import { DynamoDBClient } from '@aws-sdk/client-dynamodb';
import { S3Client } from '@aws-sdk/client-s3';
import { DynamoDBDocumentClient } from '@aws-sdk/lib-dynamodb';
import middy from '@middy/core';
import type { Context } from 'aws-lambda';
import type { z } from 'zod';
import { classify } from '../core/errors.ts';
import { Holdings } from '../core/holdings.ts';
import { Late } from '../core/late.ts';
import { Lineage } from '../core/lineage.ts';
import { Meter } from '../core/metering.ts';
import { LineageReader } from '../core/record.ts';
import { StateTable } from '../core/state.ts';

export const logger = new Logger();
/** Metrics are by service and stage, unless more is said. */
export const metrics = new Metrics({ defaultDimensions: { stage: environment('STAGE') } });
/** Requests of this invocation so far; a Lambda works on one event at a time. */
export const meter = new Meter();

/** An environment variable that the deployment must have set. */
export function environment(name: string): string {
  const value = process.env[name];
  if (!value) throw new Error(`The environment variable ${name} is not set; see the function's README`);
  return value;
}

export function s3Client(): S3Client {
  const client = new S3Client({ maxAttempts: 5 });
  meter.attach(client, 's3');
  return client;
}

let documents: DynamoDBDocumentClient | undefined;
function documentClient(): DynamoDBDocumentClient {
  if (!documents) {
    const client = new DynamoDBClient({ maxAttempts: 5 });
    meter.attach(client, 'dynamodb');
    documents = DynamoDBDocumentClient.from(client, { marshallOptions: { removeUndefinedValues: true } });
  }
  return documents;
}

export const stateTable = (): StateTable => new StateTable(documentClient(), environment('STATE_TABLE'));

/** The state table as it knows what Bronze holds. */
export const holdings = (): Holdings => new Holdings(documentClient(), environment('STATE_TABLE'));

/** The state table as it knows which slides are late. */
export const late = (): Late => new Late(documentClient(), environment('STATE_TABLE'));

/** The lineage as this function writes it: under the name of its role. */
export const lineage = (): Lineage =>
  new Lineage(
    documentClient(),
    environment('LINEAGE_TABLE'),
    environment('POWERTOOLS_SERVICE_NAME'),
    environment('CODE_VERSION'),
  );

/** The lineage as it is read. */
export const lineageReader = (): LineageReader =>
  new LineageReader(documentClient(), environment('LINEAGE_TABLE'));

/** A Lambda handler around `work`, whose input has passed `schema`. */
export function handle<Schema extends z.ZodType, Output>(
  schema: Schema,
  work: (input: z.output<Schema>, context: Context) => Promise<Output>,
) {
  return middy(async (event: unknown, context: Context): Promise<Output> => {
    meter.take();
    const input = schema.parse(event);
    logger.appendKeys(logKeys(input));
    return work(input, context);
  })
    .use(injectLambdaContext(logger, { resetKeys: true }))
    .use({ after: publishMetrics, onError: publishMetrics })
    .onError((request) => {
      const error = classify(request.error);
      logger.error('failed', error as Error);
      throw error;
    });
}

/** Powertools' own middleware warns, in a line of no format, of every invocation without metrics. */
function publishMetrics(): void {
  if (metrics.hasStoredMetrics()) metrics.publishStoredMetrics();
}

/** The ids by which log lines of one run and one slide are found. */
function logKeys(input: unknown): Record<string, string> {
  const { run, slide, slideId } = input as {
    run?: { runId?: string };
    slide?: { slideId?: string } | string;
    slideId?: string;
  };
  const id = slideId ?? (typeof slide === 'object' ? slide.slideId : undefined);
  return { ...(run?.runId && { runId: run.runId }), ...(id && { slideId: id }) };
}
