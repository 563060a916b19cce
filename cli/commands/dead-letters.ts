/**
 * `slideway replay --dead-letters`: shows what lies in the dead-letter queues and delivers it again: events to their
 * targets, invocations to their functions. A message is deleted once it was taken, and stays where it was not.
 */

import { setTimeout as wait } from 'node:timers/promises';
import { InvokeCommand } from '@aws-sdk/client-lambda';
import { DescribeExecutionCommand, ExecutionAlreadyExists, StartExecutionCommand } from '@aws-sdk/client-sfn';
import {
  ChangeMessageVisibilityCommand,
  DeleteMessageCommand,
  GetQueueUrlCommand,
  type Message,
  ReceiveMessageCommand,
} from '@aws-sdk/client-sqs';
import { z } from 'zod';
import { type Deployment, openDeployment, type Place, placeOf } from '../deployment.ts';
import { EXIT, plural, type Screen } from '../terminal.ts';
import type { Streams } from './run.ts';

export interface DeadLetterOptions extends Place {
  list?: boolean;
  json?: boolean;
}

/** What lies in a queue, as it is shown and delivered. */
export interface DeadLetter {
  messageId: string;
  kind: 'event' | 'invocation';
  sentAt: string;
  targetArn: string;
  /** JSON text that the target is to get. */
  input: string;
  error: string;
}

/** The part of Lambda's record of a failed invocation that counts. */
const invocationSchema = z.object({
  requestContext: z.object({ functionArn: z.string(), condition: z.string() }),
  requestPayload: z.unknown(),
  responsePayload: z.object({ errorType: z.string(), errorMessage: z.string() }).partial().nullish(),
});

/** Longer than a function may take. */
const OUT_OF_SIGHT_SECONDS = 960;

export async function deadLetters(
  options: DeadLetterOptions,
  { screen, answer }: Streams,
  signal: AbortSignal,
): Promise<number> {
  const deployment = await openDeployment(screen, placeOf(options));
  try {
    const held = await receiveAll(deployment);
    const letters = held.map(({ letter }) => letter);
    if (options.list || letters.length === 0) {
      for (const each of held) await release(deployment, each);
      if (options.json) answer.print(JSON.stringify(letters, null, 2));
      else if (letters.length === 0) answer.print('The dead-letter queues are empty.');
      else for (const letter of letters) answer.print(inWords(letter));
      return EXIT.succeeded;
    }
    const outcomes = [];
    const executions: string[] = [];
    for (const each of held) {
      const { letter } = each;
      const failure = signal.aborted
        ? 'stopped'
        : await deliver(deployment, letter, executions).catch(messageOf);
      if (failure === undefined) await remove(deployment, each);
      else await release(deployment, each);
      outcomes.push({ ...letter, delivered: failure === undefined, ...(failure && { failure }) });
      if (!options.json) {
        answer.print(`${failure === undefined ? 'delivered' : 'not taken'}  ${inWords(letter)}`);
        if (failure !== undefined) answer.print(`           ${failure}`);
      }
    }
    if (options.json) answer.print(JSON.stringify(outcomes, null, 2));
    await ended(deployment, executions, screen, signal);
    const failed = outcomes.filter(({ delivered }) => !delivered).length;
    if (failed === 0) return EXIT.succeeded;
    return failed === outcomes.length ? EXIT.failed : EXIT.partial;
  } finally {
    await deployment.close();
  }
}

const inWords = ({ kind, sentAt, targetArn, error }: DeadLetter): string =>
  `${sentAt}  ${kind} for ${targetArn.split(':').slice(6).join(':')}: ${error}`;

const messageOf = (error: unknown): string =>
  error instanceof Error ? `${error.name}: ${error.message}` : String(error);

// --- the queues ----------------------------------------------------------------------------------------------

interface Held {
  queueUrl: string;
  receipt: string;
  letter: DeadLetter;
}

