import {
  BatchWriteItemCommand,
  ConditionalCheckFailedException,
  DescribeTableCommand,
  DynamoDBClient,
  GetItemCommand,
  PutItemCommand,
  QueryCommand,
  TransactWriteItemsCommand,
} from '@aws-sdk/client-dynamodb';
import { describe, expect, it } from 'vitest';
import { DynamoDb } from '../../local/dynamodb.ts';
import type { Credentials } from '../../local/iam.ts';
import { iamWith, serve, temporaryFolder } from './kit.ts';

const STATE = 'arn:aws:dynamodb:us-east-1:000000000000:table/state';
const TABLE = {
  BillingMode: 'PAY_PER_REQUEST' as const,
  AttributeDefinitions: ['pk', 'sk', 'runs', 'startedAt'].map((AttributeName) => ({
    AttributeName,
    AttributeType: 'S' as const,
  })),
  KeySchema: [
    { AttributeName: 'pk', KeyType: 'HASH' as const },
    { AttributeName: 'sk', KeyType: 'RANGE' as const },
  ],
  GlobalSecondaryIndexes: [
    {
      IndexName: 'runs',
      KeySchema: [
        { AttributeName: 'runs', KeyType: 'HASH' as const },
        { AttributeName: 'startedAt', KeyType: 'RANGE' as const },
      ],
      Projection: { ProjectionType: 'ALL' as const },
    },
  ],
};

const iam = iamWith({
  writer: [{ Effect: 'Allow', Action: ['dynamodb:PutItem', 'dynamodb:BatchWriteItem'], Resource: STATE }],
  reader: [{ Effect: 'Allow', Action: 'dynamodb:Query', Resource: `${STATE}/index/runs` }],
});
const as = (name: string) => iam.credentials(`arn:aws:iam::000000000000:role/${name}`);

async function start(folder: string) {
  const dynamodb = new DynamoDb({ folder });
  const gateway = await serve(iam, { dynamodb: { protocol: 'json-body', service: dynamodb } });
  const client = (credentials: Credentials) =>
    new DynamoDBClient({ endpoint: gateway.endpoint, region: 'us-east-1', credentials, maxAttempts: 1 });
  return { dynamodb, gateway, client };
}

const put = (pk: string, startedAt: string) =>
  new PutItemCommand({
    TableName: 'state',
    Item: { pk: { S: pk }, sk: { S: 'RUN' }, runs: { S: 'RUNS' }, startedAt: { S: startedAt } },
    ConditionExpression: 'attribute_not_exists(pk)',
  });

describe('a table', () => {
  it('is created once, and keeps its items over a restart', async () => {
    const folder = temporaryFolder();
    const first = await start(folder);
    await first.dynamodb.createTable('state', TABLE);
    const root = first.client(iam.root);
    await root.send(put('RUN#1', '2026-01-02'));
    await root.send(put('RUN#2', '2026-01-01'));
    await expect(root.send(put('RUN#1', '2027'))).rejects.toThrow(ConditionalCheckFailedException);
    await first.dynamodb.close();

    const second = await start(folder);
    await second.dynamodb.createTable('state', TABLE);
    const found = await second.client(iam.root).send(
      new QueryCommand({
        TableName: 'state',
        IndexName: 'runs',
        KeyConditionExpression: 'runs = :r',
        ExpressionAttributeValues: { ':r': { S: 'RUNS' } },
      }),
    );
    expect(found.Items?.map((item) => item.pk?.S)).toEqual(['RUN#2', 'RUN#1']);
    const described = await second.client(iam.root).send(new DescribeTableCommand({ TableName: 'state' }));
    expect(described.Table?.TableArn).toBe(STATE);
    await second.dynamodb.close();
  });

  it('that would have to change its keys or indexes is refused', async () => {
    const { dynamodb } = await start(temporaryFolder());
    await dynamodb.createTable('state', TABLE);
    const { GlobalSecondaryIndexes: _, ...plain } = TABLE;
    await expect(dynamodb.createTable('state', plain)).rejects.toMatchObject({ name: 'UnsupportedLocally' });
    await dynamodb.createTable('state', {
      ...TABLE,
      AttributeDefinitions: TABLE.AttributeDefinitions.toReversed(),
    });
    await dynamodb.close();
  });

  it('lies in the region of the template, whatever the environment says', async () => {
    const before = process.env.AWS_REGION;
    process.env.AWS_REGION = 'eu-north-1';
    try {
      const { dynamodb, client } = await start(temporaryFolder());
      await dynamodb.createTable('state', TABLE);
      const described = await client(iam.root).send(new DescribeTableCommand({ TableName: 'state' }));
      expect(described.Table?.TableArn).toBe(STATE);
      expect(process.env.AWS_REGION).toBe('eu-north-1');
      await dynamodb.close();
    } finally {
      if (before === undefined) delete process.env.AWS_REGION;
      else process.env.AWS_REGION = before;
    }
  });
});

