/** S3, DynamoDB, SNS and SageMaker as the functions meet them: the local AWS's own services, over HTTP, in a folder of their own. */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { DynamoDBClient } from '@aws-sdk/client-dynamodb';
import { S3Client } from '@aws-sdk/client-s3';
import { SNSClient } from '@aws-sdk/client-sns';
import { DynamoDBDocumentClient } from '@aws-sdk/lib-dynamodb';

import { venvFolder, venvPython } from '../../cli/paths.ts';
import { Holdings } from '../../core/holdings.ts';
import { Late } from '../../core/late.ts';
import { Lineage } from '../../core/lineage.ts';
import { StateTable } from '../../core/state.ts';
import { DynamoDb } from '../../local/dynamodb.ts';
import { Gateway } from '../../local/gateway.ts';
import { Logs } from '../../local/logs.ts';
import { topicArn } from '../../local/resources.ts';
import type { LockMode } from '../../local/s3/lock.ts';
import { S3Service } from '../../local/s3/service.ts';
import { SageMaker } from '../../local/sagemaker/service.ts';
import { type Message, Sns } from '../../local/sns.ts';
import { LOCAL_REGION } from '../../local/types.ts';

const KEYS = [
  { AttributeName: 'pk', KeyType: 'HASH' },
  { AttributeName: 'sk', KeyType: 'RANGE' },
] as const;
const ATTRIBUTES = KEYS.map(({ AttributeName }) => ({ AttributeName, AttributeType: 'S' as const }));

export interface Services {
  endpoint: string;
  /** Where the services keep what they have. */
  folder: string;
  /** A versioned bucket, under Object Lock where a mode is given. */
  createBucket(name: string, lock?: LockMode): Promise<void>;
  s3: S3Client;
  sns: SNSClient;
  documents: DynamoDBDocumentClient;
  state: StateTable;
  holdings: Holdings;
  late: Late;
  /** What ingestion does with content that it has. */
  duplicates: 'skip';
  lineage: Lineage;
  silver: string;
  topicArn: string;
  messages: Message[];
  close(): Promise<void>;
}

export const CREDENTIALS = { accessKeyId: 'AKIATEST', secretAccessKey: 'secret' };

export async function startServices(): Promise<Services> {
  const folder = await mkdtemp(join(tmpdir(), 'slideway-test-'));
  const messages: Message[] = [];
  const s3Service = new S3Service({ folder: join(folder, 's3'), onObjectCreated: async () => {} });
  await s3Service.createBucket('silver', { versioning: true, eventBridge: false });
  const tables = new DynamoDb({ folder: join(folder, 'dynamodb') });
  const table = { BillingMode: 'PAY_PER_REQUEST' as const, KeySchema: [...KEYS] };
  await tables.createTable('lineage', { ...table, AttributeDefinitions: ATTRIBUTES });
  await tables.createTable('state', {
    ...table,
    AttributeDefinitions: [
      ...ATTRIBUTES,
      { AttributeName: 'runs', AttributeType: 'S' },
      { AttributeName: 'startedAt', AttributeType: 'S' },
    ],
    GlobalSecondaryIndexes: [
      {
        IndexName: 'runs',
        KeySchema: [
          { AttributeName: 'runs', KeyType: 'HASH' },
          { AttributeName: 'startedAt', KeyType: 'RANGE' },
        ],
        Projection: { ProjectionType: 'ALL' },
      },
    ],
  });
  const topics = new Sns({
    folder: join(folder, 'messages'),
    onMessage: (message) => messages.push(message),
  });
  topics.createTopic('runs', []);
  const sageMaker = new SageMaker({
    folder: join(folder, 'jobs'),
    endpoint: () => gateway.endpoint,
    credentials: () => CREDENTIALS,
    logs: new Logs({ folder: join(folder, 'logs') }),
    containers: () => ({ folder }),
    python: venvPython(venvFolder()),
    executor: 'process',
  });
  const caller = { arn: 'arn:aws:iam::000000000000:root', authorize: () => {} };
  const gateway: Gateway = new Gateway({
    services: {
      s3: { protocol: 's3', service: s3Service },
      dynamodb: { protocol: 'json-body', service: tables },
      sns: { protocol: 'query-body', service: topics },
      sagemaker: { protocol: 'json', service: sageMaker },
    },
    principals: () => ({ caller, secretAccessKey: CREDENTIALS.secretAccessKey }),
  });
  await gateway.listen(0);

  const options = { endpoint: gateway.endpoint, region: LOCAL_REGION, credentials: CREDENTIALS };
  const s3 = new S3Client({ ...options, forcePathStyle: true });
  const sns = new SNSClient(options);
  const database = new DynamoDBClient(options);
  const documents = DynamoDBDocumentClient.from(database, {
    marshallOptions: { removeUndefinedValues: true },
  });
  return {
    endpoint: gateway.endpoint,
    folder,
    createBucket: (name, mode) =>
      s3Service.createBucket(name, {
        versioning: true,
        eventBridge: false,
        ...(mode && { lock: { default: { mode, days: 1 } } }),
      }),
    s3,
    sns,
    documents,
    state: new StateTable(documents, 'state'),
    holdings: new Holdings(documents, 'state'),
    late: new Late(documents, 'state'),
    duplicates: 'skip',
    lineage: new Lineage(documents, 'lineage', 'test', '0.0.0'),
    silver: 'silver',
    topicArn: topicArn('runs'),
    messages,
    close: async () => {
      for (const client of [s3, sns, database]) client.destroy();
      await gateway.close();
      await tables.close();
      await rm(folder, { recursive: true, force: true });
    },
  };
}