/** Everything in both queues, out of sight for others. */
async function receiveAll({ sqs, outputs }: Deployment): Promise<Held[]> {
  const held: Held[] = [];
  for (const [QueueName, read] of [
    [outputs.DeadEventsQueue, eventOf],
    [outputs.DeadInvocationsQueue, invocationOf],
  ] as const) {
    const { QueueUrl: queueUrl = '' } = await sqs.send(new GetQueueUrlCommand({ QueueName }));
    for (;;) {
      const { Messages = [] } = await sqs.send(
        new ReceiveMessageCommand({
          QueueUrl: queueUrl,
          MaxNumberOfMessages: 10,
          VisibilityTimeout: OUT_OF_SIGHT_SECONDS,
          MessageAttributeNames: ['All'],
          MessageSystemAttributeNames: ['All'],
        }),
      );
      if (Messages.length === 0) break;
      for (const message of Messages) {
        held.push({ queueUrl, receipt: message.ReceiptHandle ?? '', letter: read(message) });
      }
    }
  }
  return held;
}

const release = ({ sqs }: Deployment, { queueUrl, receipt }: Held) =>
  sqs.send(
    new ChangeMessageVisibilityCommand({ QueueUrl: queueUrl, ReceiptHandle: receipt, VisibilityTimeout: 0 }),
  );

const remove = ({ sqs }: Deployment, { queueUrl, receipt }: Held) =>
  sqs.send(new DeleteMessageCommand({ QueueUrl: queueUrl, ReceiptHandle: receipt }));

const common = ({ MessageId = '', Attributes }: Message) => ({
  messageId: MessageId,
  sentAt: new Date(Number(Attributes?.SentTimestamp ?? 0)).toISOString(),
});

/** EventBridge puts the event into the body and what happened into attributes. */
function eventOf(message: Message): DeadLetter {
  const attribute = (name: string) => message.MessageAttributes?.[name]?.StringValue ?? '';
  return {
    ...common(message),
    kind: 'event',
    targetArn: attribute('TARGET_ARN'),
    input: message.Body ?? '',
    error: `${attribute('ERROR_CODE')}: ${attribute('ERROR_MESSAGE')}`,
  };
}

/** Lambda puts a record of the invocation into the body. */
function invocationOf(message: Message): DeadLetter {
  const { requestContext, requestPayload, responsePayload } = invocationSchema.parse(
    JSON.parse(message.Body ?? ''),
  );
  return {
    ...common(message),
    kind: 'invocation',
    targetArn: requestContext.functionArn.replace(/:\$LATEST$/, ''),
    input: JSON.stringify(requestPayload ?? {}),
    error: responsePayload
      ? `${responsePayload.errorType}: ${responsePayload.errorMessage}`
      : requestContext.condition,
  };
}

// --- delivering ------------------------------------------------------------------------------------------------

/** Hands a letter to its target; answers why it was not taken. Executions that it starts are added to `started`. */
async function deliver(
  { stepFunctions, lambda }: Deployment,
  { messageId, targetArn, input }: DeadLetter,
  started: string[],
): Promise<string | undefined> {
  if (targetArn.includes(':stateMachine:')) {
    try {
      // Named by the message: delivered twice, it starts once.
      const name = `dead-letter-${messageId}`;
      const { executionArn = '' } = await stepFunctions.send(
        new StartExecutionCommand({ stateMachineArn: targetArn, name, input }),
      );
      started.push(executionArn);
    } catch (error) {
      if (!(error instanceof ExecutionAlreadyExists)) throw error;
    }
    return undefined;
  }
  if (targetArn.includes(':function:')) {
    const { FunctionError, Payload } = await lambda.send(
      new InvokeCommand({ FunctionName: targetArn, Payload: Buffer.from(input) }),
    );
    return FunctionError ? Buffer.from(Payload ?? []).toString('utf8') : undefined;
  }
  return `There is no way here to deliver to ${targetArn || 'a target that the message does not name'}.`;
}

/** Waits for what was started, where the local AWS would stop with this command. */
async function ended(
  { stepFunctions, at }: Deployment,
  executions: string[],
  screen: Screen,
  signal: AbortSignal,
): Promise<void> {
  if (at !== 'here' || executions.length === 0) return;
  await screen.task(`Waiting for ${plural(executions.length, 'execution')}`, async () => {
    for (const executionArn of executions) {
      for (;;) {
        const { status } = await stepFunctions.send(new DescribeExecutionCommand({ executionArn }));
        if (status !== 'RUNNING') break;
        await wait(500, undefined, { signal });
      }
    }
  });
}
