/**
 * SQS: queues as folders, `<folder>/<queue>/<time>-<id>.json`, a file a message. What is out of sight (received, not
 * deleted yet) is known in memory only: after a restart it is in sight again, as SQS delivers at least once.
 */
import { createHash, randomUUID } from 'node:crypto';
import { mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import { z } from 'zod';
import { queueArn } from './resources.ts';
import { type Caller, type JsonOperation, type JsonService, LOCAL_ACCOUNT, ServiceError } from './types.ts';

const attributeSchema = z.strictObject({ DataType: z.string(), StringValue: z.string() });

/** A message as it is kept. */
const messageSchema = z.object({
  messageId: z.string(),
  /** Milliseconds since 1970. */
  sentAt: z.number(),
  sender: z.string(),
  body: z.string(),
  attributes: z.record(z.string(), attributeSchema),
  received: z.number(),
});
export type QueuedMessage = z.infer<typeof messageSchema>;

export interface QueueSettings {
  /** Seconds for which a received message is out of sight. Default 30. */
  visibilityTimeout?: number | undefined;
  /** Seconds after which a message is forgotten. Default 4 days. */
  retention?: number | undefined;
}

interface Queue {
  name: string;
  folder: string;
  visibilityTimeout: number;
  retention: number;
  /** By file: until when it is out of sight, and under which receipt. */
  hidden: Map<string, { until: number; receipt: string }>;
}

const MAX_BODY_BYTES = 1024 * 1024;

export class Sqs implements JsonService {
  readonly operations: Record<string, JsonOperation> = {
    SendMessage: (input, caller) => this.#send(input, caller),
    ReceiveMessage: (input, caller) => this.#receive(input, caller),
    DeleteMessage: (input, caller) => this.#delete(input, caller),
    ChangeMessageVisibility: (input, caller) => this.#changeVisibility(input, caller),
    GetQueueAttributes: (input, caller) => this.#attributes(input, caller),
    GetQueueUrl: (input, caller) => this.#url(input, caller),
    ListQueues: (input, caller) => this.#list(input, caller),
  };
  readonly #folder: string;
  readonly #endpoint: () => string;
  readonly #queues = new Map<string, Queue>();

  constructor(options: { folder: string; endpoint(): string }) {
    this.#folder = options.folder;
    this.#endpoint = options.endpoint;
  }

  createQueue(name: string, { visibilityTimeout = 30, retention = 345_600 }: QueueSettings): void {
    const folder = join(this.#folder, name);
    mkdirSync(folder, { recursive: true });
    const hidden = this.#queues.get(name)?.hidden ?? new Map();
    this.#queues.set(name, { name, folder, visibilityTimeout, retention, hidden });
  }

  /** Keeps a message; returns its id. `caller` must be allowed to send to the queue. */
  send(arn: string, body: string, attributes: Record<string, string>, caller: Caller): string {
    const queue = this.#queues.get(arn.split(':').at(-1) ?? '');
    if (!queue || queueArn(queue.name) !== arn) throw noQueue();
    const typed = Object.entries(attributes).map(
      ([name, value]) => [name, { DataType: 'String', StringValue: value }] as const,
    );
    return this.#keep(queue, body, Object.fromEntries(typed), caller);
  }

  #keep(queue: Queue, body: string, attributes: QueuedMessage['attributes'], caller: Caller): string {
    caller.authorize('sqs:SendMessage', queueArn(queue.name));
    if (body === '')
      throw new ServiceError('MissingParameter', 'The request must contain the parameter MessageBody.');
    if (Buffer.byteLength(body) > MAX_BODY_BYTES) {
      throw new ServiceError('InvalidParameterValue', `A message may hold ${MAX_BODY_BYTES} bytes.`);
    }
    const messageId = randomUUID();
    const sentAt = Date.now();
    write(queue, `${String(sentAt).padStart(15, '0')}-${messageId}.json`, {
      messageId,
      sentAt,
      sender: caller.arn,
      body,
      attributes,
      received: 0,
    });
    return messageId;
  }

  async #send(input: unknown, caller: Caller) {
    const { QueueUrl, MessageBody, MessageAttributes } = parsed(sendSchema, input);
    const MessageId = this.#keep(this.#at(QueueUrl), MessageBody, MessageAttributes, caller);
    return { MessageId, MD5OfMessageBody: md5(MessageBody) };
  }

  async #receive(input: unknown, caller: Caller) {
    const { QueueUrl, MaxNumberOfMessages, VisibilityTimeout, WaitTimeSeconds } = parsed(
      receiveSchema,
      input,
    );
    const queue = this.#at(QueueUrl);
    caller.authorize('sqs:ReceiveMessage', queueArn(queue.name));
    const seconds = VisibilityTimeout ?? queue.visibilityTimeout;
    const deadline = Date.now() + WaitTimeSeconds * 1000;
    let names = inSight(queue);
    while (names.length === 0 && Date.now() < deadline) {
      await wait(100);
      names = inSight(queue);
    }
    const Messages = names.slice(0, MaxNumberOfMessages).map((name) => {
      const kept = read(queue, name);
      const message = { ...kept, received: kept.received + 1 };
      write(queue, name, message);
      const receipt = `${name}#${randomUUID()}`;
      queue.hidden.set(name, { until: Date.now() + seconds * 1000, receipt });
      return {
        MessageId: message.messageId,
        ReceiptHandle: receipt,
        Body: message.body,
        MD5OfBody: md5(message.body),
        Attributes: {
          SentTimestamp: String(message.sentAt),
          ApproximateReceiveCount: String(message.received),
          SenderId: message.sender,
        },
        MessageAttributes: message.attributes,
      };
    });
    return Messages.length > 0 ? { Messages } : {};
  }

  async #delete(input: unknown, caller: Caller) {
    const { QueueUrl, ReceiptHandle } = parsed(receiptSchema, input);
    const queue = this.#at(QueueUrl);
    caller.authorize('sqs:DeleteMessage', queueArn(queue.name));
    const name = nameOf(ReceiptHandle);
    // A message that came into sight again has another receipt; SQS does not promise that the old one deletes it.
    if (queue.hidden.get(name)?.receipt === ReceiptHandle) {
      rmSync(join(queue.folder, name), { force: true });
      queue.hidden.delete(name);
    }
    return {};
  }

  async #changeVisibility(input: unknown, caller: Caller) {
    const { QueueUrl, ReceiptHandle, VisibilityTimeout } = parsed(visibilitySchema, input);
    const queue = this.#at(QueueUrl);
    caller.authorize('sqs:ChangeMessageVisibility', queueArn(queue.name));
    const hidden = queue.hidden.get(nameOf(ReceiptHandle));
    if (hidden?.receipt !== ReceiptHandle) {
      throw new ServiceError('MessageNotInflight', 'The message is not in flight.');
    }
    hidden.until = Date.now() + VisibilityTimeout * 1000;
    return {};
  }

  async #attributes(input: unknown, caller: Caller) {
    const { QueueUrl } = parsed(attributesSchema, input);
    const queue = this.#at(QueueUrl);
    caller.authorize('sqs:GetQueueAttributes', queueArn(queue.name));
    const visible = inSight(queue).length;
    return {
      Attributes: {
        QueueArn: queueArn(queue.name),
        ApproximateNumberOfMessages: String(visible),
        ApproximateNumberOfMessagesNotVisible: String(files(queue).length - visible),
        VisibilityTimeout: String(queue.visibilityTimeout),
        MessageRetentionPeriod: String(queue.retention),
      },
    };
  }

  async #url(input: unknown, caller: Caller) {
    const { QueueName } = parsed(urlSchema, input);
    const queue = this.#queues.get(QueueName);
    if (!queue) throw noQueue();
    caller.authorize('sqs:GetQueueUrl', queueArn(QueueName));
    return { QueueUrl: this.#urlOf(QueueName) };
  }

  async #list(input: unknown, caller: Caller) {
    const { QueueNamePrefix } = parsed(listSchema, input);
    caller.authorize('sqs:ListQueues', queueArn('*'));
    const names = [...this.#queues.keys()].filter((name) => name.startsWith(QueueNamePrefix)).sort();
    return { QueueUrls: names.map((name) => this.#urlOf(name)) };
  }

  #urlOf(name: string): string {
    return `${this.#endpoint()}/${LOCAL_ACCOUNT}/${name}`;
  }

  #at(url: string): Queue {
    const queue = this.#queues.get(url.split('/').at(-1) ?? '');
    if (!queue) throw noQueue();
    return queue;
  }
}

