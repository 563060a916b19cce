/** `slideway model` as people start it: packages made by the container's own code, registered in a real local AWS. */
import { spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import { HeadObjectCommand, PutObjectCommand } from '@aws-sdk/client-s3';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { describeModel, outcome } from '../../cli/commands/model.ts';
import { number, threeNumbers, words } from '../../cli/model-options.ts';
import { findModel, listModels, ModelVersionTaken, registerModel } from '../../cli/models.ts';
import { PROJECT } from '../../cli/paths.ts';
import { readyPython } from '../../cli/setup/python.ts';
import { plain } from '../../cli/terminal.ts';
import { modelKey } from '../../core/keys.ts';
import { readModelPackage } from '../../core/models.ts';
import { packageOf } from '../support/packages.ts';
import { type Services, startServices } from '../support/services.ts';

interface Ended {
  code: number | null;
  out: string;
  err: string;
}

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'slideway-model-test-'));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

function slideway(...args: string[]): Promise<Ended> {
  const env = { ...process.env, SLIDEWAY_STATE: join(folder, 'state'), SLIDEWAY_DEBUG: '' };
  const child = spawn(process.execPath, [join(PROJECT, 'cli', 'main.ts'), 'model', ...args], {
    env,
    cwd: folder,
  });
  const ended: Ended = { code: null, out: '', err: '' };
  child.stdout.on('data', (data) => {
    ended.out += data;
  });
  child.stderr.on('data', (data) => {
    ended.err += data;
  });
  return new Promise((resolve) => {
    child.on('close', (code) => resolve({ ...ended, code }));
  });
}

/** Weights that Python makes: a network by the name of its file, and what an embedding's head is. */
const WEIGHTS = `
import sys, torch
class Tissue(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 7, stride=4)
        self.last = torch.nn.Linear(8, 3)
    def forward(self, tiles):
        return torch.softmax(self.last(self.conv(tiles).relu().mean((2, 3))), 1)
class Batchy(torch.nn.Module):
    def forward(self, tiles):
        return (tiles - tiles.mean()).mean((1, 2, 3)).unsqueeze(1)
class Head(torch.nn.Module):
    def forward(self, features):
        weights = torch.softmax(features[:, 0], 0)
        return (features * weights.unsqueeze(1)).sum(0)[:2], weights
torch.manual_seed(0)
for network, name in ((Tissue(), "tissue"), (Batchy(), "batchy"), (Head(), "head")):
    torch.jit.script(network.eval()).save(sys.argv[1] + "/" + name + ".pt")
`;

describe('What a package is made of', () => {
  it('is model.json, flags over it, and defaults for what neither says', () => {
    const flags = { license: 'MIT', task: 'regression', outputs: ['a'], px: 64, mpp: 0.5 };
    expect(describeModel('runs/My Model/model.pt', {}, flags)).toEqual({
      ...{ name: 'my-model', version: '0.1.0', license: 'MIT', task: 'regression', outputs: ['a'] },
      ...{ tile: { px: 64, mpp: 0.5 }, input: { mean: [0, 0, 0], std: [1, 1, 1] }, mode: 'processing' },
    });
    const file = {
      name: 'own',
      license: 'MIT',
      task: 'regression',
      outputs: ['a'],
      tile: { px: 64, mpp: 1 },
    };
    expect(describeModel('x.pt', file, { mpp: 0.25, version: '2', mode: 'transform' })).toMatchObject({
      ...{ name: 'own', version: '2', mode: 'transform', tile: { px: 64, mpp: 0.25 } },
    });
    const embedding = describeModel('x.onnx', {}, { license: 'MIT', dimensions: 8, px: 64, mpp: 1 });
    expect(embedding).toMatchObject({ task: 'embedding', dimensions: 8 });
  });

  it('is never guessed where only the author knows it: everything that is missing is named', () => {
    expect(() => describeModel('x.pt', {}, {})).toThrow(/--license.*--task.*--px.*--mpp/);
    expect(() => describeModel('x.pt', {}, { task: 'classification' })).toThrow(/--outputs/);
    expect(() => describeModel('x.pt', {}, { task: 'embedding' })).toThrow(/--dimensions/);
  });

  it('is given in words and numbers; others are refused by what they should be', () => {
    expect([words('a, b'), number('0.25'), threeNumbers('1,2,3')]).toEqual([['a', 'b'], 0.25, [1, 2, 3]]);
    expect(() => words('a,,b')).toThrow(/words separated by commas/);
    for (const text of ['', 'x', 'Infinity']) expect(() => number(text)).toThrow(/must be a number/);
    expect(() => threeNumbers('1,2')).toThrow(/three numbers/);
  });
});

