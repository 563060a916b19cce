/**
 * The command line on a stack that is not its own: `--aws` finds buckets, tables and state machine by the stack's
 * outputs, with the credentials, region and endpoint of the AWS settings. Here these lead to a local AWS that the
 * test runs.
 */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import { PutObjectCommand, S3Client } from '@aws-sdk/client-s3';
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from 'vitest';
import { BUNDLES, PROJECT } from '../../cli/paths.ts';
import { ensureModel } from '../../cli/setup/model.ts';
import { ensurePackage } from '../../cli/setup/package.ts';
import { Screen } from '../../cli/terminal.ts';
import { modelKey } from '../../core/keys.ts';
import { readModelPackage } from '../../core/models.ts';
import { type LocalAws, startLocalAws } from '../../local/engine.ts';
import { drawSlide, python, readSummary, states, Workplace } from './support.ts';

const work = new Workplace();
const screen = new Screen(process.stderr, { quiet: true });
let aws: LocalAws;

beforeAll(async () => {
  drawSlide(work.path('x.tiff'), '1024x1024', 1);
  drawSlide(work.path('y.tiff'), '1024x1024', 2);
  aws = await startLocalAws({
    state: work.path('account'),
    package: await ensurePackage(screen, 'dev'),
    python,
    containers: join(PROJECT, 'containers'),
    bundles: BUNDLES,
  });
  const { endpoint, region, credentials, outputs } = aws;
  const s3 = new S3Client({ endpoint, region, credentials, forcePathStyle: true });
  const Body = await readFile(await ensureModel(screen, python));
  const { model } = await readModelPackage(Readable.from([Body]));
  const Key = modelKey(model.name, model.version);
  await s3.send(new PutObjectCommand({ Bucket: outputs.ModelsBucket, Key, Body }));
  s3.destroy();
}, 240_000);

afterEach(() => vi.unstubAllEnvs());

afterAll(async () => {
  await aws.stop();
  work.remove();
});

/** The AWS settings of somebody who may do everything in that account. */
function settings(): void {
  vi.stubEnv('AWS_ENDPOINT_URL', aws.endpoint);
  vi.stubEnv('AWS_REGION', aws.region);
  vi.stubEnv('AWS_ACCESS_KEY_ID', aws.credentials.accessKeyId);
  vi.stubEnv('AWS_SECRET_ACCESS_KEY', aws.credentials.secretAccessKey);
}

describe('with --aws', () => {
  it('a study is run, looked at, traced, verified, reconciled and replayed', {
    timeout: 240_000,
  }, async () => {
    settings();
    const study = work.study('breast', {
      'repo.csv': 'slide\nx.tiff\ny.tiff\n',
      'x.tiff': { copy: work.path('x.tiff') },
    });
    const ran = await work.slideway('run', study, '--aws', '--out', work.path('first'));
    expect(ran.code, ran.stderr).toBe(3);
    const first = readSummary(work.path('first'));
    expect(states(first)).toEqual({ '2 x.tiff': 'AGGREGATED', '3 y.tiff': 'MISSING SlideMissing' });

    const runs = await work.slideway('runs', '--aws', '--json');
    expect(JSON.parse(runs.stdout)).toMatchObject([{ runId: first.runId, state: 'PARTIAL' }]);
    const added = await work.slideway('model', 'add', await ensureModel(screen, python), '--aws', '--json');
    expect(JSON.parse(added.stdout)).toMatchObject([{ name: 'haematoxylin-area', added: false }]);
    const model = await work.slideway('model', 'show', 'haematoxylin-area', '--aws', '--json');
    expect(JSON.parse(model.stdout)).toMatchObject({ license: 'Apache-2.0', usedBy: [first.runId] });
    const [x] = first.slides;
    for (const command of [
      ['show', first.runId],
      ['trace', x?.slideId ?? ''],
      ['verify', '--all'],
    ]) {
      const { code, stderr } = await work.slideway(...command, '--aws');
      expect(code, `${command}: ${stderr}`).toBe(0);
    }
    const reconciled = await work.slideway('reconcile', 'breast', '--aws', '--json');
    expect(reconciled.code, reconciled.stderr).toBe(3);
    expect(reconciled.stdout).toContain('y.tiff');

    const slide = ['--slide', x?.slideId ?? ''];
    const again = await work.slideway('replay', first.runId, ...slide, '--aws', '--out', work.path('second'));
    expect(again.code, again.stderr).toBe(0);
    const second = readSummary(work.path('second'));
    expect(second.followUp).toEqual({ kind: 'replay', of: first.runId });
    expect(states(second)).toEqual({ '2 x.tiff': 'AGGREGATED' });
    const letters = await work.slideway('replay', '--dead-letters', '--aws');
    expect(letters.stdout).toContain('The dead-letter queues are empty.');
  });

  it('a stack that is not there, and missing settings, are said with what to do', {
    timeout: 60_000,
  }, async () => {
    settings();
    const none = await work.slideway('runs', '--aws', '--stage', 'prod');
    expect(none).toMatchObject({ code: 1 });
    expect(none.stderr).toContain('There is no stack slideway-prod in this account and region.');

    vi.stubEnv('AWS_ACCESS_KEY_ID', undefined);
    vi.stubEnv('AWS_SECRET_ACCESS_KEY', undefined);
    vi.stubEnv('AWS_EC2_METADATA_DISABLED', 'true');
    vi.stubEnv('HOME', work.folder);
    const anonymous = await work.slideway('runs', '--aws');
    expect(anonymous).toMatchObject({ code: 1 });
    expect(anonymous.stderr).toContain('There are no AWS credentials.');

    vi.stubEnv('AWS_REGION', undefined);
    vi.stubEnv('AWS_DEFAULT_REGION', undefined);
    const nowhere = await work.slideway('runs', '--aws');
    expect(nowhere.stderr).toMatch(/No AWS region is set|There are no AWS credentials/);
  });
});
