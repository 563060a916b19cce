/**
 * SNS: messages that would be mailed are kept as files, `<folder>/<topic>/<n>.json`, and shown to whoever listens.
 * It speaks the query protocol, as the SDKs do.
 */
import { randomUUID } from 'node:crypto';
import { linkSync, mkdirSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import type { IncomingMessage, ServerResponse } from 'node:http';
import { join } from 'node:path';
import { actionOf, type BodyService, xml } from './gateway.ts';
import { topicArn } from './resources.ts';
import { type Caller, ServiceError } from './types.ts';

/** A message as it is kept. */
export interface Message {
  messageId: string;
  topicArn: string;
  /** ISO 8601, UTC. */
  publishedAt: string;
  /** ARN of who published it. */
  publisher: string;
  subject?: string;
  message: string;
  attributes: Record<string, string>;
  /** E-mail addresses that AWS would send it to. */
  recipients: string[];
}

interface Topic {
  name: string;
  recipients: string[];
}

export class Sns implements BodyService {
  readonly #folder: string;
  readonly #onMessage: (message: Message) => void;
  readonly #topics = new Map<string, Topic>();

  constructor(options: { folder: string; onMessage(message: Message): void }) {
    this.#folder = options.folder;
    this.#onMessage = options.onMessage;
  }

  createTopic(name: string, recipients: string[]): void {
    this.#topics.set(topicArn(name), { name, recipients });
    mkdirSync(join(this.#folder, name), { recursive: true });
  }

  subscribe(arn: string, recipient: string): void {
    this.#topic(arn).recipients.push(recipient);
  }

  operation(_request: IncomingMessage, body: Buffer): string {
    return actionOf(body);
  }

  async handle(
    request: IncomingMessage,
    body: Buffer,
    response: ServerResponse,
    caller: Caller,
  ): Promise<void> {
    const operation = this.operation(request, body);
    if (operation !== 'Publish') {
      throw new ServiceError(
        'InvalidAction',
        `The local AWS does not support sns:${operation}; it supports Publish.`,
      );
    }
    const form = new URLSearchParams(body.toString('utf8'));
    const subject = form.get('Subject');
    const messageId = this.publish(
      {
        topicArn: form.get('TopicArn') ?? form.get('TargetArn') ?? '',
        message: form.get('Message') ?? '',
        ...(subject === null ? {} : { subject }),
        attributes: readAttributes(form),
      },
      caller,
    );
    response.writeHead(200, { 'content-type': 'text/xml' });
    response.end(
      `<PublishResponse xmlns="http://sns.amazonaws.com/doc/2010-03-31/"><PublishResult><MessageId>${xml(
        messageId,
      )}</MessageId></PublishResult><ResponseMetadata><RequestId>${randomUUID()}</RequestId></ResponseMetadata></PublishResponse>`,
    );
  }

  /** Keeps a message and shows it; returns its id. */
  publish(
    input: { topicArn: string; message: string; subject?: string; attributes: Record<string, string> },
    caller: Caller,
  ): string {
    caller.authorize('sns:Publish', input.topicArn);
    const topic = this.#topic(input.topicArn);
    if (input.message === '') throw new ServiceError('InvalidParameter', 'Invalid parameter: Empty message');
    if (Buffer.byteLength(input.message) > 256 * 1024) {
      throw new ServiceError('InvalidParameter', 'Invalid parameter: Message too long');
    }
    if (input.subject !== undefined && !/^[\x20-\x7e]{1,100}$/.test(input.subject)) {
      throw new ServiceError(
        'InvalidParameter',
        'Invalid parameter: Subject must be 1 to 100 printable ASCII characters',
      );
    }
    const message: Message = {
      messageId: randomUUID(),
      publishedAt: new Date().toISOString(),
      publisher: caller.arn,
      recipients: topic.recipients,
      ...input,
    };
    keep(join(this.#folder, topic.name), message);
    this.#onMessage(message);
    return message.messageId;
  }

  #topic(arn: string): Topic {
    const topic = this.#topics.get(arn);
    if (topic === undefined) throw new ServiceError('NotFound', 'Topic does not exist', 404);
    return topic;
  }
}

/** Writes the message under the next free number; it appears whole or not at all. */
function keep(folder: string, message: Message): void {
  const fresh = join(folder, `.${message.messageId}`);
  writeFileSync(fresh, `${JSON.stringify(message, null, 2)}\n`);
  let number =
    readdirSync(folder).reduce((last, name) => Math.max(last, Number.parseInt(name, 10) || 0), 0) + 1;
  for (;;) {
    try {
      linkSync(fresh, join(folder, `${String(number).padStart(6, '0')}.json`));
      break;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error;
      number += 1;
    }
  }
  rmSync(fresh);
}

/** `MessageAttributes.entry.<n>.Name` and `.Value.StringValue`. */
function readAttributes(form: URLSearchParams): Record<string, string> {
  const attributes: Record<string, string> = {};
  for (let n = 1; ; n += 1) {
    const name = form.get(`MessageAttributes.entry.${n}.Name`);
    if (name === null) return attributes;
    attributes[name] = form.get(`MessageAttributes.entry.${n}.Value.StringValue`) ?? '';
  }
}
