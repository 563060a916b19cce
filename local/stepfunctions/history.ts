/** The events of one execution, as GetExecutionHistory gives them; kept in a file that survives restarts. */
import { LineLog, readLines } from './journal.ts';

/** An event on the wire: camelCase details beside the common fields, time in epoch seconds. */
export interface HistoryEvent {
  id: number;
  previousEventId: number;
  timestamp: number;
  type: string;
  [details: string]: unknown;
}

export interface Recorder {
  /** `scope` is the walk that the event belongs to; each walk is sequential. */
  record(scope: string, type: string, details: Record<string, unknown>): void;
}

/** Children of a Distributed Map: their results are in the map's files, their events are not kept. */
export const NO_HISTORY: Recorder = { record() {} };

type Line = HistoryEvent & { scope: string };

/**
 * An execution that is continued walks its way again from the start. Within one scope the events come in the same
 * order then, so those already on record are passed over and keep their first time.
 */
export class History implements Recorder {
  readonly #log: LineLog;
  readonly #passOver = new Map<string, number>();
  readonly #last = new Map<string, number>();
  #count = 0;

  constructor(path: string) {
    let end = 0;
    for (const { line, end: lineEnd } of readLines<Line>(path)) {
      this.#passOver.set(line.scope, (this.#passOver.get(line.scope) ?? 0) + 1);
      this.#last.set(line.scope, line.id);
      this.#count = line.id;
      end = lineEnd;
    }
    this.#log = new LineLog(path, end);
  }

  record(scope: string, type: string, details: Record<string, unknown>): void {
    const known = this.#passOver.get(scope) ?? 0;
    if (known > 0) {
      this.#passOver.set(scope, known - 1);
      return;
    }
    this.#count += 1;
    const previousEventId = this.#last.get(scope) ?? this.#last.get('') ?? 0;
    const event: Line = {
      id: this.#count,
      previousEventId,
      timestamp: Date.now() / 1000,
      type,
      ...details,
      scope,
    };
    this.#log.append(event);
    this.#last.set(scope, event.id);
  }

  close(): void {
    this.#log.close();
  }
}

/** A page of events, oldest first or last; `token` is where the page before ended. */
export function historyPage(
  path: string,
  options: { reverse: boolean; limit: number; token: string | undefined },
): { events: HistoryEvent[]; nextToken?: string } {
  const all: HistoryEvent[] = [];
  for (const { line } of readLines<Line>(path)) {
    const { scope: _, ...event } = line;
    all.push(event as HistoryEvent);
  }
  if (options.reverse) all.reverse();
  const start = Number(options.token ?? 0);
  const end = start + options.limit;
  return { events: all.slice(start, end), ...(end < all.length ? { nextToken: String(end) } : {}) };
}
