/**
 * A process that plays seeds, one JSON line each; several of them use several processors:
 *
 *   node test/faults/player.ts <first seed> <step> <last seed>
 */
import { play } from './play.ts';
import { MODELS } from './scene.ts';
import { World } from './world.ts';

export interface Line {
  seed: number;
  /** How often things went wrong, by kind. */
  faults: Record<string, number>;
  /** What did not hold. */
  broken: string[];
}

/** Schedules wait for timers now and then; so many are played side by side. */
const AT_ONCE = 3;

const [first = 1, step = 1, last = first] = process.argv.slice(2).map(Number);
const world = await World.open(MODELS);
let next = first;
async function player(): Promise<void> {
  while (next <= last) {
    const seed = next;
    next += step;
    const { schedule, broken } = await play(seed, world);
    const line: Line = { seed, faults: Object.fromEntries(schedule.faults), broken };
    process.stdout.write(`${JSON.stringify(line)}\n`);
  }
}
await Promise.all(Array.from({ length: AT_ONCE }, player));
await world.close();
