/**
 * Benches that the container's own Python does (containers/slide-inference/bench): they get the bench's slides, and a
 * local S3 that holds them.
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
import type { Context, Measured } from './bench.ts';
import { startS3 } from './s3.ts';

/** Pixels a side of the slides. */
const SIDE = Number(process.env.SLIDEWAY_BENCH_SIDE ?? 40_000);
const QUICK_SIDE = 8_000;

const measuredSchema = z.object({
  figures: z.record(z.string(), z.number()),
  ratios: z.record(z.string(), z.number()),
});

/** What a bench's arguments are made of. */
export interface Ground {
  /** Folder of the slides. */
  slides: string;
  endpoint: string;
  /** model.tar.gz of the reference model. */
  model: string;
}

/** Runs a script with what `args` makes of the ground, and reads the document that it writes. */
export async function measureInPython(
  { quick, screen }: Context,
  script: string,
  args: (ground: Ground) => Promise<string[]>,
): Promise<Measured> {
  const { python, model } = await ensureReady(screen, { stage: 'dev' });
  const side = quick ? QUICK_SIDE : SIDE;
  const version = createHash('sha256').update(await readFile(join(CONTAINER, 'bench', 'slides.py')));
  const slides = join(BUILD, 'bench', `${side}-${version.digest('hex').slice(0, 8)}`);
  const run = (file: string, given: string[], env: NodeJS.ProcessEnv = {}, at?: (line: string) => void) =>
    command(python, ['-B', join(CONTAINER, 'bench', file), ...given], {
      env: { ...process.env, PYTHONPATH: CONTAINER, PYTHONWARNINGS: 'ignore', ...env },
      ...(at && { onLine: at }),
    });
  const s3 = await startS3(['bronze', 'silver']);
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
    const out = join(folder, 'measured.json');
    const own = await args({ slides, endpoint: s3.endpoint, model });
    await screen.task(`Measuring with ${script}`, (at) =>
      run(
        script,
        [
          ...['--slides', slides, '--endpoint', s3.endpoint, '--out', out],
          ...own,
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
    await s3.close();
    await rm(folder, { recursive: true, force: true });
  }
}
