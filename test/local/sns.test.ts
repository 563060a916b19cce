import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { PublishCommand, SNSClient, SubscribeCommand } from '@aws-sdk/client-sns';
import { expect, it } from 'vitest';
import { type Message, Sns } from '../../local/sns.ts';
import { iamWith, serve, temporaryFolder } from './kit.ts';

const TOPIC = 'arn:aws:sns:us-east-1:000000000000:runs';
const PUBLISHER = 'arn:aws:iam::000000000000:role/publisher';
const iam = iamWith({
  publisher: [{ Effect: 'Allow', Action: 'sns:Publish', Resource: TOPIC }],
  other: [],
});
const folder = temporaryFolder();
const shown: Message[] = [];
const sns = new Sns({ folder, onMessage: (message) => shown.push(message) });
sns.createTopic('runs', ['lab@example.org']);
sns.subscribe(TOPIC, 'head@example.org');
const gateway = await serve(iam, { sns: { protocol: 'query-body', service: sns } });
const client = (roleArn: string) =>
  new SNSClient({
    endpoint: gateway.endpoint,
    region: 'us-east-1',
    credentials: iam.credentials(roleArn),
    maxAttempts: 1,
  });

it('keeps each message as a file, and shows it', async () => {
  const message = 'Run r1 ended: 3 of 4 slides & <one> missing.\nSee the report.';
  const sent = await client(PUBLISHER).send(
    new PublishCommand({
      TopicArn: TOPIC,
      Subject: 'Run r1: PARTIAL',
      Message: message,
      MessageAttributes: { state: { DataType: 'String', StringValue: 'PARTIAL' } },
    }),
  );
  expect(shown).toEqual([
    {
      messageId: sent.MessageId,
      topicArn: TOPIC,
      publisher: PUBLISHER,
      publishedAt: expect.stringMatching(/^\d{4}-.*Z$/),
      subject: 'Run r1: PARTIAL',
      message,
      attributes: { state: 'PARTIAL' },
      recipients: ['lab@example.org', 'head@example.org'],
    },
  ]);
  const kept = JSON.parse(readFileSync(join(folder, 'runs', '000001.json'), 'utf8')) as unknown;
  expect(kept).toEqual(shown[0]);
});

it('numbers messages on, also when many come at once', async () => {
  const publisher = client(PUBLISHER);
  const before = readdirSync(join(folder, 'runs')).length;
  await Promise.all(
    Array.from({ length: 8 }, (_, n) =>
      publisher.send(new PublishCommand({ TopicArn: TOPIC, Message: `${n}` })),
    ),
  );
  const names = readdirSync(join(folder, 'runs')).sort();
  expect(names).toHaveLength(before + 8);
  expect(names.at(-1)).toBe(`${String(before + 8).padStart(6, '0')}.json`);
});

it('refuses who may not, topics that are not, and messages that SNS would not take', async () => {
  const hello = new PublishCommand({ TopicArn: TOPIC, Message: 'hello' });
  await expect(client('arn:aws:iam::000000000000:role/other').send(hello)).rejects.toMatchObject({
    name: 'AuthorizationErrorException',
    message: expect.stringContaining('sns:Publish'),
  });
  const publish = (input: object) =>
    sns.publish({ topicArn: TOPIC, message: 'm', attributes: {}, ...input }, iam.rootCaller());
  expect(() => publish({ topicArn: `${TOPIC}-x` })).toThrow('Topic does not exist');
  expect(() => publish({ message: '' })).toThrow('Empty message');
  expect(() => publish({ subject: 'x'.repeat(101) })).toThrow('Subject');
  expect(() => publish({ subject: 'line\nbreak' })).toThrow('Subject');
});

it('names operations that it does not know', async () => {
  const subscribe = new SubscribeCommand({ TopicArn: TOPIC, Protocol: 'email', Endpoint: 'a@b.c' });
  await expect(client(PUBLISHER).send(subscribe)).rejects.toThrow('sns:Subscribe; it supports Publish');
});
