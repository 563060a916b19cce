import { setTimeout as wait } from 'node:timers/promises';
import {
  ChangeMessageVisibilityCommand,
  DeleteMessageCommand,
  GetQueueAttributesCommand,
  GetQueueUrlCommand,
  ListQueuesCommand,
  ReceiveMessageCommand,
  SendMessageCommand,
  SQSClient,
} from '@aws-sdk/client-sqs';
import { expect, it } from 'vitest';
import type { Gateway } from '../../local/gateway.ts';
import { Sqs } from '../../local/sqs.ts';
import { iamWith, serve, temporaryFolder } from './kit.ts';

const QUEUE = 'arn:aws:sqs:us-east-1:000000000000:dead-events';
const WRITER = 'arn:aws:iam::000000000000:role/writer';
const iam = iamWith({
  writer: [{ Effect: 'Allow', Action: 'sqs:SendMessage', Resource: QUEUE }],
  other: [],
});

/** A queue whose messages are out of sight for a second, and a client of the person at the keyboard. */
async function queueIn(folder: string, retention?: number) {
  let gateway: Gateway | undefined;
  const sqs = new Sqs({ folder, endpoint: () => gateway?.endpoint ?? '' });
  sqs.createQueue('dead-events', { visibilityTimeout: 1, retention });
  gateway = await serve(iam, { sqs: { protocol: 'json', service: sqs } });
  const client = new SQSClient({
    endpoint: gateway.endpoint,
    region: 'us-east-1',
    credentials: iam.root,
    maxAttempts: 1,
  });
  const { QueueUrl = '' } = await client.send(new GetQueueUrlCommand({ QueueName: 'dead-events' }));
  const receive = async (more = {}) =>
    (await client.send(new ReceiveMessageCommand({ QueueUrl, MaxNumberOfMessages: 10, ...more }))).Messages ??
    [];
  const count = async () => {
    const { Attributes } = await client.send(
      new GetQueueAttributesCommand({ QueueUrl, AttributeNames: ['All'] }),
    );
    return [Attributes?.ApproximateNumberOfMessages, Attributes?.ApproximateNumberOfMessagesNotVisible];
  };
  return { sqs, client, QueueUrl, receive, count };
}

it('keeps messages in their order until they are deleted', async () => {
  const { client, QueueUrl, receive, count } = await queueIn(temporaryFolder());
  for (const MessageBody of ['first', 'second']) {
    await client.send(
      new SendMessageCommand({
        QueueUrl,
        MessageBody,
        MessageAttributes: { TARGET_ARN: { DataType: 'String', StringValue: 'arn:x' } },
      }),
    );
    await wait(2);
  }
  const messages = await receive();
  expect(messages.map(({ Body }) => Body)).toEqual(['first', 'second']);
  expect(messages[0]?.MessageAttributes?.TARGET_ARN?.StringValue).toBe('arn:x');
  expect(await count()).toEqual(['0', '2']);
  expect(await receive()).toEqual([]);
  await client.send(new DeleteMessageCommand({ QueueUrl, ReceiptHandle: messages[0]?.ReceiptHandle }));
  expect(await count()).toEqual(['0', '1']);
});

it('shows a message again when it was not deleted in time, and counts how often', async () => {
  const { sqs, client, QueueUrl, receive } = await queueIn(temporaryFolder());
  sqs.send(QUEUE, 'again', {}, iam.caller(WRITER));
  const [first] = await receive();
  const [second] = await receive({ WaitTimeSeconds: 3 });
  expect(second).toMatchObject({ Body: 'again', MessageId: first?.MessageId });
  // The receipt of a message that came into sight again no longer deletes it.
  await client.send(new DeleteMessageCommand({ QueueUrl, ReceiptHandle: first?.ReceiptHandle }));
  await client.send(
    new ChangeMessageVisibilityCommand({
      QueueUrl,
      ReceiptHandle: second?.ReceiptHandle,
      VisibilityTimeout: 0,
    }),
  );
  const [third] = await receive();
  expect(third?.Attributes?.ApproximateReceiveCount).toBe('3');
});

it('has its messages after a restart, those in flight in sight again', async () => {
  const folder = temporaryFolder();
  const before = await queueIn(folder);
  before.sqs.send(QUEUE, 'kept', { RULE_ARN: 'arn:rule' }, iam.caller(WRITER));
  expect(await before.receive()).toHaveLength(1);
  const after = await queueIn(folder);
  expect(await after.receive()).toMatchObject([
    { Body: 'kept', MessageAttributes: { RULE_ARN: { StringValue: 'arn:rule' } } },
  ]);
});

it('forgets a message after its time', async () => {
  const { sqs, receive } = await queueIn(temporaryFolder(), 1);
  sqs.send(QUEUE, 'short', {}, iam.caller(WRITER));
  await wait(1100);
  expect(await receive()).toEqual([]);
});

it('takes messages from those who may send, and names what there is not', async () => {
  const { sqs, client } = await queueIn(temporaryFolder());
  const other = iam.caller('arn:aws:iam::000000000000:role/other');
  expect(() => sqs.send(QUEUE, 'x', {}, other)).toThrow(/not authorized to perform: sqs:SendMessage/);
  expect(() => sqs.send(`${QUEUE}-gone`, 'x', {}, other)).toThrow(/does not exist/);
  await expect(client.send(new GetQueueUrlCommand({ QueueName: 'gone' }))).rejects.toMatchObject({
    name: 'QueueDoesNotExist',
  });
  const { QueueUrls } = await client.send(new ListQueuesCommand({ QueueNamePrefix: 'dead-' }));
  expect(QueueUrls).toEqual([expect.stringMatching(/\/000000000000\/dead-events$/)]);
  await expect(
    client.send(new SendMessageCommand({ QueueUrl: QueueUrls?.[0], MessageBody: 'x', DelaySeconds: 5 })),
  ).rejects.toThrow(/DelaySeconds/);
});
