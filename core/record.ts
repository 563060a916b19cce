/** The record as it is read: chain by chain, in whole or in part, never changed. */
import {
  BatchGetCommand,
  type DynamoDBDocumentClient,
  paginateQuery,
  paginateScan,
} from '@aws-sdk/lib-dynamodb';
import { ServiceUnavailable } from './errors.ts';
import type { LineageItem } from './lineage.ts';

/** The last event of a chain. */
export type ChainHead = Pick<LineageItem, 'pk' | 'sk' | 'hash'>;

export interface Chain {
  pk: string;
  /** By sequence number. */
  events: LineageItem[];
}

/** BatchGetItem takes so many keys. */
const BATCH = 100;
const ATTEMPTS = 8;

export class LineageReader {
  readonly #client: DynamoDBDocumentClient;
  readonly #table: string;

  constructor(client: DynamoDBDocumentClient, table: string) {
    this.#client = client;
    this.#table = table;
  }

  /** One chain; empty when there is none. */
  async chain(pk: string): Promise<Chain> {
    const events: LineageItem[] = [];
    const pages = paginateQuery(
      { client: this.#client },
      {
        TableName: this.#table,
        KeyConditionExpression: 'pk = :pk',
        ExpressionAttributeValues: { ':pk': pk },
        ConsistentRead: true,
      },
    );
    for await (const page of pages) events.push(...((page.Items ?? []) as LineageItem[]));
    return { pk, events };
  }

  /** Every chain, one after the other: a scan gives the items of a partition together and sorted. */
  async *chains(): AsyncGenerator<Chain> {
    let chain: Chain | undefined;
    for await (const item of this.#scan<LineageItem>()) {
      if (chain?.pk !== item.pk) {
        if (chain) yield chain;
        chain = { pk: item.pk, events: [] };
      }
      chain.events.push(item);
    }
    if (chain) yield chain;
  }

  /** The last event of every chain. */
  async *heads(): AsyncGenerator<ChainHead> {
    let head: ChainHead | undefined;
    for await (const item of this.#scan<ChainHead>('pk, sk, #hash')) {
      if (head && head.pk !== item.pk) yield head;
      head = item;
    }
    if (head) yield head;
  }

  /** The heads that no longer stand in the table as they are given, each with what stands in its place. */
  async *changed(
    heads: AsyncIterable<ChainHead>,
  ): AsyncGenerator<{ head: ChainHead; found: ChainHead | undefined }> {
    let batch: ChainHead[] = [];
    for await (const head of heads) {
      batch.push(head);
      if (batch.length < BATCH) continue;
      yield* this.#compare(batch);
      batch = [];
    }
    yield* this.#compare(batch);
  }

  async *#compare(heads: ChainHead[]): AsyncGenerator<{ head: ChainHead; found: ChainHead | undefined }> {
    if (heads.length === 0) return;
    const there = await this.#get(heads);
    for (const head of heads) {
      const found = there.get(`${head.pk} ${head.sk}`);
      if (found?.hash !== head.hash) yield { head, found };
    }
  }

  async #get(keys: ChainHead[]): Promise<Map<string, ChainHead>> {
    const found = new Map<string, ChainHead>();
    let wanted: Record<string, unknown>[] = keys.map(({ pk, sk }) => ({ pk, sk }));
    for (let attempt = 0; wanted.length > 0; attempt++) {
      if (attempt === ATTEMPTS) throw new ServiceUnavailable('DynamoDB did not give all of a batch of items');
      // What DynamoDB had no capacity for comes back unprocessed.
      if (attempt > 0) await new Promise((resolve) => setTimeout(resolve, 50 * 2 ** attempt));
      const { Responses, UnprocessedKeys } = await this.#client.send(
        new BatchGetCommand({
          RequestItems: {
            [this.#table]: {
              Keys: wanted,
              ConsistentRead: true,
              ProjectionExpression: 'pk, sk, #hash',
              ExpressionAttributeNames: { '#hash': 'hash' },
            },
          },
        }),
      );
      for (const item of (Responses?.[this.#table] ?? []) as ChainHead[]) {
        found.set(`${item.pk} ${item.sk}`, item);
      }
      wanted = UnprocessedKeys?.[this.#table]?.Keys ?? [];
    }
    return found;
  }

  async *#scan<T>(projection?: string): AsyncGenerator<T> {
    const pages = paginateScan(
      { client: this.#client },
      {
        TableName: this.#table,
        ConsistentRead: true,
        ...(projection && {
          ProjectionExpression: projection,
          ExpressionAttributeNames: { '#hash': 'hash' },
        }),
      },
    );
    for await (const page of pages) yield* (page.Items ?? []) as T[];
  }
}