it('the outcome of a check says in words what was tried, and what to look at', () => {
  const lines = outcome(
    {
      ...{
        ok: true,
        name: 'x',
        version: '1',
        license: 'MIT',
        digest: 'sha256:ab',
        bytes: 2e6,
        format: 'onnx',
      },
      ...{ task: 'embedding', mode: 'transform', dimensions: 1024, device: 'cpu', tiles: 64 },
      tile: { px: 224, mpp: 0.5, overlap: 32 },
      maxDifference: 2.5e-7,
      tilesPerSecond: { processing: 123.456, transform: 99 },
      sample: { f0000: 0.123456 },
      head: { task: 'classification', outputs: { benign: 0.25, malignant: 0.75 }, attention: true },
      warnings: ['batch is held to 42'],
    },
    'my models/x.tar.gz',
    { paint: plain },
  ).join('\n');
  expect(lines).toMatch(/Answers +embedding for mode transform: 1,024 features/);
  expect(lines).toMatch(/Both modes +differ by at most 2.5e-7/);
  expect(lines).toMatch(/Head +classification with attention: benign 0.25, malignant 0.75/);
  expect(lines).toContain('! batch is held to 42');
  expect(lines).toContain("slideway model add 'my models/x.tar.gz'");
});

describe('The register', () => {
  let services: Services;
  beforeAll(async () => {
    services = await startServices();
  });
  afterAll(() => services.close());
  const file = (name: string) => join(folder, name);
  const add = (path: string) => registerModel(services.s3, 'silver', path);

  it('keeps what people ask of a package beside it, whatever the licence is written in', async () => {
    writeFileSync(file('own.tar.gz'), await packageOf({ license: 'Für Forschung, 無料' }));
    const { digest, added } = await add(file('own.tar.gz'));
    expect(added).toBe(true);
    const [found] = await listModels(services.s3, 'silver', 'own');
    expect(found).toMatchObject({
      ...{ name: 'own', version: '1.0.0', digest, license: 'Für Forschung, 無料', task: 'regression' },
      ...{ mode: 'processing', format: 'torchscript' },
    });
  });

  it('takes the same content again, and other content never', async () => {
    expect((await add(file('own.tar.gz'))).added).toBe(false);
    writeFileSync(file('other.tar.gz'), await packageOf({}, 'other weights'));
    const before = await services.s3.send(
      new HeadObjectCommand({ Bucket: 'silver', Key: modelKey('own', '1.0.0') }),
    );
    await expect(add(file('other.tar.gz'))).rejects.toThrow(ModelVersionTaken);
    const after = await services.s3.send(
      new HeadObjectCommand({ Bucket: 'silver', Key: modelKey('own', '1.0.0') }),
    );
    expect(after.ETag).toBe(before.ETag);
  });

  it('of two that register one version at once takes one, also in parts', async () => {
    // Above 16 MB an upload has parts, and its condition counts when they are put together.
    const big = (seed: number) => {
      const weights = Buffer.alloc(18 << 20);
      for (let i = 0, x = seed; i < weights.length; i += 4) {
        x = (Math.imul(x, 1664525) + 1013904223) >>> 0;
        weights.writeUInt32LE(x, i);
      }
      return weights;
    };
    for (const seed of [1, 2]) {
      writeFileSync(file(`big-${seed}.tar.gz`), await packageOf({ name: 'big' }, big(seed)));
    }
    const ended = await Promise.allSettled([add(file('big-1.tar.gz')), add(file('big-2.tar.gz'))]);
    expect(ended.map(({ status }) => status).sort()).toEqual(['fulfilled', 'rejected']);
    const refused = ended.find((each) => each.status === 'rejected');
    expect(refused?.reason).toBeInstanceOf(ModelVersionTaken);
  }, 60_000);

  it('lists the newest version of a model first, and finds it', async () => {
    for (const version of ['1.9.0', '1.10.0', '2.0.0-rc1']) {
      writeFileSync(file('many.tar.gz'), await packageOf({ name: 'many', version }));
      await add(file('many.tar.gz'));
    }
    const versions = (await listModels(services.s3, 'silver', 'many')).map(({ version }) => version);
    expect(versions).toEqual(['2.0.0-rc1', '1.10.0', '1.9.0']);
    expect((await findModel(services.s3, 'silver', 'many'))?.model.version).toBe('2.0.0-rc1');
    expect((await findModel(services.s3, 'silver', 'many@1.9.0'))?.model.version).toBe('1.9.0');
    expect(await findModel(services.s3, 'silver', 'many@3')).toBeUndefined();
  });

  it('tells of a package that was uploaded in another way, too', async () => {
    const bytes = await packageOf({ name: 'bare' });
    const Key = modelKey('bare', '1.0.0');
    await services.s3.send(new PutObjectCommand({ Bucket: 'silver', Key, Body: bytes }));
    const { digest } = await readModelPackage(Readable.from([bytes]));
    expect(await findModel(services.s3, 'silver', 'bare')).toMatchObject({ digest, license: 'none' });
    writeFileSync(file('bare.tar.gz'), bytes);
    expect((await add(file('bare.tar.gz'))).added).toBe(false);
  });
});

