/**
 * The state table: what changes. Every transition of a slide is a conditional write on a rank, so that a late or
 * repeated event never moves it backwards and a slide that has ended stays as it ended.
 */
import { ConditionalCheckFailedException } from '@aws-sdk/client-dynamodb';
import {
  type DynamoDBDocumentClient,
  GetCommand,
  PutCommand,
  paginateQuery,
  UpdateCommand,
} from '@aws-sdk/lib-dynamodb';
import type { JobItem, OverlayItem, RunItem, SlideItem, SlideState } from './contracts.ts';

/** States may follow in the order of their ranks; those of the last rank are final. */
const RANK: Record<SlideState, number> = {
  EXPECTED: 0,
  MISSING: 5,
  COPYING: 10,
  INGESTED: 20,
  INFERRING: 30,
  INFERRED: 40,
  AGGREGATED: 90,
  DUPLICATE: 90,
  QUARANTINED: 90,
  FAILED: 90,
};

export const isFinal = (state: SlideState): boolean => RANK[state] === 90;

export const runPk = (runId: string) => `RUN#${runId}`;
const overlayKey = (image: string, picture: string) => ({
  pk: `IMAGE#${image}`,
  sk: `OVERLAY#${picture}`,
});
const slideSk = (slideId: string) => `SLIDE#${slideId}`;

export class StateTable {
  readonly #client: DynamoDBDocumentClient;
  readonly #table: string;

  constructor(client: DynamoDBDocumentClient, table: string) {
    this.#client = client;
    this.#table = table;
  }

