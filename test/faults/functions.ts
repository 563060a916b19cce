/** The functions of the flow, wired as their handlers wire them, with clients of one invocation. */
import type { S3Client } from '@aws-sdk/client-s3';
import type { SFNClient } from '@aws-sdk/client-sfn';
import type { SNSClient } from '@aws-sdk/client-sns';
import type { DynamoDBDocumentClient } from '@aws-sdk/lib-dynamodb';
import { claimManifest, type ObjectCreated } from '../../core/claim.ts';
import type { Continuation, DuplicatePolicy, PlannedSlide, RunContext } from '../../core/contracts.ts';
import { classify } from '../../core/errors.ts';
import { Holdings } from '../../core/holdings.ts';
import { planInference } from '../../core/inference.ts';
import { ingestSlide } from '../../core/ingest.ts';
import { failSlide, recordJob } from '../../core/jobs.ts';
import { Late, startFollowUps } from '../../core/late.ts';
import { Lineage } from '../../core/lineage.ts';
import { Meter } from '../../core/metering.ts';
import { planRun } from '../../core/plan.ts';
import { PRICES } from '../../core/prices.ts';
import { publish } from '../../core/publish.ts';
import { aggregateSlide } from '../../core/slide-result.ts';
import { StateTable } from '../../core/state.ts';
import { inferenceConfig } from '../support/inference.ts';

export interface Place {
  landing: string;
  bronze: string;
  silver: string;
  models: string;
  stateTable: string;
  lineageTable: string;
  topicArn: string;
  stateMachineArn: string;
}

export const CODE_VERSION = '0.0.0-faults';
export const CLAIM_CONFIG = {
  defaultModel: 'area',
  codeVersion: CODE_VERSION,
  parameters: { tissueMinFraction: 0.5, mppTolerance: 0.02 },
};
const INFERENCE_CONFIG = inferenceConfig('faults');

/** Functions that are not the state machine's: one hears of every object in Landing, one is called by a schedule. */
export const MARK_ARRIVAL = 'mark-arrival';
export const START_FOLLOW_UP = 'start-follow-up';

export interface Clients {
  s3: S3Client;
  sns: SNSClient;
  stepFunctions: SFNClient;
  documents: DynamoDBDocumentClient;
}

export interface Config {
  duplicates: DuplicatePolicy;
  /** Milliseconds that an invocation of ingest-slide has. */
  timeLeft: number;
}

type Input<Work extends (...input: never[]) => unknown> = Parameters<Work>[0];
type Handler = (payload: never, tools: Tools) => Promise<unknown>;

/** What a function has: clients of its own, and where things lie. */
class Tools {
  readonly clients: Clients;
  readonly place: Place;
  readonly config: Config;
  readonly state: StateTable;
  readonly lineage: Lineage;
  readonly late: Late;
  readonly #meter = new Meter();
  #metered = false;

  constructor(name: string, clients: Clients, place: Place, config: Config) {
    this.clients = clients;
    this.place = place;
    this.config = config;
    this.state = new StateTable(clients.documents, place.stateTable);
    this.lineage = new Lineage(clients.documents, place.lineageTable, name, CODE_VERSION);
    this.late = new Late(clients.documents, place.stateTable);
  }

  get s3(): S3Client {
    if (!this.#metered) this.#meter.attach(this.clients.s3, 's3');
    this.#metered = true;
    return this.clients.s3;
  }

  readonly requests = () => this.#meter.take();
}

const HANDLERS: Record<string, Handler> = {
  'claim-manifest': (input: Input<typeof claimManifest>, { state, lineage }) =>
    claimManifest(input, { state, lineage, config: CLAIM_CONFIG }),
  'plan-run': ({ run }: { run: RunContext }, { s3, state, lineage, late, place }) =>
    planRun(run, {
      ...{ s3, state, lineage, late },
      silverBucket: place.silver,
      modelsBucket: place.models,
      allowModelCode: false,
      codeVersion: CODE_VERSION,
    }),
  'ingest-slide': (
    input: { run: RunContext; slide: PlannedSlide; ingested?: { continue?: Continuation } },
    { s3, state, lineage, clients, place, config, requests },
  ) =>
    ingestSlide(
      input.run,
      input.slide,
      {
        ...{ s3, state, lineage, requests },
        holdings: new Holdings(clients.documents, place.stateTable),
        bronzeBucket: place.bronze,
        duplicates: config.duplicates,
        timeLeft: () => config.timeLeft,
        limits: { copyObjectLimit: COPY_OBJECT_LIMIT, partSize: PART_SIZE },
      },
      input.ingested?.continue,
    ),
  'fail-slide': (input: Input<typeof failSlide>, { state, lineage }) => failSlide(input, { state, lineage }),
  'plan-inference': ({ run }: { run: RunContext }, { s3, state, lineage, place }) =>
    planInference(run, { s3, state, lineage, silverBucket: place.silver, config: INFERENCE_CONFIG }),
  'record-job': (input: Input<typeof recordJob>, { state, lineage }) =>
    recordJob(input, { state, lineage, describe: async () => undefined }),
  'aggregate-slide': (input: Input<typeof aggregateSlide>, { s3, state, lineage, place, requests }) =>
    aggregateSlide(input, {
      ...{ s3, state, lineage },
      silver: place.silver,
      codeVersion: CODE_VERSION,
      countedRequests: requests,
    }),
  'publish-run': async (input: Input<typeof publish>, { s3, state, lineage, clients, place }) => {
    const { runId, state: ended } = await publish(input, {
      ...{ s3, state, lineage },
      sns: clients.sns,
      silver: place.silver,
      topicArn: place.topicArn,
      codeVersion: CODE_VERSION,
      prices: PRICES,
      now: () => new Date(),
    });
    return { runId, state: ended };
  },
  [MARK_ARRIVAL]: ({ detail: { bucket, object } }: ObjectCreated, { late }) =>
    late.arrived(bucket.name, object.key),
  [START_FOLLOW_UP]: async (_: unknown, { s3, state, late, clients, place }) => {
    const { started, failed } = await startFollowUps({
      ...{ s3, state, late },
      stepFunctions: clients.stepFunctions,
      silverBucket: place.silver,
      stateMachineArn: place.stateMachineArn,
      quietMs: 0,
      patienceMs: 0,
    });
    for (const { error } of failed) throw error;
    return started;
  },
};

/** Calls the function `name` as its handler would. Rejects with what the state machine sees. */
export async function call(
  name: string,
  payload: unknown,
  clients: Clients,
  place: Place,
  config: Config,
): Promise<unknown> {
  const handler = HANDLERS[name];
  if (!handler) throw new Error(`The state machine calls the function ${name}, which is not wired here.`);
  try {
    return await handler(payload as never, new Tools(name, clients, place, config));
  } catch (error) {
    throw classify(error);
  }
}

/** Slides above this are copied part by part, so that small ones take that way too. */
export const COPY_OBJECT_LIMIT = 4096;
const PART_SIZE = 5 * 2 ** 20;
