/**
 * The resource types of CloudFormation that the local AWS creates: for each, the properties it honours, those
 * that have no effect on one machine (and why), and what Ref and Fn::GetAtt answer. Anything else is refused.
 */
import { z } from 'zod';
import { LOCK_MODES } from './s3/lock.ts';
import { LOCAL_ACCOUNT, LOCAL_REGION } from './types.ts';

const number = z.coerce.number();
const boolean = z.union([z.boolean(), z.enum(['true', 'false']).transform((text) => text === 'true')]);
/** Read by another part (IAM, Step Functions), which refuses what it does not know. */
const document = z.unknown();

/** Reasons why a property has no effect, said once. */
const NOT_BILLED = 'nothing is billed on one machine';
const NOT_ENCRYPTED = 'files are as private as the disk they lie on';
const NOT_REMOTE = 'nothing but this machine reaches the local AWS';
const NOT_EXPIRED = 'a laptop keeps its lines until the state folder is deleted';
const NOT_LABELLED = 'nobody searches a laptop by tag';
const NOT_REPLICATED = 'one machine has one copy; back up the state folder';
const NOT_TRACED = 'there is no tracing service on one machine';
const NOT_WATCHED = 'there is nobody to page; runs are watched in the terminal';
const NOT_PULLED = 'images are built from containers/, never pulled';

export interface ResourceType<Schema extends z.ZodType = z.ZodType> {
  /** The property that holds the physical name; without it a name is made. */
  nameProperty?: string;
  /** What is honoured, strictly. */
  schema: Schema;
  /** What has no effect here: property → why. `*` stands for the whole resource. */
  noEffect: Record<string, string>;
  ref(name: string): string;
  attributes: Record<string, (name: string) => string>;
}

function type<Schema extends z.ZodType>(definition: ResourceType<Schema>): ResourceType<Schema> {
  return definition;
}

const arn = (service: string, path: string) => (name: string) =>
  `arn:aws:${service}:${LOCAL_REGION}:${LOCAL_ACCOUNT}:${path}${name}`;
const itself = (name: string) => name;

export const bucketArn = (name: string) => `arn:aws:s3:::${name}`;
export const roleArn = (name: string) => `arn:aws:iam::${LOCAL_ACCOUNT}:role/${name}`;
export const tableArn = arn('dynamodb', 'table/');
export const topicArn = arn('sns', '');
export const functionArn = arn('lambda', 'function:');
export const stateMachineArn = arn('states', 'stateMachine:');
export const ruleArn = arn('events', 'rule/');
export const queueArn = arn('sqs', '');
/** The address of a queue as AWS gives it; the local service knows a queue by its end. */
const queueUrl = (name: string) => `https://sqs.${LOCAL_REGION}.amazonaws.com/${LOCAL_ACCOUNT}/${name}`;

const keySchema = z.array(z.strictObject({ AttributeName: z.string(), KeyType: z.enum(['HASH', 'RANGE']) }));
const projection = z.strictObject({
  ProjectionType: z.enum(['ALL', 'KEYS_ONLY', 'INCLUDE']),
  NonKeyAttributes: z.array(z.string()).optional(),
});
const throughput = z.strictObject({ ReadCapacityUnits: number, WriteCapacityUnits: number });
const index = z.strictObject({
  IndexName: z.string(),
  KeySchema: keySchema,
  Projection: projection,
  ProvisionedThroughput: throughput.optional(),
});

const retention = z.union([
  z.strictObject({ Mode: z.enum(LOCK_MODES), Days: number.int().min(1) }),
  z.strictObject({ Mode: z.enum(LOCK_MODES), Years: number.int().min(1) }),
]);

const days = number.int().min(1);
const lifecycleRule = z.strictObject({
  Id: z.string(),
  Status: z.enum(['Enabled', 'Disabled']),
  Prefix: z.string().default(''),
  TagFilters: z.array(z.strictObject({ Key: z.string(), Value: z.string() })).default([]),
  ExpirationInDays: days.optional(),
  NoncurrentVersionExpiration: z.strictObject({ NoncurrentDays: days }).optional(),
  AbortIncompleteMultipartUpload: z.strictObject({ DaysAfterInitiation: days }).optional(),
});