const QueueUrl = z.string();
const sendSchema = z.strictObject({
  QueueUrl,
  MessageBody: z.string(),
  MessageAttributes: z.record(z.string(), attributeSchema).default({}),
});
const receiveSchema = z.strictObject({
  QueueUrl,
  MaxNumberOfMessages: z.number().int().min(1).max(10).default(1),
  VisibilityTimeout: z.number().int().min(0).max(43_200).optional(),
  WaitTimeSeconds: z.number().int().min(0).max(20).default(0),
  // All of them are answered, whichever are asked for.
  MessageAttributeNames: z.array(z.string()).optional(),
  MessageSystemAttributeNames: z.array(z.string()).optional(),
  AttributeNames: z.array(z.string()).optional(),
});
const receiptSchema = z.strictObject({ QueueUrl, ReceiptHandle: z.string() });
const visibilitySchema = receiptSchema.extend({ VisibilityTimeout: z.number().int().min(0).max(43_200) });
const attributesSchema = z.strictObject({ QueueUrl, AttributeNames: z.array(z.string()).optional() });
const urlSchema = z.strictObject({
  QueueName: z.string(),
  QueueOwnerAWSAccountId: z.literal(LOCAL_ACCOUNT).optional(),
});
const listSchema = z.strictObject({ QueueNamePrefix: z.string().default('') });

function parsed<Schema extends z.ZodType>(schema: Schema, input: unknown): z.output<Schema> {
  const { data, error } = schema.safeParse(input);
  if (error) throw new ServiceError('InvalidParameterValue', z.prettifyError(error));
  return data;
}

const noQueue = () =>
  new ServiceError(
    'QueueDoesNotExist',
    'The specified queue does not exist or you do not have access to it.',
  );

const nameOf = (receipt: string) => receipt.split('#')[0] ?? '';
const md5 = (text: string) => createHash('md5').update(text).digest('hex');

/** The files of a queue, the oldest first; those past their time are forgotten. */
function files({ folder, retention, hidden }: Queue): string[] {
  const oldest = Date.now() - retention * 1000;
  return readdirSync(folder)
    .filter((name) => name.endsWith('.json'))
    .sort()
    .filter((name) => {
      if (Number.parseInt(name, 10) >= oldest) return true;
      rmSync(join(folder, name), { force: true });
      hidden.delete(name);
      return false;
    });
}

function inSight(queue: Queue): string[] {
  const now = Date.now();
  return files(queue).filter((name) => (queue.hidden.get(name)?.until ?? 0) <= now);
}

const read = ({ folder }: Queue, name: string): QueuedMessage =>
  messageSchema.parse(JSON.parse(readFileSync(join(folder, name), 'utf8')));

function write({ folder }: Queue, name: string, message: QueuedMessage): void {
  const path = join(folder, name);
  writeFileSync(`${path}.new`, JSON.stringify(message));
  renameSync(`${path}.new`, path);
}
