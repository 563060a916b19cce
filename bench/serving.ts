/** How fast packs are answered for: containers/slide-inference/bench/serving.py does the measuring. */
import type { Bench } from './bench.ts';
import { measureInPython } from './python.ts';

export const serving: Bench = {
  name: 'serving',
  about: 'tiles a second through serve over HTTP, beside decoding alone and the model alone',
  measure: (context) => measureInPython(context, 'serving.py', async ({ model }) => ['--model', model]),
};
