/** What a function fails for good, and what no target takes, ends in the queue that the template names. */
import { InvokeCommand, LambdaClient } from '@aws-sdk/client-lambda';
import { PutObjectCommand, S3Client } from '@aws-sdk/client-s3';
import { GetQueueUrlCommand, ReceiveMessageCommand, SQSClient } from '@aws-sdk/client-sqs';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { type LocalAws, startLocalAws } from '../../local/engine.ts';
import { projectPython } from '../support/python.ts';
import { packaged, role, temporaryFolder } from './kit.ts';

const HANDLER = `export const handler = async (event) => {
  if (event.well) return { did: event.well };
  throw new TypeError('cannot ' + event.detail.object.key);
};`;

const arn = (logicalId: string) => ({ 'Fn::GetAtt': [logicalId, 'Arn'] });
const queue = (name: string) => ({ Type: 'AWS::SQS::Queue', Properties: { QueueName: name } });
const rule = (prefix: string) => ({
  Type: 'AWS::Events::Rule',
  Properties: {
    Name: `on-${prefix}`,
    EventPattern: {
      source: ['aws.s3'],
      'detail-type': ['Object Created'],
      detail: { object: { key: [{ prefix }] } },
    },
    Targets: [
      {
        Id: 'fail',
        Arn: arn('Fail'),
        RetryPolicy: { MaximumRetryAttempts: 20 },
        DeadLetterConfig: { Arn: arn('Events') },
      },
    ],
  },
});

const TEMPLATE = {
  Resources: {
    Landing: {
      Type: 'AWS::S3::Bucket',
      Properties: {
        BucketName: 'landing',
        NotificationConfiguration: { EventBridgeConfiguration: { EventBridgeEnabled: true } },
      },
    },
    Events: queue('dead-events'),
    Invocations: queue('dead-invocations'),
    EventsPolicy: {
      Type: 'AWS::SQS::QueuePolicy',
      Properties: {
        Queues: [{ Ref: 'Events' }],
        PolicyDocument: {
          Statement: [
            {
              Effect: 'Allow',
              Principal: { Service: 'events.amazonaws.com' },
              Action: 'sqs:SendMessage',
              Resource: arn('Events'),
            },
          ],
        },
      },
    },
    FailRole: {
      Type: 'AWS::IAM::Role',
      Properties: role('lambda.amazonaws.com', [
        { Effect: 'Allow', Action: 'sqs:SendMessage', Resource: arn('Invocations') },
      ]),
    },
    Fail: {
      Type: 'AWS::Lambda::Function',
      Properties: {
        FunctionName: 'fail',
        Code: { S3Bucket: 'deployment', S3Key: 'serverless/lab/dev/1/fail.zip' },
        Handler: 'handler.handler',
        Runtime: 'nodejs24.x',
        Role: arn('FailRole'),
        Timeout: 10,
      },
    },
    FailInvocations: {
      Type: 'AWS::Lambda::EventInvokeConfig',
      Properties: {
        FunctionName: { Ref: 'Fail' },
        Qualifier: '$LATEST',
        MaximumRetryAttempts: 1,
        DestinationConfig: { OnFailure: { Destination: arn('Invocations') } },
      },
    },
    Allowed: rule('allowed/'),
    Denied: rule('denied/'),
    Permission: {
      Type: 'AWS::Lambda::Permission',
      Properties: {
        Action: 'lambda:InvokeFunction',
        FunctionName: { Ref: 'Fail' },
        Principal: 'events.amazonaws.com',
        SourceArn: arn('Allowed'),
      },
    },
  },
};

let aws: LocalAws;
let config: { endpoint: string; region: string; credentials: LocalAws['credentials'] };
beforeAll(async () => {
  aws = await startLocalAws({
    state: temporaryFolder(),
    package: packaged(TEMPLATE, { fail: { 'handler.mjs': HANDLER } }),
    python: projectPython(),
    containers: temporaryFolder(),
  });
  const { endpoint, region, credentials } = aws;
  config = { endpoint, region, credentials };
});
afterAll(() => aws.stop());

async function land(Key: string): Promise<void> {
  await new S3Client({ ...config, forcePathStyle: true }).send(
    new PutObjectCommand({ Bucket: 'landing', Key, Body: 'x' }),
  );
}

async function letter(QueueName: string) {
  const sqs = new SQSClient(config);
  const { QueueUrl } = await sqs.send(new GetQueueUrlCommand({ QueueName }));
  const { Messages = [] } = await sqs.send(new ReceiveMessageCommand({ QueueUrl, WaitTimeSeconds: 10 }));
  return Messages[0];
}

it('an invocation that fails every time goes to the function’s destination, with what it got and answered', async () => {
  await land('allowed/a');
  expect(JSON.parse((await letter('dead-invocations'))?.Body ?? '')).toMatchObject({
    requestContext: {
      functionArn: 'arn:aws:lambda:us-east-1:000000000000:function:fail:$LATEST',
      condition: 'RetriesExhausted',
      approximateInvokeCount: 2,
    },
    requestPayload: { detail: { object: { key: 'allowed/a' } } },
    responsePayload: { errorType: 'TypeError', errorMessage: 'cannot allowed/a' },
  });
});

it('an event whose target may not be called goes to the rule’s queue', async () => {
  await land('denied/b');
  const message = await letter('dead-events');
  expect(JSON.parse(message?.Body ?? '')).toMatchObject({ detail: { object: { key: 'denied/b' } } });
  expect(message?.MessageAttributes).toMatchObject({
    RULE_ARN: { StringValue: 'arn:aws:events:us-east-1:000000000000:rule/on-denied/' },
    TARGET_ARN: { StringValue: 'arn:aws:lambda:us-east-1:000000000000:function:fail' },
    ERROR_CODE: { StringValue: 'AccessDenied' },
  });
});

it('a person may invoke a function and hears what it answers, or how it failed', async () => {
  const lambda = new LambdaClient({ ...config, maxAttempts: 1 });
  const invoke = async (event: object) => {
    const { FunctionError, Payload } = await lambda.send(
      new InvokeCommand({ FunctionName: 'fail', Payload: Buffer.from(JSON.stringify(event)) }),
    );
    return [FunctionError, JSON.parse(Buffer.from(Payload ?? []).toString())] as const;
  };
  expect(await invoke({ well: 'enough' })).toEqual([undefined, { did: 'enough' }]);
  expect(await invoke({ detail: { object: { key: 'x' } } })).toEqual([
    'Unhandled',
    expect.objectContaining({ errorType: 'TypeError', errorMessage: 'cannot x' }),
  ]);
  await expect(
    lambda.send(new InvokeCommand({ FunctionName: 'fail', InvocationType: 'Event' })),
  ).rejects.toThrow(/does not support/);
});
