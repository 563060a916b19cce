/**
 * DynamoDB: dynalite on LevelDB, behind the gateway, with the caller's rights checked for each table and index.
 *
 * dynalite never listens here: it is handed the gateway's requests, so there is no second door without a lock.
 */
import { mkdirSync } from 'node:fs';
import type { IncomingMessage, Server, ServerResponse } from 'node:http';
import { Readable, Writable } from 'node:stream';
import dynalite from 'dynalite';
import { z } from 'zod';
import type { BodyService } from './gateway.ts';
import { type Resource, tableArn } from './resources.ts';
import { type Caller, LOCAL_REGION, ServiceError, UnsupportedLocally } from './types.ts';

type TableProperties = Extract<Resource, { type: 'AWS::DynamoDB::Table' }>['properties'];

/** Parameters that dynalite would silently ignore, and the value that asks for nothing. */
const IGNORED_PARAMETERS: Record<string, string> = { ReturnValuesOnConditionCheckFailure: 'NONE' };

const tableSchema = z.object({
  Table: z.object({
    TableStatus: z.string(),
    KeySchema: z.array(z.unknown()),
    AttributeDefinitions: z.array(z.looseObject({ AttributeName: z.string() })),
    GlobalSecondaryIndexes: z
      .array(z.object({ IndexName: z.string(), KeySchema: z.unknown(), Projection: z.unknown() }))
      .optional(),
    LocalSecondaryIndexes: z
      .array(z.object({ IndexName: z.string(), KeySchema: z.unknown(), Projection: z.unknown() }))
      .optional(),
  }),
});

export class DynamoDb implements BodyService {
  readonly #server: Server;

  constructor(options: { folder: string }) {
    mkdirSync(options.folder, { recursive: true });
    this.#server = inRegion(LOCAL_REGION, () =>
      dynalite({ path: options.folder, createTableMs: 0, deleteTableMs: 0, updateTableMs: 0 }),
    );
  }

  operation(request: IncomingMessage): string {
    return (
      String(request.headers['x-amz-target'] ?? '')
        .split('.')
        .at(-1) ?? ''
    );
  }

  async handle(
    request: IncomingMessage,
    body: Buffer,
    response: ServerResponse,
    caller: Caller,
  ): Promise<void> {
    const operation = this.operation(request);
    authorize(operation, body, caller);
    // dynalite takes IncomingMessage for a stream with method, url and headers, and no more.
    const replay = Object.assign(Readable.from([body], { objectMode: false }), {
      method: request.method,
      url: request.url,
      headers: request.headers,
    });
    this.#server.emit('request', replay, response);
  }

  /** Creates the table, or finds that it is there. Throws when it is there with other keys or indexes. */
  async createTable(name: string, properties: TableProperties): Promise<void> {
    const { ProvisionedThroughput, ...rest } = properties;
    const table = { TableName: name, ...rest, ...(ProvisionedThroughput && { ProvisionedThroughput }) };
    const existing = await this.#describe(name);
    if (existing === undefined) {
      await this.#call('CreateTable', table);
      while ((await this.#describe(name))?.TableStatus !== 'ACTIVE') {
        await new Promise((resolve) => setTimeout(resolve, 5));
      }
      return;
    }
    if (shape(existing) !== shape(properties)) {
      throw new UnsupportedLocally(
        'a change to the keys or indexes of a table that exists (start with a new state folder)',
        name,
      );
    }
  }

  /** Ends what runs and closes the database. */
  async close(): Promise<void> {
    // Only a server that listens closes its store with it.
    await new Promise<void>((resolve, reject) => {
      this.#server.once('error', reject);
      this.#server.listen(0, '127.0.0.1', () => {
        this.#server.close((error) => (error ? reject(error) : resolve()));
      });
    });
  }

  async #describe(name: string) {
    try {
      return tableSchema.parse(await this.#call('DescribeTable', { TableName: name })).Table;
    } catch (error) {
      if (error instanceof ServiceError && error.code === 'ResourceNotFoundException') return undefined;
      throw error;
    }
  }

  /** Calls dynalite as a request would. */
  async #call(operation: string, input: unknown): Promise<unknown> {
    const replay = Object.assign(Readable.from([Buffer.from(JSON.stringify(input))], { objectMode: false }), {
      method: 'POST',
      url: '/',
      headers: {
        'content-type': 'application/x-amz-json-1.0',
        'x-amz-target': `DynamoDB_20120810.${operation}`,
        'x-amz-date': 'local',
        authorization: 'AWS4-HMAC-SHA256 Credential=local, SignedHeaders=host, Signature=local',
      },
    });
    return await new Promise((resolve, reject) => {
      const chunks: Buffer[] = [];
      const answer = Object.assign(
        new Writable({
          write(chunk: Buffer, _encoding, done) {
            chunks.push(chunk);
            done();
          },
          final(done) {
            done();
            const output = JSON.parse(Buffer.concat(chunks).toString('utf8')) as Record<string, unknown>;
            if (answer.statusCode === 200) return resolve(output);
            const code = String(output.__type).split('#').at(-1) ?? 'InternalFailure';
            reject(new ServiceError(code, String(output.message ?? code), answer.statusCode));
          },
        }),
        { statusCode: 200, setHeader() {} },
      );
      this.#server.emit('request', replay, answer);
    });
  }
}

