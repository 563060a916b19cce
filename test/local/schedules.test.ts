import { readdirSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { parseSchedule, Schedules } from '../../local/schedules.ts';
import { temporaryFolder } from './kit.ts';

const next = (expression: string, after: string) =>
  parseSchedule(expression, 'rule r')(new Date(after))?.toISOString();

describe('a schedule is next due', () => {
  it.each([
    ['rate(1 minute)', '2026-11-20T10:00:30Z', '2026-11-20T10:01:30.000Z'],
    ['rate(12 hours)', '2026-11-20T22:00:00Z', '2026-11-21T10:00:00.000Z'],
    ['rate(1 day)', '2026-11-20T10:00:00Z', '2026-11-21T10:00:00.000Z'],
    ['cron(15 2 * * ? *)', '2026-11-20T02:14:59Z', '2026-11-20T02:15:00.000Z'],
    ['cron(15 2 * * ? *)', '2026-11-20T02:15:00Z', '2026-11-21T02:15:00.000Z'],
    ['cron(0/15 * * * ? *)', '2026-11-20T10:46:00Z', '2026-11-20T11:00:00.000Z'],
    ['cron(*/20 8-17 ? * MON-FRI *)', '2026-11-20T17:40:00Z', '2026-11-23T08:00:00.000Z'],
    ['cron(0 10 ? * 7 *)', '2026-11-20T10:00:00Z', '2026-11-21T10:00:00.000Z'],
    ['cron(0 8 1 JAN,jul ? *)', '2026-11-20T10:00:00Z', '2027-01-01T08:00:00.000Z'],
    ['cron(0 0 29 2 ? *)', '2026-11-20T10:00:00Z', '2028-02-29T00:00:00.000Z'],
    ['cron(0 0 1 1 ? 2020-2022)', '2026-11-20T10:00:00Z', undefined],
  ])('%s after %s', (expression, after, expected) => {
    expect(next(expression, after)).toBe(expected);
  });

  it.each([
    'rate(1 days)',
    'rate(2 day)',
    'rate(0 minutes)',
    'rate(5 weeks)',
    'every day',
    'cron(0 8 * * *)',
    'cron(0 8 * * * *)',
    'cron(0 8 ? * ? *)',
    'cron(60 8 * * ? *)',
    'cron(0 8 L * ? *)',
    'cron(0 8 ? * 3#2 *)',
    'cron(0 8 15W * ? *)',
    'cron(0 8 9-3 * ? *)',
    'at(2026-11-20T10:00:00)',
  ])('%s is refused', (expression) => {
    expect(() => parseSchedule(expression, 'rule r')).toThrow(
      expect.objectContaining({ name: 'UnsupportedLocally', message: expect.stringContaining(expression) }),
    );
  });
});

describe('schedules', () => {
  beforeEach(() => void vi.useFakeTimers({ now: new Date('2026-11-20T10:00:00Z') }));
  afterEach(() => void vi.useRealTimers());

  function started(folder = temporaryFolder(), expression = 'rate(1 hour)') {
    const fired: string[] = [];
    const schedules = new Schedules({
      folder,
      fire: (name, due) => fired.push(`${name} ${due.toISOString().slice(11, 16)}`),
    });
    schedules.put('hourly', expression);
    schedules.start();
    return { schedules, fired, folder };
  }

  it('fire each time they are due, and no more once closed', () => {
    const { schedules, fired } = started();
    vi.advanceTimersByTime(59 * 60_000);
    expect(fired).toEqual([]);
    vi.advanceTimersByTime(2 * 3600_000);
    expect(fired).toEqual(['hourly 11:00', 'hourly 12:00']);
    schedules.close();
    vi.advanceTimersByTime(9 * 3600_000);
    expect(fired).toHaveLength(2);
  });

  it('wait for times further away than a timer holds', () => {
    const { schedules, fired } = started(undefined, 'cron(0 0 25 12 ? *)');
    vi.advanceTimersByTime(36 * 24 * 3600_000);
    expect(fired).toEqual(['hourly 00:00']);
    schedules.close();
  });

  it('that came due while nothing ran fire once at the next start, then as before', () => {
    const first = started();
    first.schedules.close();
    vi.setSystemTime(new Date('2026-11-22T15:30:00Z'));
    const { schedules, fired } = started(first.folder);
    expect(fired).toEqual(['hourly 11:00']);
    vi.advanceTimersByTime(3600_000);
    expect(fired).toEqual(['hourly 11:00', 'hourly 16:30']);
    schedules.close();
  });

  it('that were changed begin anew, and those that were taken away are still', () => {
    const first = started();
    first.schedules.close();
    vi.setSystemTime(new Date('2026-11-22T15:30:00Z'));
    const { schedules, fired } = started(first.folder, 'rate(2 hours)');
    vi.advanceTimersByTime(3600_000);
    expect(fired).toEqual([]);
    schedules.remove('hourly');
    vi.advanceTimersByTime(9 * 3600_000);
    expect(fired).toEqual([]);
    schedules.close();
  });

  it('leave no trace where they were never started', () => {
    const folder = temporaryFolder();
    new Schedules({ folder, fire: () => {} }).put('hourly', 'rate(1 hour)');
    expect(readdirSync(folder)).toEqual([]);
  });
});
