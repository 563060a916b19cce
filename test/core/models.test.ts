import { createHash } from 'node:crypto';
import { Readable } from 'node:stream';
import { buffer } from 'node:stream/consumers';
import { gzipSync } from 'node:zlib';
import { PutObjectCommand } from '@aws-sdk/client-s3';
import { pack } from 'tar-stream';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { compareVersions, readModelPackage, resolveModel } from '../../core/models.ts';
import { MODEL } from '../support/results.ts';
import { type Services, startServices } from '../support/services.ts';

async function archive(files: Record<string, string>): Promise<Buffer> {
  const tar = pack();
  for (const [name, content] of Object.entries(files)) tar.entry({ name }, content);
  tar.finalize();
  return gzipSync(await buffer(tar));
}

const descriptor = (changes: object = {}) => JSON.stringify({ ...MODEL, ...changes });
const read = (bytes: Buffer) =>
  readModelPackage(Readable.from([bytes.subarray(0, 100), bytes.subarray(100)]));

describe('a model package', () => {
  it('is its descriptor and the digest of all its bytes', async () => {
    const bytes = await archive({ 'model.json': descriptor(), 'model.pt': 'weights' });
    expect(await read(bytes)).toEqual({
      model: MODEL,
      digest: `sha256:${createHash('sha256').update(bytes).digest('hex')}`,
    });
  });

  it('may be packed with a leading ./', async () => {
    const bytes = await archive({ './model.pt': 'weights', './model.json': descriptor() });
    expect((await read(bytes)).model.name).toBe(MODEL.name);
  });

  it.each([
    ['not gzip', async () => Buffer.from('hello'), /not a readable/],
    [
      'cut off',
      async () => (await archive({ 'model.json': descriptor(), 'model.pt': 'w' })).subarray(0, 60),
      /not a readable/,
    ],
    ['no model.json', () => archive({ 'model.pt': 'w' }), /model.json is missing/],
    ['no weights', () => archive({ 'model.json': descriptor() }), /none of model.pt/],
    ['model.json is not JSON', () => archive({ 'model.json': '{', 'model.pt': 'w' }), /not JSON/],
    ['no outputs', () => archive({ 'model.json': descriptor({ outputs: [] }), 'model.pt': 'w' }), /outputs/],
    ['a bad name', () => archive({ 'model.json': descriptor({ name: '../x' }), 'model.pt': 'w' }), /name/],
    [
      'a negative mpp',
      () => archive({ 'model.json': descriptor({ tile: { px: 256, mpp: -1 } }), 'model.pt': 'w' }),
      /mpp/,
    ],
    [
      'a heatmap of an output that is not there',
      () =>
        archive({
          'model.json': descriptor({ heatmap: { output: 'other', colormap: 'inferno' } }),
          'model.pt': 'w',
        }),
      /heatmap.output other/,
    ],
  ])('is refused when %s', async (_, make, message) => {
    await expect(read(await make())).rejects.toMatchObject({
      name: 'ModelPackageInvalid',
      message: expect.stringMatching(message),
    });
  });
});

it('versions are ordered by number, a release above its pre-releases', () => {
  const sorted = ['1.10.0', '1.9.0', '2.0.0-rc1', '2.0.0', '1.9.0-beta.2', '1.9.0-beta.10'].sort(
    compareVersions,
  );
  expect(sorted).toEqual(['1.9.0-beta.2', '1.9.0-beta.10', '1.9.0', '1.10.0', '2.0.0-rc1', '2.0.0']);
});

it('is refused by name when its weights are not TorchScript', async () => {
  for (const weights of ['model.onnx', 'code/inference.py']) {
    const bytes = await archive({ 'model.json': descriptor(), [weights]: 'w' });
    await expect(read(bytes)).rejects.toMatchObject({ name: 'ModelFormatNotSupported' });
  }
});

describe('the model register', () => {
  let services: Services;
  const put = async (name: string, version: string, changes: object = {}) =>
    services.s3.send(
      new PutObjectCommand({
        Bucket: 'silver',
        Key: `models/${name}/${version}/model.tar.gz`,
        Body: await archive({ 'model.json': descriptor({ name, version, ...changes }), 'model.pt': 'w' }),
      }),
    );
  const resolve = (wanted: string) => resolveModel(services.s3, 'silver', wanted);

  beforeAll(async () => {
    services = await startServices();
    await put('stain', '1.9.0');
    await put('stain', '1.10.0');
    await put('later', '1.0.0', { mode: 'transform' });
    await put('swapped', '1.0.0', { name: 'another' });
  });
  afterAll(() => services.close());

  it('gives the newest version, or the one that is asked for', async () => {
    expect((await resolve('stain')).version).toBe('1.10.0');
    expect((await resolve('stain@1.9.0')).version).toBe('1.9.0');
  });

  it.each([
    ['nobody', 'ModelNotFound'],
    ['stain@3.0.0', 'ModelNotFound'],
    ['later', 'ModelModeNotSupported'],
    ['swapped', 'ModelPackageInvalid'],
  ])('%s: %s', async (wanted, name) => {
    await expect(resolve(wanted)).rejects.toMatchObject({ name });
  });
});
