/** Model packages made here: a model.json, and weights that only a job would look into. */
import { buffer } from 'node:stream/consumers';
import { gzipSync } from 'node:zlib';
import { pack } from 'tar-stream';

const DESCRIPTION = {
  name: 'own',
  version: '1.0.0',
  license: 'none',
  task: 'regression',
  outputs: ['share'],
  tile: { px: 256, mpp: 0.5 },
  input: { mean: [0, 0, 0], std: [1, 1, 1] },
  mode: 'processing',
};

/** model.tar.gz of a description with `changes`. */
export async function packageOf(
  changes: object = {},
  weights: string | Buffer = 'some weights',
): Promise<Buffer> {
  const tar = pack();
  tar.entry({ name: 'model.json' }, JSON.stringify({ ...DESCRIPTION, ...changes }));
  tar.entry({ name: 'model.pt' }, weights);
  tar.finalize();
  return gzipSync(await buffer(tar as AsyncIterable<Buffer>), { level: 1 });
}