  /** Takes the run for one execution. True also when that execution has taken it before (its Lambda was retried). */
  async claimRun(run: RunItem): Promise<boolean> {
    try {
      await this.#client.send(
        new PutCommand({
          TableName: this.#table,
          Item: { pk: runPk(run.runId), sk: 'RUN', runs: 'RUNS', ...run },
          ConditionExpression: 'attribute_not_exists(pk)',
        }),
      );
      return true;
    } catch (error) {
      if (!(error instanceof ConditionalCheckFailedException)) throw error;
      return (await this.run(run.runId))?.executionArn === run.executionArn;
    }
  }

  /** The run that an execution has claimed; from an index, which learns of a new run after a moment. */
  async runOf(execution: { arn: string; startedAt: string }): Promise<RunItem | undefined> {
    const pages = paginateQuery(
      { client: this.#client },
      {
        TableName: this.#table,
        IndexName: 'runs',
        KeyConditionExpression: 'runs = :runs AND startedAt = :startedAt',
        ExpressionAttributeValues: { ':runs': 'RUNS', ':startedAt': execution.startedAt },
      },
    );
    for await (const page of pages) {
      const found = page.Items?.find(({ executionArn }) => executionArn === execution.arn);
      if (found) return found as RunItem;
    }
    return undefined;
  }

  /** Every run, the earliest first; one that was claimed a moment ago may not be among them yet. */
  async *runs(): AsyncGenerator<RunItem> {
    const pages = paginateQuery(
      { client: this.#client },
      {
        TableName: this.#table,
        IndexName: 'runs',
        KeyConditionExpression: 'runs = :runs',
        ExpressionAttributeValues: { ':runs': 'RUNS' },
      },
    );
    for await (const page of pages) yield* (page.Items ?? []) as RunItem[];
  }

  async run(runId: string): Promise<RunItem | undefined> {
    const { Item } = await this.#client.send(
      new GetCommand({ TableName: this.#table, Key: { pk: runPk(runId), sk: 'RUN' }, ConsistentRead: true }),
    );
    return Item as RunItem | undefined;
  }

  /** Sets attributes of a run that has not ended; false when it has. */
  async updateRun(runId: string, set: Partial<RunItem>): Promise<boolean> {
    return this.#update(
      { pk: runPk(runId), sk: 'RUN' },
      set,
      'attribute_exists(pk) AND attribute_not_exists(endedAt)',
    );
  }

  /** Puts down that the end of a run is on record and told. */
  async published(runId: string, publishedAt: string): Promise<void> {
    await this.#update({ pk: runPk(runId), sk: 'RUN' }, { publishedAt }, 'attribute_exists(endedAt)');
  }

  async slide(runId: string, slideId: string): Promise<SlideItem | undefined> {
    const { Item } = await this.#client.send(
      new GetCommand({
        TableName: this.#table,
        Key: { pk: runPk(runId), sk: slideSk(slideId) },
        ConsistentRead: true,
      }),
    );
    return Item as SlideItem | undefined;
  }

  /**
   * Moves a slide forward to `state`. False, and nothing is written, when it is there already or further on; COPYING
   * may be entered again, because a copy that was broken off starts anew.
   */
  async transition(
    runId: string,
    slideId: string,
    state: SlideState,
    set: Partial<Omit<SlideItem, 'slideId' | 'state' | 'updatedAt'>>,
    now = new Date(),
  ): Promise<boolean> {
    const again = state === 'COPYING' ? '<=' : '<';
    return this.#update(
      { pk: runPk(runId), sk: slideSk(slideId) },
      { slideId, ...set, state, rank: RANK[state], updatedAt: now.toISOString() },
      `attribute_not_exists(pk) OR #rank ${again} :rank`,
    );
  }

  slides(runId: string): AsyncGenerator<SlideItem> {
    return this.#query<SlideItem>(runId, 'SLIDE#');
  }

  jobs(runId: string): AsyncGenerator<JobItem> {
    return this.#query<JobItem>(runId, 'JOB#');
  }

  async putJob(runId: string, job: JobItem): Promise<void> {
    await this.#client.send(
      new PutCommand({
        TableName: this.#table,
        Item: { pk: runPk(runId), sk: `JOB#${job.jobName}`, ...job },
      }),
    );
  }

  /** `image` is `<host>/<imageId>`; `picture` is `<model>#<version>#<sha256>`. */
  async overlay(image: string, picture: string): Promise<OverlayItem | undefined> {
    const { Item } = await this.#client.send(
      new GetCommand({ TableName: this.#table, Key: overlayKey(image, picture), ConsistentRead: true }),
    );
    return Item as OverlayItem | undefined;
  }

  async putOverlay(image: string, picture: string, item: OverlayItem): Promise<void> {
    await this.#client.send(
      new PutCommand({ TableName: this.#table, Item: { ...overlayKey(image, picture), ...item } }),
    );
  }

  async *#query<T>(runId: string, prefix: string): AsyncGenerator<T> {
    const pages = paginateQuery(
      { client: this.#client },
      {
        TableName: this.#table,
        KeyConditionExpression: 'pk = :pk AND begins_with(sk, :prefix)',
        ExpressionAttributeValues: { ':pk': runPk(runId), ':prefix': prefix },
        ConsistentRead: true,
      },
    );
    for await (const page of pages) yield* (page.Items ?? []) as T[];
  }

  async #update(
    key: Record<string, string>,
    set: Record<string, unknown>,
    condition: string,
  ): Promise<boolean> {
    const entries = Object.entries(set).filter(([, value]) => value !== undefined);
    try {
      await this.#client.send(
        new UpdateCommand({
          TableName: this.#table,
          Key: key,
          UpdateExpression: `SET ${entries.map(([name]) => `#${name} = :${name}`).join(', ')}`,
          ConditionExpression: condition,
          ExpressionAttributeNames: Object.fromEntries(entries.map(([name]) => [`#${name}`, name])),
          ExpressionAttributeValues: Object.fromEntries(entries.map(([name, value]) => [`:${name}`, value])),
        }),
      );
      return true;
    } catch (error) {
      if (error instanceof ConditionalCheckFailedException) return false;
      throw error;
    }
  }
}
