/**
 * The local AWS in this process, for many schedules one after the other: S3, DynamoDB, SNS and Step Functions with
 * the packaged state machine, whose functions are called here, each over a line of its own.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { gzipSync } from 'node:zlib';
import { DeleteTableCommand, DynamoDBClient } from '@aws-sdk/client-dynamodb';
import { PutObjectCommand, S3Client } from '@aws-sdk/client-s3';
import { DynamoDBDocumentClient } from '@aws-sdk/lib-dynamodb';
import { pack } from 'tar-stream';
import { packageFolder } from '../../cli/setup/package.ts';
import type { Model } from '../../core/contracts.ts';
import { modelKey } from '../../core/keys.ts';
import { DynamoDb } from '../../local/dynamodb.ts';
import { Gateway } from '../../local/gateway.ts';
import { topicArn } from '../../local/resources.ts';
import { type ObjectCreated, S3Service } from '../../local/s3/service.ts';
import { type Message, Sns } from '../../local/sns.ts';
import { StepFunctions } from '../../local/stepfunctions/service.ts';
import { loadPackage } from '../../local/template.ts';
import { type JsonOperation, LOCAL_ACCOUNT, LOCAL_REGION } from '../../local/types.ts';
import { CREDENTIALS } from '../support/services.ts';
import { Container, type Fates } from './container.ts';
import type { Place } from './functions.ts';

const KEYS = [
  { AttributeName: 'pk', KeyType: 'HASH' },
  { AttributeName: 'sk', KeyType: 'RANGE' },
] as const;
const RUNS = [
  { AttributeName: 'runs', KeyType: 'HASH' },
  { AttributeName: 'startedAt', KeyType: 'RANGE' },
] as const;
const string = (AttributeName: string) => ({ AttributeName, AttributeType: 'S' as const });

const ROLE = `arn:aws:iam::${LOCAL_ACCOUNT}:role/slide-run`;
const MACHINE = `arn:aws:states:${LOCAL_REGION}:${LOCAL_ACCOUNT}:stateMachine:slide-run`;
/** An hour of the state machine's waits is so many milliseconds. */
const TIME_SCALE = 0.1 / 3600;

/** What a schedule has to say to what happens in its study. */
export interface Director {
  arrived(object: ObjectCreated): void;
  sent(message: Message): void;
  /** An execution that one of the functions has started. */
  started(executionArn: string): void;
  invoke(functionName: string, payload: unknown): Promise<unknown>;
  fates(): Fates;
}

const BUCKETS = {
  landing: `slideway-dev-landing-${LOCAL_ACCOUNT}`,
  bronze: `slideway-dev-bronze-${LOCAL_ACCOUNT}`,
  silver: `slideway-dev-silver-${LOCAL_ACCOUNT}`,
  models: `slideway-dev-models-${LOCAL_ACCOUNT}`,
};

export class World {
  readonly endpoint: string;
  /** Clients on which nothing goes wrong. */
  readonly s3: S3Client;
  readonly documents: DynamoDBDocumentClient;
  readonly stepFunctions: StepFunctions;
  readonly container: Container;
  readonly #directors: Map<string, Director>;
  readonly #tables: DynamoDb;
  readonly #close: () => Promise<void>;

  private constructor(
    parts: Pick<World, 'endpoint' | 's3' | 'documents' | 'stepFunctions' | 'container'> & {
      directors: Map<string, Director>;
      tables: DynamoDb;
      close(): Promise<void>;
    },
  ) {
    this.endpoint = parts.endpoint;
    this.s3 = parts.s3;
    this.documents = parts.documents;
    this.stepFunctions = parts.stepFunctions;
    this.container = parts.container;
    this.#directors = parts.directors;
    this.#tables = parts.tables;
    this.#close = parts.close;
  }

