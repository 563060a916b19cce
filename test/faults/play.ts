/** Plays one seed and says what did not hold. */
import { breaches } from './checks.ts';
import { Schedule } from './schedule.ts';
import type { World } from './world.ts';

export interface Played {
  seed: number;
  schedule: Schedule;
  /** Empty where everything held. */
  broken: string[];
}

export async function play(seed: number, world: World): Promise<Played> {
  const schedule = new Schedule(seed, world);
  try {
    await schedule.play();
    const broken = await breaches(schedule);
    const before = await schedule.snapshot();
    await schedule.redeliver();
    const after = await schedule.snapshot();
    for (const key of new Set([...Object.keys(before), ...Object.keys(after)]))
      if (before[key] !== after[key])
        broken.push(`the same events again changed ${key}: ${before[key]} became ${after[key]}`);
    return { seed, schedule, broken };
  } finally {
    await world.end(schedule.scene.study);
  }
}
