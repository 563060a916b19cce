/**
 * The record: append-only, hash-chained events per slide and per run. Each event holds the hash of the one before
 * it, so that an altered, removed, reordered or inserted event shows.
 */
import { createHash } from 'node:crypto';
import { ConditionalCheckFailedException } from '@aws-sdk/client-dynamodb';
import { type DynamoDBDocumentClient, PutCommand, QueryCommand } from '@aws-sdk/lib-dynamodb';
import { ServiceUnavailable } from './errors.ts';

/** An object as it was: where, which version, which bytes. */
export interface LineageObject {
  bucket: string;
  key: string;
  versionId?: string | undefined;
  checksum?: string | undefined;
}

export interface LineageEvent {
  /** What makes the event this one: a repeated append with the same id adds nothing. */
  id: string;
  action: string;
  /** The role that did it. */
  actor: string;
  runId: string;
  codeVersion: string;
  reason?: string;
  inputs?: LineageObject[];
  outputs?: LineageObject[];
  parameters?: Record<string, unknown>;
}

export interface LineageItem extends LineageEvent {
  pk: string;
  /** Zero-padded sequence number, from 1. */
  sk: string;
  /** ISO 8601, UTC. */
  time: string;
  /** `hash` of the event before; of the first, 64 zeros. */
  prevHash: string;
  hash: string;
}

/** The part of an event's id that stands for what it made: other content is another event. */
export const contentId = (outputs: readonly { key: string; checksum?: string | undefined }[]): string =>
  createHash('sha256')
    .update(canonicalJson(outputs.map(({ key, checksum }) => [key, checksum ?? null])))
    .digest('hex')
    .slice(0, 12);

export type LineageSubject = { slideId: string } | { runId: string };

/** Stands for the hash before the first event. */
export const FIRST_HASH = '0'.repeat(64);
const ATTEMPTS = 20;

export const lineagePk = (subject: LineageSubject): string =>
  'slideId' in subject ? `SLIDE#${subject.slideId}` : `RUN#${subject.runId}`;

/** JSON with sorted keys and no white space: one text for one value. */
export function canonicalJson(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(canonicalJson).join(',')}]`;
  if (value !== null && typeof value === 'object') {
    const entries = Object.entries(value)
      .filter(([, inner]) => inner !== undefined)
      .sort(([a], [b]) => (a < b ? -1 : 1));
    return `{${entries.map(([key, inner]) => `${JSON.stringify(key)}:${canonicalJson(inner)}`).join(',')}}`;
  }
  // As JSON.stringify does inside arrays.
  return value === undefined ? 'null' : JSON.stringify(value);
}

/** The hash of an event: SHA-256, in hex, over the canonical JSON of all of it but the hash. */
export function hashEvent(item: Omit<LineageItem, 'hash'>): string {
  return createHash('sha256').update(canonicalJson(item)).digest('hex');
}

export class Lineage {
  readonly #client: DynamoDBDocumentClient;
  readonly #table: string;
  readonly #actor: string;
  readonly #codeVersion: string;

  /** `actor` is the role that writes, `codeVersion` the version of the code that acts. */
  constructor(client: DynamoDBDocumentClient, table: string, actor: string, codeVersion: string) {
    this.#client = client;
    this.#table = table;
    this.#actor = actor;
    this.#codeVersion = codeVersion;
  }

  /** Appends an event to the subject's chain, once per `id`. */
  async append(
    subject: LineageSubject,
    event: Omit<LineageEvent, 'actor' | 'codeVersion'>,
    now = new Date(),
  ): Promise<void> {
    const pk = lineagePk(subject);
    for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
      const recent = await this.#recent(pk);
      if (recent.some((item) => item.id === event.id)) return;
      const last = recent[0];
      const unsigned = {
        pk,
        sk: String(Number(last?.sk ?? 0) + 1).padStart(12, '0'),
        time: now.toISOString(),
        ...event,
        actor: this.#actor,
        codeVersion: this.#codeVersion,
        prevHash: last?.hash ?? FIRST_HASH,
      };
      // Through JSON, so that what is hashed is what is stored: no undefined members.
      const item = JSON.parse(canonicalJson(unsigned)) as Omit<LineageItem, 'hash'>;
      try {
        await this.#client.send(
          new PutCommand({
            TableName: this.#table,
            Item: { ...item, hash: hashEvent(item) },
            ConditionExpression: 'attribute_not_exists(pk)',
          }),
        );
        return;
      } catch (error) {
        // Somebody else wrote this number first: take the next.
        if (!(error instanceof ConditionalCheckFailedException)) throw error;
      }
    }
    throw new ServiceUnavailable(`${pk}: ${ATTEMPTS} others wrote to the lineage at the same time`);
  }

  /** The newest events first; a repeated event is never further back than the attempts of a few functions. */
  async #recent(pk: string): Promise<LineageItem[]> {
    const { Items } = await this.#client.send(
      new QueryCommand({
        TableName: this.#table,
        KeyConditionExpression: 'pk = :pk',
        ExpressionAttributeValues: { ':pk': pk },
        ScanIndexForward: false,
        ConsistentRead: true,
        Limit: 50,
      }),
    );
    return (Items ?? []) as LineageItem[];
  }
}
