/**
 * CloudWatch Logs, as much as jobs and people need of it: lines appended to streams, read back in pieces. A stream is
 * a JSONL file: a head with its names, then one event a line. A line that an end of the engine cut short is passed
 * over.
 */
import { createHash } from 'node:crypto';
import { appendFileSync, existsSync, mkdirSync, readdirSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import {
  type Caller,
  type JsonOperation,
  type JsonService,
  LOCAL_ACCOUNT,
  LOCAL_REGION,
  ServiceError,
} from './types.ts';

interface Head {
  logGroupName: string;
  logStreamName: string;
  creationTime: number;
}

interface LogEvent {
  timestamp: number;
  ingestionTime: number;
  message: string;
}

interface Stream extends Head {
  events: LogEvent[];
}

const MAX_EVENTS = 10_000;
const MAX_STREAMS = 50;

/** A name that is one path segment on every file system, and tells people what it is. */
function fileName(name: string): string {
  const readable = name.replaceAll(/[^A-Za-z0-9_.-]+/g, '_').slice(0, 120);
  const hash = createHash('sha256').update(name).digest('hex').slice(0, 12);
  return `${readable}-${hash}`;
}

const invalid = (message: string) => new ServiceError('InvalidParameterException', message);

function required(value: string | undefined, name: string): string {
  if (typeof value !== 'string' || value === '') throw invalid(`${name} is required`);
  return value;
}

function limitOf(value: number | undefined, most: number): number {
  if (value === undefined) return most;
  if (!Number.isInteger(value) || value < 1 || value > most)
    throw invalid(`limit must be a whole number between 1 and ${most}`);
  return value;
}

/** The position that a token of ours (`<direction>/<position>`) stands for. */
function positionOf(token: string, directions: string): { direction: string; position: number } {
  const match = /^([a-z])\/(\d+)$/.exec(token);
  if (!match?.[1] || !directions.includes(match[1])) throw invalid('The specified nextToken is invalid.');
  return { direction: match[1], position: Number(match[2]) };
}

const within =
  ({ startTime, endTime }: { startTime?: number; endTime?: number }) =>
  (event: LogEvent) =>
    event.timestamp >= (startTime ?? 0) && event.timestamp < (endTime ?? Number.POSITIVE_INFINITY);

/**
 * A filter pattern of terms: all must occur, of `?terms` at least one, no `-term`; "quotes" hold a phrase together.
 * JSON, space-delimited and regular-expression patterns are refused.
 */
function matcher(pattern: string): (message: string) => boolean {
  if (/^\s*[{[%]/.test(pattern)) throw invalid(`Only patterns of terms are supported locally: ${pattern}`);
  const all: string[] = [];
  const any: string[] = [];
  const none: string[] = [];
  for (const [, sign, phrase, word] of pattern.matchAll(/([?-]?)(?:"([^"]*)"|(\S+))/g)) {
    const terms = sign === '?' ? any : sign === '-' ? none : all;
    terms.push(phrase ?? word ?? '');
  }
  return (message) =>
    all.every((term) => message.includes(term)) &&
    !none.some((term) => message.includes(term)) &&
    (any.length === 0 || any.some((term) => message.includes(term)));
}

interface DescribeLogStreamsInput {
  logGroupName?: string;
  logStreamNamePrefix?: string;
  orderBy?: 'LogStreamName' | 'LastEventTime';
  descending?: boolean;
  limit?: number;
  nextToken?: string;
}

interface GetLogEventsInput {
  logGroupName?: string;
  logStreamName?: string;
  startTime?: number;
  endTime?: number;
  nextToken?: string;
  limit?: number;
  startFromHead?: boolean;
}

interface FilterLogEventsInput {
  logGroupName?: string;
  logStreamNames?: string[];
  logStreamNamePrefix?: string;
  startTime?: number;
  endTime?: number;
  filterPattern?: string;
  nextToken?: string;
  limit?: number;
}

export class Logs implements JsonService {
  readonly #folder: string;
  /** Files of this process's own writing, which therefore end with a whole line. */
  readonly #open = new Set<string>();

  readonly operations: Record<string, JsonOperation> = {
    DescribeLogStreams: (input: DescribeLogStreamsInput, caller: Caller) =>
      this.#describeLogStreams(input, caller),
    GetLogEvents: (input: GetLogEventsInput, caller: Caller) => this.#getLogEvents(input, caller),
    FilterLogEvents: (input: FilterLogEventsInput, caller: Caller) => this.#filterLogEvents(input, caller),
  };

  /** `folder` is the logs' own. */
  constructor(options: { folder: string }) {
    this.#folder = options.folder;
  }

  #path(group: string, stream: string): string {
    return join(this.#folder, fileName(group), `${fileName(stream)}.jsonl`);
  }

  /** Adds `lines` to the stream, each an event of now; makes the stream when it is new. */
  append(group: string, stream: string, lines: string[]): void {
    const path = this.#path(group, stream);
    const now = Date.now();
    let text = lines
      .map((message) => `${JSON.stringify({ timestamp: now, ingestionTime: now, message })}\n`)
      .join('');
    if (!this.#open.has(path)) {
      if (existsSync(path)) {
        // An earlier engine may have ended within a line.
        text = `\n${text}`;
      } else {
        mkdirSync(dirname(path), { recursive: true });
        const head: Head = { logGroupName: group, logStreamName: stream, creationTime: now };
        text = `${JSON.stringify(head)}\n${text}`;
      }
      this.#open.add(path);
    }
    appendFileSync(path, text);
  }

  #read(path: string): Stream | null {
    const items = readFileSync(path, 'utf8')
      .split('\n')
      .flatMap((line): (Head | LogEvent)[] => {
        try {
          return line === '' ? [] : [JSON.parse(line)];
        } catch {
          return [];
        }
      });
    const head = items.find((item) => 'logStreamName' in item);
    return head ? { ...head, events: items.filter((item) => 'message' in item) } : null;
  }

  /** All streams of the group by name. Throws `ResourceNotFoundException` when there is none. */
  #streams(group: string): Stream[] {
    const folder = join(this.#folder, fileName(group));
    if (!existsSync(folder))
      throw new ServiceError('ResourceNotFoundException', 'The specified log group does not exist.');
    return readdirSync(folder)
      .map((name) => this.#read(join(folder, name)))
      .filter((stream) => stream !== null)
      .sort((a, b) => (a.logStreamName < b.logStreamName ? -1 : 1));
  }

  async #describeLogStreams(input: DescribeLogStreamsInput, caller: Caller) {
    const group = required(input.logGroupName, 'logGroupName');
    caller.authorize('logs:DescribeLogStreams', `${groupArn(group)}:*`);
    if (input.orderBy === 'LastEventTime' && input.logStreamNamePrefix !== undefined)
      throw invalid('Cannot order by LastEventTime with a logStreamNamePrefix.');
    const limit = limitOf(input.limit, MAX_STREAMS);
    const from = input.nextToken === undefined ? 0 : positionOf(input.nextToken, 's').position;
    const streams = this.#streams(group).filter((stream) =>
      stream.logStreamName.startsWith(input.logStreamNamePrefix ?? ''),
    );
    if (input.orderBy === 'LastEventTime')
      streams.sort((a, b) => (a.events.at(-1)?.timestamp ?? 0) - (b.events.at(-1)?.timestamp ?? 0));
    if (input.descending) streams.reverse();
    return {
      logStreams: streams.slice(from, from + limit).map(({ events, logStreamName, creationTime }) => ({
        logStreamName,
        creationTime,
        firstEventTimestamp: events[0]?.timestamp,
        lastEventTimestamp: events.at(-1)?.timestamp,
        lastIngestionTime: events.at(-1)?.ingestionTime,
        arn: `${groupArn(group)}:log-stream:${logStreamName}`,
        storedBytes: 0,
      })),
      nextToken: from + limit < streams.length ? `s/${from + limit}` : undefined,
    };
  }

  async #getLogEvents(input: GetLogEventsInput, caller: Caller) {
    const group = required(input.logGroupName, 'logGroupName');
    const name = required(input.logStreamName, 'logStreamName');
    caller.authorize('logs:GetLogEvents', `${groupArn(group)}:log-stream:${name}`);
    const limit = limitOf(input.limit, MAX_EVENTS);
    const path = this.#path(group, name);
    const stream = existsSync(path) ? this.#read(path) : null;
    if (stream === null)
      throw new ServiceError('ResourceNotFoundException', 'The specified log stream does not exist.');
    const events = stream.events.filter(within(input));
    const { direction, position } =
      input.nextToken === undefined
        ? { direction: input.startFromHead ? 'f' : 'b', position: input.startFromHead ? 0 : events.length }
        : positionOf(input.nextToken, 'fb');
    const start = direction === 'f' ? position : Math.max(0, position - limit);
    const end = direction === 'f' ? Math.min(events.length, position + limit) : position;
    return {
      events: events.slice(start, end),
      // At either end the token that was given comes back: that is how a reader knows.
      nextForwardToken: `f/${Math.max(start, end)}`,
      nextBackwardToken: `b/${start}`,
    };
  }

  async #filterLogEvents(input: FilterLogEventsInput, caller: Caller) {
    const group = required(input.logGroupName, 'logGroupName');
    caller.authorize('logs:FilterLogEvents', `${groupArn(group)}:*`);
    const { logStreamNames, logStreamNamePrefix } = input;
    if (logStreamNames && logStreamNamePrefix !== undefined)
      throw invalid('Give logStreamNames or logStreamNamePrefix, not both.');
    const limit = limitOf(input.limit, MAX_EVENTS);
    const from = input.nextToken === undefined ? 0 : positionOf(input.nextToken, 'e').position;
    const matches = matcher(input.filterPattern ?? '');
    const found = this.#streams(group)
      .filter(
        ({ logStreamName }) =>
          (logStreamNames?.includes(logStreamName) ?? true) &&
          logStreamName.startsWith(logStreamNamePrefix ?? ''),
      )
      .flatMap(({ logStreamName, events }) =>
        events.map((event, index) => ({
          ...event,
          logStreamName,
          eventId: `${logStreamName}/${index}`,
        })),
      )
      .filter((event) => within(input)(event) && matches(event.message))
      .sort((a, b) => a.timestamp - b.timestamp);
    return {
      events: found.slice(from, from + limit),
      searchedLogStreams: [],
      nextToken: from + limit < found.length ? `e/${from + limit}` : undefined,
    };
  }
}

const groupArn = (group: string) => `arn:aws:logs:${LOCAL_REGION}:${LOCAL_ACCOUNT}:log-group:${group}`;
