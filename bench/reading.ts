/**
 * How fast slides are read: containers/slide-inference/bench/reading.py does the measuring; here it gets its slides,
 * a local S3 that holds them, and a slow line to it.
 */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { mkdtemp, readdir, readFile, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { PutObjectCommand } from '@aws-sdk/client-s3';
import { z } from 'zod';
import { ensureReady } from '../cli/commands/setup.ts';
import { BUILD, CONTAINER } from '../cli/paths.ts';
import { CommandFailed, command } from '../cli/setup/command.ts';
import { UserError } from '../cli/terminal.ts';
import type { Bench, Context, Measured } from './bench.ts';
import { slowLine, startS3 } from './s3.ts';

const SIDE = 40_000;
const QUICK_SIDE = 8_000;
/** A region's S3 seen from an instance: 30 ms to the first byte, 1 Gbit/s a connection. */
const LINE = { latencyMs: 30, bytesPerSecond: 125e6 };

const measuredSchema = z.object({
  figures: z.record(z.string(), z.number()),
  ratios: z.record(z.string(), z.number()),
});

export const reading: Bench = {
  name: 'reading',
  about:
    'tiles a second from slides: fast reader, OpenSlide, DataLoader, tifffile, decoder and model alone, whole jobs',
  measure,
};

async function measure({ quick, screen }: Context): Promise<Measured> {
  const { python, model } = await ensureReady(screen, { stage: 'dev' });
  const side = quick ? QUICK_SIDE : SIDE;
  const version = createHash('sha256').update(await readFile(join(CONTAINER, 'bench', 'slides.py')));
  const slides = join(BUILD, 'bench', `${side}-${version.digest('hex').slice(0, 8)}`);
  const run = (script: string, args: string[], env: NodeJS.ProcessEnv = {}, at?: (line: string) => void) =>
    command(python, ['-B', join(CONTAINER, 'bench', script), ...args], {
      env: { ...process.env, PYTHONPATH: CONTAINER, PYTHONWARNINGS: 'ignore', ...env },
      ...(at && { onLine: at }),
    });
  const s3 = await startS3(['bronze', 'silver']);
  const slow = await slowLine(s3.endpoint, LINE);
  const folder = await mkdtemp(join(tmpdir(), 'slideway-bench-'));
  try {
    await screen.task(`Making slides of ${side} × ${side} pixels`, () =>
      run('slides.py', ['--out', slides, '--side', String(side)]),
    );
    for (const name of (await readdir(slides)).filter((file) => file.endsWith('.svs'))) {
      const path = join(slides, name);
      const { size } = await stat(path);
      await s3.client.send(
        new PutObjectCommand({
          Bucket: 'bronze',
          Key: `slides/${name}`,
          Body: createReadStream(path),
          ContentLength: size,
        }),
      );
    }
    const out = join(folder, 'reading.json');
    const digest = `sha256:${createHash('sha256')
      .update(await readFile(model))
      .digest('hex')}`;
    await screen.task('Measuring reading', (at) =>
      run(
        'reading.py',
        [
          ...['--slides', slides, '--endpoint', s3.endpoint, '--slow-endpoint', slow.endpoint],
          ...['--model', model, '--digest', digest, '--out', out],
          ...(quick ? ['--rounds', '1', '--rows', '6'] : []),
        ],
        s3.env,
        at,
      ),
    );
    return measuredSchema.parse(JSON.parse(await readFile(out, 'utf8')));
  } catch (error) {
    if (!(error instanceof CommandFailed)) throw error;
    throw new UserError(`The bench failed:\n${error.tail.join('\n')}`, undefined, { cause: error });
  } finally {
    slow.close();
    await s3.close();
    await rm(folder, { recursive: true, force: true });
  }
}
