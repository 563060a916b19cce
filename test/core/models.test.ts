import { createHash } from 'node:crypto';
import { Readable } from 'node:stream';
import { buffer } from 'node:stream/consumers';
import { gzipSync } from 'node:zlib';
import { PutObjectCommand } from '@aws-sdk/client-s3';
import { pack } from 'tar-stream';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { outputNames } from '../../core/contracts.ts';
import { compareVersions, readModelPackage, resolveModel } from '../../core/models.ts';
import { MODEL } from '../support/results.ts';
import { type Services, startServices } from '../support/services.ts';

async function archive(files: Record<string, string>): Promise<Buffer> {
  const tar = pack();
  for (const [name, content] of Object.entries(files)) tar.entry({ name }, content);
  tar.finalize();
  return gzipSync(await buffer(tar));
}

const HEAD = { task: 'regression', outputs: ['age'] };
const EMBEDDING = { task: 'embedding', outputs: undefined, heatmap: undefined };
const descriptor = (changes: object = {}) => JSON.stringify({ ...MODEL, ...changes });
const read = (bytes: Buffer) =>
  readModelPackage(Readable.from([bytes.subarray(0, 100), bytes.subarray(100)]));

describe('a model package', () => {
  it('is its descriptor and the digest of all its bytes', async () => {
    const bytes = await archive({ 'model.json': descriptor(), 'model.pt': 'weights' });
    expect(await read(bytes)).toEqual({
      model: MODEL,
      format: 'torchscript',
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
    [
      'no weights',
      () => archive({ 'model.json': descriptor() }),
      /none of code.inference.py, model.pt, model.onnx/,
    ],
    [
      'both forms of weights',
      () => archive({ 'model.json': descriptor(), 'model.pt': 'w', 'model.onnx': 'w' }),
      /both model.pt and model.onnx/,
    ],
    [
      'no head where model.json names one',
      () => archive({ 'model.json': descriptor({ head: HEAD }), 'model.pt': 'w' }),
      /lacks head.pt, which head.file names/,
    ],
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

describe('its format', () => {
  it.each([
    [['model.pt'], 'torchscript'],
    [['model.onnx'], 'onnx'],
    [['code/inference.py'], 'code'],
    [['model.pt', 'code/inference.py', 'code/net.py'], 'code'],
  ])('with %j is %s', async (files, format) => {
    const bytes = await archive({
      'model.json': descriptor(),
      ...Object.fromEntries(files.map((name) => [name, 'w'])),
    });
    expect((await read(bytes)).format).toBe(format);
  });
});

describe('model.json', () => {
  const readWith = async (changes: object) => {
    const bytes = await archive({ 'model.json': descriptor(changes), 'model.pt': 'w', 'head.pt': 'w' });
    return (await read(bytes)).model;
  };

  it('may ask for either mode, any percentile, and its own tiles and jobs', async () => {
    const asked = {
      mode: 'transform',
      modelSeconds: 3590,
      aggregate: ['p1', 'p50', 'p99'],
      tile: { px: 224, mpp: 0.5, encoding: { format: 'png' } },
      transform: {
        instanceType: 'ml.g5.2xlarge',
        maxConcurrentTransforms: 4,
        maxPayloadInMB: 25,
        packsPerInstance: 7,
      },
    };
    expect(await readWith(asked)).toMatchObject(asked);
  });

  it('of an embedding gives its dimensions, and the outputs are numbered', async () => {
    const model = await readWith({ ...EMBEDDING, dimensions: 8192 });
    const names = outputNames(model);
    expect(names).toHaveLength(8192);
    expect([names[0], names[8191]]).toEqual(['f0000', 'f8191']);
  });

  it('may draw the attention of its head', async () => {
    const drawn = { output: 'attention', colormap: 'inferno' };
    const head = { ...HEAD, attention: true };
    expect((await readWith({ ...EMBEDDING, dimensions: 8, head, heatmap: drawn })).head?.file).toBe(
      'head.pt',
    );
    await expect(readWith({ head: HEAD, heatmap: drawn })).rejects.toThrow(
      /needs a head with "attention": true/,
    );
  });

  it.each([
    [{ dimensions: 8 }, /dimensions are for an embedding/],
    [{ ...EMBEDDING, dimensions: 8, outputs: ['a'] }, /outputs or dimensions, not both/],
    [EMBEDDING, /an embedding needs dimensions/],
    [{ ...EMBEDDING, dimensions: 8193 }, /dimensions/],
    [{ outputs: ['a', 'a'], heatmap: undefined }, /outputs must differ/],
    [{ head: { ...HEAD, outputs: ['a', 'a'] } }, /head.outputs must differ/],
    [{ head: { ...HEAD, file: 'model.pt' } }, /another file than the tile model/],
    [{ head: { ...HEAD, file: '../head.pt' } }, /file name that ends in .pt/],
    [
      { head: { ...HEAD, attention: true }, outputs: ['attention'], heatmap: undefined },
      /no output can be called attention/,
    ],
    [{ transform: { packsPerInstance: 0 } }, /transform.packsPerInstance/],
    [{ modelSeconds: 0 }, /modelSeconds/],
    [{ modelSeconds: 3591 }, /modelSeconds/],
    [{ aggregate: ['p0'] }, /percentile from p1 to p99/],
    [{ aggregate: ['p100'] }, /percentile from p1 to p99/],
    [{ tile: { px: 256, mpp: 0.5, encoding: { format: 'gif' } } }, /tile.encoding.format/],
    [{ transform: { maxConcurrentTransforms: 11, maxPayloadInMB: 10 } }, /at most 100/],
    [
      {
        outputs: Array.from({ length: 501 }, (_, i) => `o${i}`),
        aggregate: ['mean', 'max'],
        heatmap: undefined,
      },
      /1,?002 columns/,
    ],
  ])('with %j is refused', async (changes, message) => {
    await expect(readWith(changes)).rejects.toMatchObject({
      name: 'ModelPackageInvalid',
      message: expect.stringMatching(message),
    });
  });
});

describe('the model register', () => {
  let services: Services;
  const put = async (name: string, version: string, changes: object = {}, weights = 'model.pt') =>
    services.s3.send(
      new PutObjectCommand({
        Bucket: 'silver',
        Key: `models/${name}/${version}/model.tar.gz`,
        Body: await archive({ 'model.json': descriptor({ name, version, ...changes }), [weights]: 'w' }),
      }),
    );
  const resolve = (wanted: string, allowCode = false) =>
    resolveModel(services.s3, 'silver', wanted, { allowCode });

  beforeAll(async () => {
    services = await startServices();
    await put('stain', '1.9.0');
    await put('stain', '1.10.0');
    await put('own-code', '1.0.0', {}, 'code/inference.py');
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
    ['own-code', 'ModelFormatNotSupported'],
    ['swapped', 'ModelPackageInvalid'],
  ])('%s: %s', async (wanted, name) => {
    await expect(resolve(wanted)).rejects.toMatchObject({ name });
  });

  it('gives a package with code of its own where the stage runs it', async () => {
    expect((await resolve('own-code', true)).version).toBe('1.0.0');
  });
});