  /**
   * Everything that names `study` goes to `director` from now on. Names of studies are `seed-<seed>`. Each has tables
   * of its own, so that one schedule is nothing to the next.
   */
  async begin(study: string, director: Director): Promise<Place> {
    const [stateTable, lineageTable] = [`${study}-state`, `${study}-lineage`];
    const table = { BillingMode: 'PAY_PER_REQUEST' as const, KeySchema: [...KEYS] };
    await this.#tables.createTable(stateTable, {
      ...table,
      AttributeDefinitions: [...KEYS, ...RUNS].map(({ AttributeName }) => string(AttributeName)),
      GlobalSecondaryIndexes: [
        { IndexName: 'runs', KeySchema: [...RUNS], Projection: { ProjectionType: 'ALL' } },
      ],
    });
    await this.#tables.createTable(lineageTable, {
      ...table,
      AttributeDefinitions: KEYS.map(({ AttributeName }) => string(AttributeName)),
    });
    this.#directors.set(study, director);
    return { ...BUCKETS, stateTable, lineageTable, topicArn: topicArn('runs'), stateMachineArn: MACHINE };
  }

  async end(study: string): Promise<void> {
    this.#directors.delete(study);
    for (const table of ['state', 'lineage'])
      await this.documents.send(new DeleteTableCommand({ TableName: `${study}-${table}` }));
  }

  /** Starts an execution; the same name and input give the same one. Answers its ARN. */
  async start(name: string, input: unknown): Promise<string> {
    const start = this.stepFunctions.operations.StartExecution;
    const execution = { stateMachineArn: MACHINE, name, input: JSON.stringify(input) };
    const answer = await start?.(execution as never, CALLER);
    return (answer as { executionArn: string }).executionArn;
  }

  /** Status of an execution that has ended. */
  async ended(executionArn: string): Promise<string> {
    await this.stepFunctions.ended(executionArn);
    const answer = await this.stepFunctions.operations.DescribeExecution?.({ executionArn } as never, CALLER);
    return (answer as { status: string }).status;
  }

  close(): Promise<void> {
    return this.#close();
  }

  static async open(models: readonly Model[]): Promise<World> {
    const folder = await mkdtemp(join(tmpdir(), 'slideway-faults-'));
    const directors = new Map<string, Director>();
    /** By the study that a key, an id or a payload names. */
    const director = (text: string): Director => {
      const study = /seed-\d+/.exec(text)?.[0] ?? '';
      const found = directors.get(study);
      if (!found) throw new Error(`Nobody directs ${text.slice(0, 200)}`);
      return found;
    };

    const s3Service = new S3Service({
      folder: join(folder, 's3'),
      onObjectCreated: async (object) => director(object.key).arrived(object),
    });
    for (const [name, bucket] of Object.entries(BUCKETS)) {
      await s3Service.createBucket(bucket, { versioning: true, eventBridge: name === 'landing' });
    }
    await s3Service.recover();
    const tables = new DynamoDb({ folder: join(folder, 'dynamodb') });
    const topics = new Sns({
      folder: join(folder, 'messages'),
      onMessage: (message) => director(`${message.attributes.runId} ${message.message}`).sent(message),
    });
    topics.createTopic('runs', []);

    let endpoint = '';
    let s3: S3Client | undefined;
    const container = new Container({
      s3: () => s3 as S3Client,
      models: new Map(models.map((model) => [model.name, model])),
      fates: (runId) => director(runId).fates(),
    });
    const stepFunctions = new StepFunctions({
      folder: join(folder, 'executions'),
      endpoint: () => endpoint,
      credentials: () => CREDENTIALS,
      invokeLambda: async (arn, payload) => {
        const name =
          arn
            .split(':')
            .at(-1)
            ?.replace(/^slideway-dev-/, '') ?? '';
        return director(JSON.stringify(payload)).invoke(name, payload);
      },
      timeScale: TIME_SCALE,
    });
    stepFunctions.createStateMachine({
      name: 'slide-run',
      arn: MACHINE,
      roleArn: ROLE,
      definition: definition(),
    });
    const start: JsonOperation = async (input: { input: string }, caller) => {
      const answer = await stepFunctions.operations.StartExecution?.(input as never, caller);
      director(input.input).started((answer as { executionArn: string }).executionArn);
      return answer;
    };
    const gateway = new Gateway({
      services: {
        s3: { protocol: 's3', service: s3Service },
        dynamodb: { protocol: 'json-body', service: tables },
        sns: { protocol: 'query-body', service: topics },
        sagemaker: { protocol: 'json', service: container },
        states: { protocol: 'json', service: { operations: { StartExecution: start } } },
      },
      principals: () => ({ caller: CALLER, secretAccessKey: CREDENTIALS.secretAccessKey }),
    });
    await gateway.listen(0);
    endpoint = gateway.endpoint;

    const options = { endpoint, region: LOCAL_REGION, credentials: CREDENTIALS };
    s3 = new S3Client({ ...options, forcePathStyle: true });
    const database = new DynamoDBClient(options);
    const documents = DynamoDBDocumentClient.from(database);
    for (const model of models) {
      const key = modelKey(model.name, model.version);
      const Body = await packageOf(model);
      await s3.send(new PutObjectCommand({ Bucket: BUCKETS.models, Key: key, Body }));
    }
    const close = async () => {
      await stepFunctions.close();
      s3?.destroy();
      database.destroy();
      await gateway.close();
      await s3Service.close();
      await tables.close();
      await rm(folder, { recursive: true, force: true });
    };
    return new World({ endpoint, s3, documents, stepFunctions, container, directors, tables, close });
  }
}

const CALLER = { arn: `arn:aws:iam::${LOCAL_ACCOUNT}:root`, authorize: () => {} };

/** The state machine as it was packaged; SLIDEWAY_PACKAGE names another package's folder. */
function definition(): unknown {
  const { resources } = loadPackage(resolve(process.env.SLIDEWAY_PACKAGE || packageFolder('dev')));
  for (const { type, properties } of resources)
    if (type === 'AWS::StepFunctions::StateMachine') return JSON.parse(properties.DefinitionString ?? '');
  throw new Error('The package has no state machine.');
}

async function packageOf(model: Model): Promise<Buffer> {
  const archive = pack();
  archive.entry({ name: 'model.json' }, JSON.stringify(model));
  archive.entry({ name: 'model.pt' }, 'weights');
  archive.finalize();
  const chunks: Buffer[] = [];
  for await (const chunk of archive) chunks.push(chunk as Buffer);
  return gzipSync(Buffer.concat(chunks));
}
