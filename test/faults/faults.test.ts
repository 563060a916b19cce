/**
 * The fault test-bench: random schedules over the real code on the local services. A seed is the whole of a schedule:
 *
 *   SLIDEWAY_FAULT_SCHEDULES=5000 vitest run test/faults     so many
 *   SLIDEWAY_FAULT_SEED=4711 vitest run test/faults          that one, with its story
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { describe, expect, it } from 'vitest';
import { Dice } from './dice.ts';
import { play } from './play.ts';
import type { Line } from './player.ts';
import { MODELS, sceneOf, weatherOf } from './scene.ts';
import { World } from './world.ts';

const only = process.env.SLIDEWAY_FAULT_SEED;
const schedules = Number(process.env.SLIDEWAY_FAULT_SCHEDULES || 200);

describe('dice', () => {
  it('give the same seed the same schedule, and another seed another', () => {
    expect(sceneOf(7)).toEqual(sceneOf(7));
    expect(sceneOf(8)).not.toEqual(sceneOf(7));
    const rolls = Array.from({ length: 1000 }, (_, i) => new Dice(1).roll(i));
    const mean = rolls.reduce((sum, roll) => sum + roll, 0) / rolls.length;
    expect(mean).toBeCloseTo(0.5, 1);
  });
});

describe.skipIf(only !== undefined)('whatever goes wrong', () => {
  const lines: Line[] = [];

  it(`every slide ends once, as it lay in Landing and on record (${schedules} schedules)`, {
    timeout: 120_000 + schedules * 10_000,
  }, async () => {
    const players = Math.min(availableParallelism(), 8);
    const all = Array.from({ length: players }, (_, n) => played(n + 1, players, schedules));
    lines.push(...(await Promise.all(all)).flat());
    const failures = lines
      .filter(({ broken }) => broken.length > 0)
      .map(
        ({ seed, broken }) => `SLIDEWAY_FAULT_SEED=${seed} (${weatherOf(seed)}):\n  ${broken.join('\n  ')}`,
      );
    expect(failures, failures.join('\n')).toEqual([]);
    expect(lines).toHaveLength(schedules);
  });

  it.skipIf(schedules < 200)('and all of it did go wrong', () => {
    const happened = new Set(lines.flatMap(({ faults }) => Object.keys(faults)));
    const kinds = [
      ...['SlowDown', 'InternalError', 'ServiceUnavailable', 'ConditionalRequestConflict', 'refused-late'],
      ...['ProvisionedThroughputExceededException', 'ThrottlingException', 'InternalServerError'],
      ...['unsent', 'answer-lost', 'cut-off', 'killed-before', 'killed-after', 'not-taken'],
      ...['function-answer-lost', 'little-time', 'genuine 412 of s3', 'genuine 400 of dynamodb'],
    ];
    expect(kinds.filter((kind) => !happened.has(kind))).toEqual([]);
    expect(new Set(lines.map(({ seed }) => weatherOf(seed))).size).toBe(6);
  });
});

if (only !== undefined) {
  it(`seed ${only} holds`, { timeout: 120_000 }, async () => {
    const world = await World.open(MODELS);
    try {
      const { schedule, broken } = await play(Number(only), world);
      const { scene, troubles, story } = schedule;
      process.stdout.write(`${inWords(scene)}\n\nweather: ${troubles.weather}\n${story.join('\n')}\n`);
      expect(broken).toEqual([]);
    } finally {
      await world.close();
    }
  });
}

/** What a player of its own process has to say of its seeds. */
async function played(first: number, step: number, last: number): Promise<Line[]> {
  const args = [first, step, last].map(String);
  const child = spawn(process.execPath, [join(import.meta.dirname, 'player.ts'), ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let said = '';
  child.stderr.on('data', (chunk) => {
    said += chunk;
  });
  const lines: Line[] = [];
  for await (const line of createInterface({ input: child.stdout })) lines.push(JSON.parse(line) as Line);
  if (child.exitCode === null) await once(child, 'exit');
  expect(child.exitCode, `after seeds ${lines.map(({ seed }) => seed).join(' ')}:\n${said}`).toBe(0);
  return lines;
}

const inWords = (scene: unknown) =>
  JSON.stringify(scene, (_, value: unknown) => (isBuffer(value) ? `${value.data.length} bytes` : value), 2);

const isBuffer = (value: unknown): value is { data: number[] } =>
  typeof value === 'object' && value !== null && 'type' in value && value.type === 'Buffer';
