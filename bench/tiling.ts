/** How fast slides become packs: containers/slide-inference/bench/tiling.py does the measuring. */
import type { Bench } from './bench.ts';
import { measureInPython } from './python.ts';

export const tiling: Bench = {
  name: 'tiling',
  about:
    'tiles a second into packs, beside reading alone and encoding alone; passed through beside encoded again',
  measure: (context) => measureInPython(context, 'tiling.py', async () => []),
};
