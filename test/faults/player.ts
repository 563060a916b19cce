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
/** A world has so many of them, then it makes room for another. */
const IN_A_WORLD = 60;

const [first = 1, step = 1, last = first] = process.argv.slice(2).map(Number);
const seeds: number[] = [];
for (let seed = first; seed <= last; seed += step) seeds.push(seed);
while (seeds.length > 0) {
  const world = await World.open(MODELS);
  const some = seeds.splice(0, IN_A_WORLD);
  await Promise.all(Array.from({ length: AT_ONCE }, () => playAll(some, world)));
  await world.close();
}

async function playAll(some: number[], world: World): Promise<void> {
  for (let seed = some.shift(); seed !== undefined; seed = some.shift()) {
    const { schedule, broken } = await play(seed, world);
    const line: Line = { seed, faults: Object.fromEntries(schedule.faults), broken };
    process.stdout.write(`${JSON.stringify(line)}\n`);
  }
}
