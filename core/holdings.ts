/**
 * What Bronze holds, as the state table knows it: which slide has a name, which content stands under a slide's id, and
 * which slide brought a content first. Each is a claim that only one can have, by a conditional write. A claim names
 * its slide and run; whether it still counts is told by that slide's own item, so that nothing has to be cleaned up
 * after a crash.
 */
import { ConditionalCheckFailedException } from '@aws-sdk/client-dynamodb';
import {
  DeleteCommand,
  type DynamoDBDocumentClient,
  GetCommand,
  PutCommand,
  type PutCommandInput,
} from '@aws-sdk/lib-dynamodb';

/** The slide of a run that has a claim. */
export interface Holder {
  runId: string;
  study: string;
  slideId: string;
  /** ISO 8601: until when a holder whose slide is under way is left alone. */
  until: string;
  /** Of a slide's id: the contents, by every checksum known, that stand under it. */
  contents?: string[];
}

type Key = { pk: string; sk: string };

/** Names are one whatever their case: some file systems know no difference. */
export const nameKey = (study: string, name: string): Key => ({
  pk: `NAME#${study}/${name.toLowerCase()}`,
  sk: 'NAME',
});
/** `content` is a checksum with the number of bytes. */
export const contentKey = (content: string): Key => ({ pk: `CONTENT#${content}`, sk: 'CONTENT' });
/** What stands in Bronze under a slide's id. */
export const slideKey = (study: string, slideId: string): Key => ({
  pk: `BRONZE#${study}/${slideId}`,
  sk: 'BRONZE',
});
/** A slide in Bronze that a run works on, with what is asked of it. */
export const askedKey = (runId: string, asked: string): Key => ({ pk: `RUN#${runId}`, sk: `ASKED#${asked}` });

export class Holdings {
  readonly #client: DynamoDBDocumentClient;
  readonly #table: string;

  constructor(client: DynamoDBDocumentClient, table: string) {
    this.#client = client;
    this.#table = table;
  }

  async holder(key: Key): Promise<Holder | undefined> {
    const { Item } = await this.#client.send(
      new GetCommand({ TableName: this.#table, Key: key, ConsistentRead: true }),
    );
    return Item as Holder | undefined;
  }

  /** Takes what nobody has, or what the same slide of any run has; undefined when it did, else the one that has it. */
  async claim(key: Key, holder: Holder): Promise<Holder | undefined> {
    // Whoever had it may give it up between the two requests.
    for (;;) {
      const taken = await this.#put(key, holder, {
        ConditionExpression: 'attribute_not_exists(pk) OR (study = :study AND slideId = :slideId)',
        ExpressionAttributeValues: { ':study': holder.study, ':slideId': holder.slideId },
      });
      if (taken) return undefined;
      const other = await this.holder(key);
      if (other) return other;
    }
  }

  /** Takes over from `from`, which must still have it; from nobody, nobody must have it. */
  takeOver(key: Key, from: Holder | undefined, holder: Holder): Promise<boolean> {
    if (!from) return this.#put(key, holder, { ConditionExpression: 'attribute_not_exists(pk)' });
    return this.#put(key, holder, {
      ConditionExpression: 'runId = :runId AND study = :study AND slideId = :slideId AND #until = :until',
      ExpressionAttributeNames: { '#until': 'until' },
      ExpressionAttributeValues: {
        ':runId': from.runId,
        ':study': from.study,
        ':slideId': from.slideId,
        ':until': from.until,
      },
    });
  }

  /** Gives up what this slide claimed in this run. */
  async release(key: Key, { runId, slideId }: Holder): Promise<void> {
    try {
      await this.#client.send(
        new DeleteCommand({
          TableName: this.#table,
          Key: key,
          ConditionExpression: 'runId = :runId AND slideId = :slideId',
          ExpressionAttributeValues: { ':runId': runId, ':slideId': slideId },
        }),
      );
    } catch (error) {
      if (!(error instanceof ConditionalCheckFailedException)) throw error;
    }
  }

  async #put(key: Key, holder: Holder, condition: Partial<PutCommandInput>): Promise<boolean> {
    try {
      await this.#client.send(
        new PutCommand({ TableName: this.#table, Item: { ...key, ...holder }, ...condition }),
      );
      return true;
    } catch (error) {
      if (error instanceof ConditionalCheckFailedException) return false;
      throw error;
    }
  }
}