describe('rights', async () => {
  const { dynamodb, client } = await start(temporaryFolder());
  await dynamodb.createTable('state', TABLE);
  await dynamodb.createTable('lineage', TABLE);
  const query = (IndexName?: string) =>
    new QueryCommand({
      TableName: 'state',
      ...(IndexName === undefined ? {} : { IndexName }),
      KeyConditionExpression: IndexName ? 'runs = :r' : 'pk = :r',
      ExpressionAttributeValues: { ':r': { S: 'RUNS' } },
    });

  it('are those of the action on the table', async () => {
    await client(as('writer')).send(put('RUN#1', '2026'));
    const get = new GetItemCommand({ TableName: 'state', Key: { pk: { S: 'RUN#1' }, sk: { S: 'RUN' } } });
    await expect(client(as('writer')).send(get)).rejects.toMatchObject({
      name: 'AccessDeniedException',
      message: expect.stringContaining(`dynamodb:GetItem on resource: ${STATE}`),
    });
  });

  it('of an index are not those of its table', async () => {
    expect((await client(as('reader')).send(query('runs'))).Count).toBe(1);
    await expect(client(as('reader')).send(query())).rejects.toMatchObject({ name: 'AccessDeniedException' });
  });

  it('are needed for every table of a batch', async () => {
    const item = { PutRequest: { Item: { pk: { S: 'a' }, sk: { S: 'b' } } } };
    const batch = (...tables: string[]) =>
      new BatchWriteItemCommand({ RequestItems: Object.fromEntries(tables.map((name) => [name, [item]])) });
    await client(as('writer')).send(batch('state'));
    await expect(client(as('writer')).send(batch('state', 'lineage'))).rejects.toMatchObject({
      name: 'AccessDeniedException',
    });
  });
});

it('refuses what dynalite would ignore or does not know', async () => {
  const { dynamodb, client } = await start(temporaryFolder());
  await dynamodb.createTable('state', TABLE);
  const root = client(iam.root);
  const asking = put('RUN#1', '2026');
  asking.input.ReturnValuesOnConditionCheckFailure = 'ALL_OLD';
  await expect(root.send(asking)).rejects.toThrow('ReturnValuesOnConditionCheckFailure');
  const transaction = new TransactWriteItemsCommand({
    TransactItems: [{ Put: { TableName: 'state', Item: { pk: { S: 'a' }, sk: { S: 'b' } } } }],
  });
  await expect(root.send(transaction)).rejects.toMatchObject({ name: 'UnknownOperationException' });
  await dynamodb.close();
});

it('takes many writers of one item at once, and lets one win', async () => {
  const { dynamodb, client, gateway } = await start(temporaryFolder());
  await dynamodb.createTable('state', TABLE);
  const writer = client(as('writer'));
  const attempts = await Promise.allSettled(
    Array.from({ length: 20 }, (_, n) => writer.send(put('RUN#1', `${n}`))),
  );
  expect(attempts.filter((attempt) => attempt.status === 'fulfilled')).toHaveLength(1);
  expect(gateway.counts().byClass).toEqual({ 'dynamodb.PutItem': 20 });
  await dynamodb.close();
});
