/** How fast the local S3 is: large objects in, out and copied, by ranges and in parts, against plain file copies. */
import { randomBytes } from 'node:crypto';
import { copyFile, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { CopyObjectCommand, GetObjectCommand, PutObjectCommand } from '@aws-sdk/client-s3';
import { type Bench, type Context, type Measured, median } from './bench.ts';
import { startS3 } from './s3.ts';

const ROUNDS = 5;
const RANGE = 8 << 20;
const SMALL = 200;

export const localS3: Bench = {
  name: 'local-s3',
  about:
    'the local S3: MB/s of put, get, ranges and copies beside plain file copies; small requests a second',
  measure,
};

async function measure({ quick, screen }: Context): Promise<Measured> {
  const size = quick ? 16 << 20 : 256 << 20;
  const body = randomBytes(size);
  const s3 = await startS3(['bench']);
  const folder = await mkdtemp(join(tmpdir(), 'slideway-bench-'));
  const Bucket = 'bench';
  const get = async (Range?: string) => {
    const answer = await s3.client.send(new GetObjectCommand({ Bucket, Key: 'a', ...(Range && { Range }) }));
    for await (const _ of answer.Body as AsyncIterable<Uint8Array>);
  };
  const ranges = Array.from({ length: size / RANGE }, (_, i) => `bytes=${i * RANGE}-${(i + 1) * RANGE - 1}`);
  const works: Record<string, () => Promise<unknown>> = {
    file_write: () => writeFile(join(folder, 'a'), body),
    file_copy: () => copyFile(join(folder, 'a'), join(folder, 'b')),
    put: () => s3.client.send(new PutObjectCommand({ Bucket, Key: 'a', Body: body })),
    get: () => get(),
    get_ranges: () => Promise.all(ranges.map((range) => get(range))),
    copy: () => s3.client.send(new CopyObjectCommand({ Bucket, Key: 'b', CopySource: `${Bucket}/a` })),
  };
  try {
    const seconds: Record<string, number[]> = {};
    const small: number[] = [];
    await screen.task('Measuring the local S3', async (at) => {
      for (let round = 0; round < ROUNDS; round++) {
        at(`round ${round + 1}/${ROUNDS}`);
        for (const [name, work] of Object.entries(works)) {
          const started = performance.now();
          await work();
          seconds[name] = [...(seconds[name] ?? []), (performance.now() - started) / 1000];
        }
        const started = performance.now();
        for (let i = 0; i < SMALL; i++) await get('bytes=0-1023');
        small.push(SMALL / ((performance.now() - started) / 1000));
      }
    });
    const mbps = (name: string) => size / 1e6 / median(seconds[name] ?? []);
    const figures = Object.fromEntries(Object.keys(works).map((name) => [`${name}_mb_per_s`, mbps(name)]));
    return {
      figures: { ...figures, small_gets_per_s: median(small) },
      ratios: {
        'put / file write': mbps('put') / mbps('file_write'),
        'copy / file copy': mbps('copy') / mbps('file_copy'),
        'get by ranges / get': mbps('get_ranges') / mbps('get'),
      },
    };
  } finally {
    await s3.close();
    await rm(folder, { recursive: true, force: true });
  }
}