describe('Wrong use', () => {
  it.each([
    [['build', 'nowhere.pt'], /nowhere.pt cannot be read: ENOENT/],
    [['build', '.'], /holds none of code\/inference.py, model.pt, model.onnx/],
    [['build', 'w.pt', '--task', 'guessing'], /Allowed choices are classification/],
    [['build', 'w.pt', '--px', '64'], /Give --license.*--task.*--mpp/],
    [['check', 'w.pt'], /w.pt: not a readable model.tar.gz: .* \(ModelPackageInvalid\)/],
    [['add', 'w.pt'], /w.pt: not a readable model.tar.gz/],
    [['show', 'nobody'], /No model nobody is registered/],
    [['fly'], /unknown command/],
  ])('%j ends with 2 and one clear line', async (args, message) => {
    writeFileSync(join(folder, 'w.pt'), 'no weights');
    const { code, err } = await slideway(...args);
    expect(code).toBe(2);
    expect(err).toMatch(message);
    expect(err).not.toContain('    at ');
  });

  it('is told by --help of each command, with examples', async () => {
    for (const command of ['build', 'check', 'add', 'list', 'show']) {
      const { code, out } = await slideway(command, '--help');
      expect(code).toBe(0);
      expect(out).toMatch(/Examples?:\n {2}slideway model/);
    }
  });

  it('lists nothing, and makes nothing, where nothing is registered', async () => {
    expect(await slideway('list', '--json')).toMatchObject({ code: 0, out: '[]\n' });
    expect(existsSync(join(folder, 'state'))).toBe(false);
  });
});

const python = readyPython();