const policy = z.strictObject({ PolicyName: z.string(), PolicyDocument: document });

/** A resource of which nothing can be noticed on one machine. */
function withoutEffect(why: string, service: string, path: string): ResourceType<z.ZodObject> {
  return {
    schema: z.looseObject({}),
    noEffect: { '*': why },
    ref: itself,
    attributes: { Arn: arn(service, path) },
  };
}

export const RESOURCE_TYPES = {
  'AWS::S3::Bucket': type({
    nameProperty: 'BucketName',
    schema: z.strictObject({
      VersioningConfiguration: z.strictObject({ Status: z.enum(['Enabled', 'Suspended']) }).optional(),
      NotificationConfiguration: z
        .strictObject({
          EventBridgeConfiguration: z.strictObject({ EventBridgeEnabled: boolean.default(true) }),
        })
        .optional(),
      ObjectLockEnabled: boolean.optional(),
      ObjectLockConfiguration: z
        .strictObject({
          ObjectLockEnabled: z.literal('Enabled'),
          Rule: z.strictObject({ DefaultRetention: retention }).optional(),
        })
        .optional(),
      LifecycleConfiguration: z.strictObject({ Rules: z.array(lifecycleRule) }).optional(),
    }),
    noEffect: {
      BucketEncryption: NOT_ENCRYPTED,
      PublicAccessBlockConfiguration: NOT_REMOTE,
      OwnershipControls: 'there is one account',
      LoggingConfiguration: NOT_REMOTE,
      IntelligentTieringConfigurations: NOT_BILLED,
      Tags: NOT_LABELLED,
    },
    ref: itself,
    attributes: {
      Arn: bucketArn,
      DomainName: (name) => `${name}.s3.amazonaws.com`,
      RegionalDomainName: (name) => `${name}.s3.${LOCAL_REGION}.amazonaws.com`,
    },
  }),
  'AWS::S3::BucketPolicy': type({
    schema: z.strictObject({ Bucket: z.string(), PolicyDocument: document }),
    noEffect: {},
    ref: itself,
    attributes: {},
  }),
  'AWS::DynamoDB::Table': type({
    nameProperty: 'TableName',
    schema: z.strictObject({
      AttributeDefinitions: z.array(
        z.strictObject({ AttributeName: z.string(), AttributeType: z.enum(['S', 'N', 'B']) }),
      ),
      KeySchema: keySchema,
      GlobalSecondaryIndexes: z.array(index).optional(),
      LocalSecondaryIndexes: z.array(index.omit({ ProvisionedThroughput: true })).optional(),
      BillingMode: z.enum(['PAY_PER_REQUEST', 'PROVISIONED']).optional(),
      ProvisionedThroughput: throughput.optional(),
    }),
    noEffect: {
      PointInTimeRecoverySpecification: NOT_REPLICATED,
      SSESpecification: NOT_ENCRYPTED,
      DeletionProtectionEnabled: 'the local AWS deletes no table',
      ContributorInsightsSpecification: NOT_WATCHED,
      OnDemandThroughput: NOT_BILLED,
      TableClass: NOT_BILLED,
      Tags: NOT_LABELLED,
    },
    ref: itself,
    attributes: { Arn: tableArn },
  }),
  'AWS::SQS::Queue': type({
    nameProperty: 'QueueName',
    schema: z.strictObject({
      VisibilityTimeout: number.optional(),
      MessageRetentionPeriod: number.optional(),
    }),
    noEffect: {
      KmsDataKeyReusePeriodSeconds: NOT_ENCRYPTED,
      KmsMasterKeyId: NOT_ENCRYPTED,
      SqsManagedSseEnabled: NOT_ENCRYPTED,
      Tags: NOT_LABELLED,
    },
    ref: queueUrl,
    attributes: { Arn: queueArn, QueueName: itself, QueueUrl: queueUrl },
  }),
  'AWS::SQS::QueuePolicy': type({
    schema: z.strictObject({ Queues: z.array(z.string()), PolicyDocument: document }),
    noEffect: {},
    ref: itself,
    attributes: {},
  }),
  'AWS::SNS::Topic': type({
    nameProperty: 'TopicName',
    schema: z.strictObject({
      Subscription: z
        .array(z.strictObject({ Protocol: z.literal('email'), Endpoint: z.string() }))
        .optional(),
    }),
    noEffect: {
      DisplayName: 'messages are shown, not mailed',
      KmsMasterKeyId: NOT_ENCRYPTED,
      TracingConfig: NOT_TRACED,
      Tags: NOT_LABELLED,
    },
    ref: topicArn,
    attributes: { TopicArn: topicArn, TopicName: itself },
  }),
  'AWS::SNS::TopicPolicy': type({
    schema: z.strictObject({ Topics: z.array(z.string()), PolicyDocument: document }),
    noEffect: {},
    ref: itself,
    attributes: {},
  }),
  'AWS::SNS::Subscription': type({
    schema: z.strictObject({ TopicArn: z.string(), Protocol: z.literal('email'), Endpoint: z.string() }),
    noEffect: {},
    ref: itself,
    attributes: {},
  }),
  'AWS::IAM::Role': type({
    nameProperty: 'RoleName',
    schema: z.strictObject({
      AssumeRolePolicyDocument: document,
      Policies: z.array(policy).default([]),
      ManagedPolicyArns: z.array(z.string()).default([]),
      Path: z.literal('/').optional(),
    }),
    noEffect: {
      Description: NOT_LABELLED,
      MaxSessionDuration: 'local access keys do not expire',
      Tags: NOT_LABELLED,
    },
    ref: itself,
    attributes: { Arn: roleArn },
  }),
  'AWS::IAM::Policy': type({
    nameProperty: 'PolicyName',
    schema: z.strictObject({ PolicyDocument: document, Roles: z.array(z.string()).min(1) }),
    noEffect: {},
    ref: itself,
    attributes: {},
  }),
  'AWS::Lambda::Function': type({
    nameProperty: 'FunctionName',
    schema: z.strictObject({
      Code: z.strictObject({ S3Bucket: z.string(), S3Key: z.string() }),
      Handler: z.string(),
      Role: z.string(),
      Runtime: z.string(),
      MemorySize: number.default(128),
      Timeout: number.default(3),
      Environment: z.strictObject({ Variables: z.record(z.string(), z.coerce.string()) }).optional(),
      PackageType: z.literal('Zip').optional(),
      ReservedConcurrentExecutions: number.min(1).optional(),
    }),
    noEffect: {
      Architectures: "bundles run on this machine's architecture",
      Description: NOT_LABELLED,
      EphemeralStorage: "functions share the machine's temporary folder",
      KmsKeyArn: NOT_ENCRYPTED,
      Tags: NOT_LABELLED,
      TracingConfig: NOT_TRACED,
      VpcConfig: NOT_REMOTE,
    },
    ref: itself,
    attributes: { Arn: functionArn },
  }),
  'AWS::Lambda::Version': type({
    schema: z.strictObject({ FunctionName: z.string() }),
    noEffect: { CodeSha256: 'the bundle of the package is what runs', Description: NOT_LABELLED },
    // A version's name is the function it belongs to; there is one version here.
    ref: functionArn,
    attributes: { Version: () => '1' },
  }),
  'AWS::Lambda::EventInvokeConfig': type({
    schema: z.strictObject({
      FunctionName: z.string(),
      Qualifier: z.literal('$LATEST'),
      MaximumRetryAttempts: number.int().min(0).max(2).default(2),
      DestinationConfig: z
        .strictObject({ OnFailure: z.strictObject({ Destination: z.string() }).optional() })
        .optional(),
    }),
    noEffect: { MaximumEventAgeInSeconds: 'what is retried here is retried within seconds' },
    ref: itself,
    attributes: {},
  }),
  'AWS::Lambda::Permission': type({
    schema: z.strictObject({
      Action: z.literal('lambda:InvokeFunction'),
      /** Name or ARN. */
      FunctionName: z.string(),
      Principal: z.string(),
      SourceArn: z.string().optional(),
      SourceAccount: z.string().optional(),
    }),
    noEffect: {},
    ref: itself,
    attributes: {},
  }),
  'AWS::Logs::LogGroup': type({
    nameProperty: 'LogGroupName',
    schema: z.strictObject({}),
    noEffect: { RetentionInDays: NOT_EXPIRED, KmsKeyId: NOT_ENCRYPTED, Tags: NOT_LABELLED },
    ref: itself,
    attributes: { Arn: (name) => `${arn('logs', 'log-group:')(name)}:*` },
  }),
  'AWS::Events::Rule': type({
    nameProperty: 'Name',
    schema: z.strictObject({
      EventBusName: z.literal('default').optional(),
      EventPattern: z.record(z.string(), z.unknown()).optional(),
      ScheduleExpression: z.string().optional(),
      State: z.enum(['ENABLED', 'DISABLED']).default('ENABLED'),
      Targets: z
        .array(
          z.strictObject({
            Id: z.string(),
            Arn: z.string(),
            RoleArn: z.string().optional(),
            Input: z.string().optional(),
            InputPath: z.string().optional(),
            InputTransformer: z
              .strictObject({
                InputPathsMap: z.record(z.string(), z.string()).default({}),
                InputTemplate: z.string(),
              })
              .optional(),
            RetryPolicy: z
              .strictObject({
                MaximumRetryAttempts: number.default(185),
                MaximumEventAgeInSeconds: number.default(86_400),
              })
              .optional(),
            DeadLetterConfig: z.strictObject({ Arn: z.string() }).optional(),
          }),
        )
        .default([]),
    }),
    noEffect: { Description: NOT_LABELLED, Tags: NOT_LABELLED },
    ref: itself,
    attributes: { Arn: ruleArn },
  }),
  'AWS::StepFunctions::StateMachine': type({
    nameProperty: 'StateMachineName',
    schema: z.strictObject({
      DefinitionString: z.string().optional(),
      Definition: z.record(z.string(), z.unknown()).optional(),
      DefinitionSubstitutions: z.record(z.string(), z.coerce.string()).optional(),
      RoleArn: z.string(),
      StateMachineType: z.literal('STANDARD').optional(),
    }),
    noEffect: {
      EncryptionConfiguration: NOT_ENCRYPTED,
      LoggingConfiguration: 'the history of each execution is kept in the state folder',
      Tags: NOT_LABELLED,
      TracingConfiguration: NOT_TRACED,
    },
    ref: stateMachineArn,
    attributes: { Arn: stateMachineArn, Name: itself },
  }),
  'AWS::ECR::Repository': type({
    nameProperty: 'RepositoryName',
    schema: z.strictObject({}),
    noEffect: {
      EmptyOnDelete: NOT_PULLED,
      EncryptionConfiguration: NOT_PULLED,
      ImageScanningConfiguration: NOT_PULLED,
      ImageTagMutability: NOT_PULLED,
      LifecyclePolicy: NOT_PULLED,
      RepositoryPolicyText: NOT_PULLED,
      Tags: NOT_LABELLED,
    },
    ref: itself,
    attributes: {
      Arn: arn('ecr', 'repository/'),
      RepositoryUri: (name) => `${LOCAL_ACCOUNT}.dkr.ecr.${LOCAL_REGION}.amazonaws.com/${name}`,
    },
  }),
  'AWS::CloudWatch::Alarm': withoutEffect(NOT_WATCHED, 'cloudwatch', 'alarm:'),
  'AWS::CloudWatch::CompositeAlarm': withoutEffect(NOT_WATCHED, 'cloudwatch', 'alarm:'),
  'AWS::CloudWatch::Dashboard': withoutEffect(NOT_WATCHED, 'cloudwatch', 'dashboard/'),
  'AWS::Logs::MetricFilter': withoutEffect(NOT_WATCHED, 'logs', 'metric-filter:'),
  'AWS::KMS::Key': withoutEffect(NOT_ENCRYPTED, 'kms', 'key/'),
  'AWS::KMS::Alias': withoutEffect(NOT_ENCRYPTED, 'kms', ''),
};

export type TypeName = keyof typeof RESOURCE_TYPES;

/** A resource with everything resolved: `properties` are those honoured, as their schema reads them. */
export type Resource = {
  [T in TypeName]: {
    type: T;
    logicalId: string;
    /** Physical name, as the template gives it or made from stack and logical id. */
    name: string;
    properties: z.infer<(typeof RESOURCE_TYPES)[T]['schema']>;
  };
}[TypeName];

export function isKnownType(name: string): name is TypeName {
  return Object.hasOwn(RESOURCE_TYPES, name);
}
