/**
 * How fast slides are read: containers/slide-inference/bench/reading.py does the measuring, beside the local S3 also
 * through a slow line to it.
 */
import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import type { Bench, Context, Measured } from './bench.ts';
import { measureInPython } from './python.ts';
import { slowLine } from './s3.ts';

/** Small real slides, which the tests use too. */
const REAL_SLIDES = process.env.SLIDEWAY_TEST_SLIDES;
/** A region's S3 seen from an instance: 30 ms to the first byte, 1 Gbit/s a connection. */
const LINE = { latencyMs: 30, bytesPerSecond: 125e6 };

export const reading: Bench = {
  name: 'reading',
  about:
    'tiles a second from slides: fast reader, OpenSlide, DataLoader, tifffile, decoder and model alone, whole jobs',
  measure,
};

async function measure(context: Context): Promise<Measured> {
  let slow: Awaited<ReturnType<typeof slowLine>> | undefined;
  try {
    return await measureInPython(context, 'reading.py', async ({ endpoint, model }) => {
      slow = await slowLine(endpoint, LINE);
      const digest = createHash('sha256').update(await readFile(model));
      return [
        ...(REAL_SLIDES ? ['--real', REAL_SLIDES] : []),
        ...['--slow-endpoint', slow.endpoint, '--model', model, '--digest', `sha256:${digest.digest('hex')}`],
      ];
    });
  } finally {
    slow?.close();
  }
}