describe.skipIf(!python)('A model', () => {
  const FLAGS = ['--license', 'MIT', '--px', '64', '--mpp', '0.5'];
  const TISSUE = ['--task', 'classification', '--outputs', 'stroma,epithelium,fat'];
  beforeAll(() => {
    const script = join(folder, 'weights.py');
    writeFileSync(script, WEIGHTS);
    const made = spawnSync(python ?? '', [script, folder], { encoding: 'utf8' });
    expect(made.stderr.replaceAll(/.*Warning.*\n.*\n/g, '')).toBe('');
  }, 60_000);

  it('is built, checked in both modes, registered, listed and shown', async () => {
    const built = await slideway('build', 'tissue.pt', ...TISSUE, ...FLAGS, '--version', '1.2.0', '--json');
    expect(built.err).not.toContain('slideway:');
    const { file, digest, format } = JSON.parse(built.out);
    expect({ file, format }).toEqual({ file: join(folder, 'tissue-1.2.0.tar.gz'), format: 'torchscript' });
    const again = await slideway('build', 'tissue.pt', ...TISSUE, ...FLAGS, '--version', '1.2.0', '--json');
    expect(JSON.parse(again.out).digest).toBe(digest);

    const checked = await slideway('check', 'tissue-1.2.0.tar.gz', '--tiles', '8');
    expect(checked).toMatchObject({ code: 0, out: expect.stringMatching(/Both modes +(the same|differ)/) });

    const added = await slideway('add', 'tissue-1.2.0.tar.gz');
    expect(added).toMatchObject({ code: 0, out: expect.stringContaining('Registered: tissue@1.2.0') });
    const listed = await slideway('list');
    expect(listed.out).toMatch(/tissue +1\.2\.0 +classification +processing +torchscript .* MIT/);
    const shown = JSON.parse((await slideway('show', 'tissue', '--json')).out);
    expect(shown).toMatchObject({ digest, usedBy: [], model: { tile: { px: 64, mpp: 0.5 } } });
  }, 120_000);

  it('from a folder with model.json keeps its text, and takes its head along', async () => {
    const source = join(folder, 'features');
    mkdirSync(join(source, 'code'), { recursive: true });
    writeFileSync(
      join(source, 'code', 'inference.py'),
      `import torch
def model_fn(model_dir):
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
`,
    );
    writeFileSync(join(source, 'head.pt'), readFileSync(join(folder, 'head.pt')));
    const text = JSON.stringify({
      ...{ name: 'features', version: '1.0.0', license: 'MIT', task: 'embedding', dimensions: 3 },
      ...{ tile: { px: 64, mpp: 0.5 }, input: { mean: [0, 0, 0], std: [1, 1, 1] }, mode: 'transform' },
      head: { task: 'regression', outputs: ['red', 'green'], attention: true },
    });
    writeFileSync(join(source, 'model.json'), text);
    const built = JSON.parse((await slideway('build', 'features', '--json')).out);
    expect(built).toMatchObject({ format: 'code' });
    const names = built.files.map(({ name }: { name: string }) => name).sort();
    expect(names).toEqual(['code/inference.py', 'head.pt', 'model.json']);
    const checked = JSON.parse((await slideway('check', built.file, '--tiles', '4', '--json')).out);
    expect(checked).toMatchObject({ ok: true, dimensions: 3, head: { attention: true } });
    const refused = await slideway('check', built.file, '--no-code');
    expect(refused).toMatchObject({ code: 1, out: expect.stringMatching(/^ModelFormatNotSupported: /) });
  }, 120_000);

  it.each([
    ['says other than it is', ['tissue.pt', '--task', 'classification', '--outputs', 'a,b'], 'ModelError'],
    ['looks at the other tiles', ['batchy.pt', '--task', 'regression', '--outputs', 'a'], 'ModelDiffers'],
    ['is no TorchScript', ['w.pt', '--task', 'regression', '--outputs', 'a'], 'ModelPackageInvalid'],
  ])(
    'that %s is found out',
    async (_, flags, error) => {
      await slideway('build', ...flags, ...FLAGS, '--out', 'bad.tar.gz');
      const json = await slideway('check', 'bad.tar.gz', '--tiles', '8', '--json');
      expect(json.code).toBe(1);
      expect(JSON.parse(json.out)).toMatchObject({ ok: false, error });
    },
    120_000,
  );
});