/** dynalite takes the region of its ARNs from the environment, once, when it starts. */
function inRegion<T>(region: string, make: () => T): T {
  const before = process.env.AWS_REGION;
  process.env.AWS_REGION = region;
  try {
    return make();
  } finally {
    if (before === undefined) delete process.env.AWS_REGION;
    else process.env.AWS_REGION = before;
  }
}

/** Keys and indexes, in a form that compares. */
function shape(table: {
  KeySchema: unknown;
  AttributeDefinitions: { AttributeName: string }[];
  GlobalSecondaryIndexes?: { IndexName: string; KeySchema: unknown; Projection: unknown }[] | undefined;
  LocalSecondaryIndexes?: { IndexName: string; KeySchema: unknown; Projection: unknown }[] | undefined;
}): string {
  const indexes = (list: typeof table.GlobalSecondaryIndexes) =>
    [...(list ?? [])]
      .sort((a, b) => (a.IndexName < b.IndexName ? -1 : 1))
      .map(({ IndexName, KeySchema, Projection }) => [IndexName, KeySchema, Projection]);
  return canonical([
    table.KeySchema,
    [...table.AttributeDefinitions].sort((a, b) => (a.AttributeName < b.AttributeName ? -1 : 1)),
    indexes(table.GlobalSecondaryIndexes),
    indexes(table.LocalSecondaryIndexes),
  ]);
}

/** JSON with sorted keys. */
function canonical(value: unknown): string {
  return JSON.stringify(value, (_key, item: unknown) =>
    typeof item === 'object' && item !== null && !Array.isArray(item)
      ? Object.fromEntries(Object.entries(item).sort(([a], [b]) => (a < b ? -1 : 1)))
      : item,
  );
}

const inputSchema = z.looseObject({
  TableName: z.string().optional(),
  IndexName: z.string().optional(),
  RequestItems: z.record(z.string(), z.unknown()).optional(),
});

/** Checks the right to each table or index that a request names, and refuses parameters dynalite would ignore. */
function authorize(operation: string, body: Buffer, caller: Caller): void {
  const input = readInput(body);
  for (const [parameter, harmless] of Object.entries(IGNORED_PARAMETERS)) {
    if (input[parameter] !== undefined && input[parameter] !== harmless) {
      throw new ServiceError(
        'ValidationException',
        `The local AWS does not support ${parameter} in dynamodb:${operation}. It refuses rather than ignore it.`,
      );
    }
  }
  const action = `dynamodb:${operation}`;
  const tables = input.RequestItems
    ? Object.keys(input.RequestItems)
    : input.TableName === undefined
      ? []
      : [input.TableName];
  if (tables.length === 0) caller.authorize(action, '*');
  for (const table of tables) {
    const arn = table.startsWith('arn:') ? table : tableArn(table);
    caller.authorize(action, input.IndexName === undefined ? arn : `${arn}/index/${input.IndexName}`);
  }
}

function readInput(body: Buffer) {
  try {
    return inputSchema.parse(JSON.parse(body.toString('utf8')));
  } catch {
    throw new ServiceError('SerializationException', 'The body is not a DynamoDB request.');
  }
}
