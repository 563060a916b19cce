/**
 * EventBridge's schedules: when a rule with a `ScheduleExpression` is next due, kept on disk, so that what came due
 * while no engine ran is done once at the next start. Times are UTC.
 */
import { existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { z } from 'zod';
import { UnsupportedLocally } from './types.ts';

/** The first time after `after` at which a schedule is due; undefined when it never is again. */
export type Schedule = (after: Date) => Date | undefined;

const MINUTE_MS = 60_000;
const DAY_MS = 24 * 60 * MINUTE_MS;
const UNIT_MS: Record<string, number> = { minute: MINUTE_MS, hour: 60 * MINUTE_MS, day: DAY_MS };
/** A leap day on a given weekday comes within 40 years, the century's missing one included. */
const SEARCH_DAYS = 40 * 366;
/** Timers of Node hold 24 days at most. */
const LONGEST_TIMER_MS = DAY_MS;

/** Reads `rate(…)` or `cron(…)`. Throws {@link UnsupportedLocally} for what is neither, or is not known here. */
export function parseSchedule(expression: string, where: string): Schedule {
  const refuse = () => new UnsupportedLocally(`the schedule ${expression}`, where);
  const [, count = '', unit = '', plural] =
    /^rate\(([1-9]\d*) (minute|hour|day)(s?)\)$/.exec(expression) ?? [];
  const unitMs = UNIT_MS[unit];
  if (unitMs !== undefined) {
    // As EventBridge has it: one of a unit is singular, more are plural.
    if ((count === '1') === (plural === 's')) throw refuse();
    return (after) => new Date(after.getTime() + Number(count) * unitMs);
  }
  const fields = /^cron\((.*)\)$/.exec(expression)?.[1]?.trim().split(/\s+/) ?? [];
  const [minutes, hours, days, months, weekdays, years] = fields;
  if (fields.length !== 6 || !minutes || !hours || !days || !months || !weekdays || !years) throw refuse();
  // One of the two says the day, and the other that it does not.
  if ((days === '?') === (weekdays === '?')) throw refuse();
  const read = (text: string, from: number, to: number, names: string[] = []) =>
    text === '?' ? () => true : parseField(text, { from, to, names }, refuse);
  const inMinute = read(minutes, 0, 59);
  const inHour = read(hours, 0, 23);
  const inDay = read(days, 1, 31);
  const inMonth = read(months, 1, 12, MONTHS);
  const inWeekday = read(weekdays, 1, 7, WEEKDAYS);
  const inYear = read(years, 1970, 2199);
  return (after) => {
    const first = new Date(Math.floor(after.getTime() / MINUTE_MS) * MINUTE_MS + MINUTE_MS);
    const day = new Date(Date.UTC(first.getUTCFullYear(), first.getUTCMonth(), first.getUTCDate()));
    for (let searched = 0; searched < SEARCH_DAYS; searched++, day.setUTCDate(day.getUTCDate() + 1)) {
      const on =
        inYear(day.getUTCFullYear()) &&
        inMonth(day.getUTCMonth() + 1) &&
        inDay(day.getUTCDate()) &&
        inWeekday(day.getUTCDay() + 1);
      if (!on) continue;
      for (let minute = 0; minute < 24 * 60; minute++) {
        if (!inHour(Math.floor(minute / 60)) || !inMinute(minute % 60)) continue;
        const due = new Date(day.getTime() + minute * MINUTE_MS);
        if (due >= first) return due;
      }
    }
    return undefined;
  };
}

const MONTHS = ['JAN', 'FEB', 'MAR', 'APR', 'MAY', 'JUN', 'JUL', 'AUG', 'SEP', 'OCT', 'NOV', 'DEC'];
const WEEKDAYS = ['SUN', 'MON', 'TUE', 'WED', 'THU', 'FRI', 'SAT'];

/** Lists of values, ranges and steps. */
function parseField(
  text: string,
  { from, to, names }: { from: number; to: number; names: string[] },
  refuse: () => Error,
): (value: number) => boolean {
  const number = (word: string): number => {
    const named = names.indexOf(word.toUpperCase());
    const value = named === -1 ? Number(word) : named + from;
    if (!/^(\d+|[A-Za-z]{3})$/.test(word) || !(value >= from && value <= to)) throw refuse();
    return value;
  };
  const allowed = text.split(',').map((part) => {
    const [range = '', step] = part.split('/');
    const [first = '', last] = range.split('-');
    const start = first === '*' ? from : number(first);
    const end = last !== undefined ? number(last) : first === '*' || step !== undefined ? to : start;
    const every = step === undefined ? 1 : Number(step);
    if (!Number.isInteger(every) || every < 1 || start > end) throw refuse();
    return (value: number) => value >= start && value <= end && (value - start) % every === 0;
  });
  return (value) => allowed.some((test) => test(value));
}

const stateSchema = z.object({ expression: z.string(), next: z.iso.datetime() });

export class Schedules {
  readonly #folder: string;
  readonly #fire: (name: string, due: Date) => void;
  readonly #schedules = new Map<string, { expression: string; schedule: Schedule }>();
  readonly #timers = new Map<string, NodeJS.Timeout>();
  #running = false;

  /** `fire` has the event for good when it returns; it may be called again for the same time after a crash. */
  constructor(options: { folder: string; fire(name: string, due: Date): void }) {
    this.#folder = options.folder;
    this.#fire = (name, due) => options.fire(name, due);
  }

  put(name: string, expression: string): void {
    this.#schedules.set(name, { expression, schedule: parseSchedule(expression, `rule ${name}`) });
    if (this.#running) this.#arm(name);
  }

  remove(name: string): void {
    this.#schedules.delete(name);
    clearTimeout(this.#timers.get(name));
  }

  /** Begins to keep time. */
  start(): void {
    this.#running = true;
    for (const name of this.#schedules.keys()) this.#arm(name);
  }

  close(): void {
    this.#running = false;
    for (const timer of this.#timers.values()) clearTimeout(timer);
  }

  /** Fires what is due, once however often it came due, and waits for the next time. */
  #arm(name: string): void {
    const known = this.#schedules.get(name);
    if (!known || !this.#running) return;
    const { expression, schedule } = known;
    const now = new Date();
    let next = this.#read(name, expression) ?? schedule(now);
    if (next !== undefined && next <= now) {
      this.#fire(name, next);
      next = schedule(now);
    }
    if (next === undefined) return;
    this.#write(name, { expression, next: next.toISOString() });
    clearTimeout(this.#timers.get(name));
    const wait = Math.min(next.getTime() - now.getTime(), LONGEST_TIMER_MS);
    this.#timers.set(
      name,
      setTimeout(() => this.#arm(name), wait),
    );
  }

  #read(name: string, expression: string): Date | undefined {
    const path = this.#path(name);
    if (!existsSync(path)) return undefined;
    const state = stateSchema.parse(JSON.parse(readFileSync(path, 'utf8')));
    // A schedule that was changed begins anew.
    return state.expression === expression ? new Date(state.next) : undefined;
  }

  #write(name: string, state: z.infer<typeof stateSchema>): void {
    mkdirSync(this.#folder, { recursive: true });
    const path = this.#path(name);
    writeFileSync(`${path}.new`, JSON.stringify(state));
    renameSync(`${path}.new`, path);
  }

  #path(name: string): string {
    return join(this.#folder, `${encodeURIComponent(name)}.json`);
  }
}
