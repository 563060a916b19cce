/**
 * A run with a catalogue, on the package of a stage that has one: the pixel size comes from a Concentriq on loopback,
 * and the heatmap goes back onto its image.
 */
import { cpSync, mkdirSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { delimiter, join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import { ListObjectsV2Command, PutObjectCommand, S3Client } from '@aws-sdk/client-s3';
import { CreateSecretCommand, SecretsManagerClient } from '@aws-sdk/client-secrets-manager';
import { ListExecutionsCommand, SFNClient } from '@aws-sdk/client-sfn';
import { decode } from 'fast-png';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { BUNDLES, PROJECT } from '../../cli/paths.ts';
import { command } from '../../cli/setup/command.ts';
import { ensureModel } from '../../cli/setup/model.ts';
import { ensurePackage } from '../../cli/setup/package.ts';
import { Screen } from '../../cli/terminal.ts';
import type { OverlayProgress, Plan, PlannedSlide, RunSummary, SlideResult } from '../../core/contracts.ts';
import { overlaysKey, planKey, resultPrefix, runJsonKey, slidesKey } from '../../core/keys.ts';
import { readJson, readLines } from '../../core/store.ts';
import { type LocalConcentriq, startConcentriq } from '../../local/concentriq/server.ts';
import { type LocalAws, startLocalAws } from '../../local/engine.ts';
import { secretArn } from '../../local/secrets.ts';
import { leastPrivilege, type Template } from '../template/rules.ts';
import { drawSlide, python, runPython, Workplace } from './support.ts';

const SECRET = 'slideway/concentriq';
const ACCOUNT = { username: 'lab@example.org', password: 'a-password-nobody-logs' };
const PATIENT = 'Meier, Anna';
/** The same pixels, without a word on their size. */
const WITHOUT_MPP = `
import sys, tifffile
tifffile.imwrite(sys.argv[2], tifffile.imread(sys.argv[1], key=0), tile=(256, 256), photometric="rgb")
`;

const work = new Workplace();
let concentriq: LocalConcentriq;
let aws: LocalAws;
let s3: S3Client;
let stepFunctions: SFNClient;

/** Packages a stage like dev, but with the catalogue; from a folder that has its own config and borrows the rest. */
async function packaged(url: string): Promise<string> {
  const project = work.path('project');
  mkdirSync(join(project, 'config'), { recursive: true });
  for (const name of ['core', 'functions', 'resources', 'statemachines', 'node_modules']) {
    symlinkSync(join(PROJECT, name), join(project, name));
  }
  // The Serverless Framework takes no link for its configuration.
  for (const name of ['package.json', 'serverless.yml']) cpSync(join(PROJECT, name), join(project, name));
  const values: Record<string, string> = {
    kind: 'concentriq',
    url,
    secretArn: secretArn(SECRET),
    required: 'true',
    pushHeatmaps: 'true',
  };
  let config = readFileSync(join(PROJECT, 'config', 'dev.yml'), 'utf8');
  for (const [name, value] of Object.entries(values)) {
    const line = new RegExp(`(?<=^catalogue:\n(?:  .*\n)*  ${name}: ).*`, 'm');
    expect(config).toMatch(line);
    config = config.replace(line, value);
  }
  writeFileSync(join(project, 'config', 'lab.yml'), config);
  const bin = join(PROJECT, 'node_modules', '.bin');
  await command(join(bin, 'serverless'), ['package', '--stage', 'lab', '--package', 'package'], {
    cwd: project,
    env: { ...process.env, PATH: `${bin}${delimiter}${process.env.PATH}`, SLS_NOTIFICATIONS_MODE: 'off' },
  });
  return join(project, 'package');
}

const put = (bucket: string | undefined, key: string, body: Buffer | string) =>
  s3.send(new PutObjectCommand({ Bucket: bucket, Key: key, Body: body }));
const silver = (key: string) => ({ bucket: aws.outputs.SilverBucket ?? '', key });

beforeAll(async () => {
  const screen = new Screen(process.stderr, { quiet: true });
  concentriq = await startConcentriq({
    users: { [ACCOUNT.username]: ACCOUNT.password },
    repositories: [
      {
        id: 7,
        name: 'Colon',
        images: [{ id: 11, name: 'x.tiff', mppx: '0.5', mppy: '0.5' }],
        metadata: [
          ['Image ID', 'Patient', 'Stain'],
          ['11', PATIENT, 'H&E'],
        ],
      },
    ],
  });
  aws = await startLocalAws({
    state: work.path('state'),
    package: await packaged(concentriq.url),
    python,
    containers: join(PROJECT, 'containers'),
    bundles: BUNDLES,
    timeScale: 0.001,
  });
  const config = { endpoint: aws.endpoint, region: aws.region, credentials: aws.credentials };
  s3 = new S3Client({ ...config, forcePathStyle: true });
  stepFunctions = new SFNClient(config);
  const secrets = new SecretsManagerClient(config);
  await secrets.send(new CreateSecretCommand({ Name: SECRET, SecretString: JSON.stringify(ACCOUNT) }));
  secrets.destroy();
  await put(
    aws.outputs.ModelsBucket,
    'models/haematoxylin-area/1.0.0/model.tar.gz',
    readFileSync(await ensureModel(screen, python)),
  );
}, 240_000);
afterAll(async () => {
  s3?.destroy();
  stepFunctions?.destroy();
  await aws?.stop();
  await concentriq?.close();
  work.remove();
});

let executions = 0;
/** Drops a study and waits for its run's end. */
async function run(
  study: string,
  files: Record<string, Buffer | string>,
): Promise<{ runId: string; ended: string }> {
  for (const [path, content] of Object.entries(files)) {
    await put(aws.outputs.LandingBucket, `${study}/${path}`, content);
  }
  executions += 1;
  const deadline = Date.now() + 120_000;
  for (;;) {
    const answer = await stepFunctions.send(
      new ListExecutionsCommand({ stateMachineArn: aws.outputs.StateMachineArn }),
    );
    const [newest, ...others] = answer.executions ?? [];
    if (others.length + 1 === executions && newest?.status && newest.status !== 'RUNNING') {
      const { CommonPrefixes = [] } = await s3.send(
        new ListObjectsV2Command({ Bucket: silver('').bucket, Prefix: `runs/${study}-`, Delimiter: '/' }),
      );
      expect(CommonPrefixes).toHaveLength(1);
      return { runId: CommonPrefixes[0]?.Prefix?.split('/')[1] ?? '', ended: newest.status };
    }
    if (Date.now() > deadline) throw new Error(`still running: ${JSON.stringify(answer.executions)}`);
    await wait(200);
  }
}

async function linesOf(runId: string): Promise<PlannedSlide[]> {
  const lines: PlannedSlide[] = [];
  for await (const line of readLines<PlannedSlide>(s3, silver(slidesKey(runId)))) lines.push(line);
  return lines;
}

/** Everything that was written as text: logs, messages, executions, objects. */
function written(): string {
  const folders = ['logs', 'messages', 'executions', 's3'].map((name) => work.path('state', name));
  return folders
    .flatMap((folder) => readdirSync(folder, { recursive: true, withFileTypes: true }))
    .filter((entry) => entry.isFile())
    .map((entry) => readFileSync(join(entry.parentPath, entry.name), 'latin1'))
    .join('\n');
}

describe('the package of a stage', () => {
  const secretRights = (document: string) => document.match(/(?<=")secretsmanager:\w+/g) ?? [];
  const read = (folder: string) =>
    readFileSync(join(folder, 'cloudformation-template-update-stack.json'), 'utf8');

  it('with a catalogue may read its one secret, and stays within least privilege', () => {
    const document = read(work.path('project', 'package'));
    expect(secretRights(document)).toEqual(['secretsmanager:GetSecretValue']);
    expect(leastPrivilege(JSON.parse(document) as Template)).toEqual([]);
    expect(document).toContain(`"Resource": "${secretArn(SECRET)}"`);
  });

  it('without one has no right to any secret', async () => {
    const screen = new Screen(process.stderr, { quiet: true });
    expect(secretRights(read(await ensurePackage(screen, 'dev')))).toEqual([]);
  });
});

describe('a run of a stage with a catalogue', () => {
  it('takes the pixel size that no file has from the catalogue, and puts the heatmap onto the image', async () => {
    drawSlide(work.path('drawn.tiff'));
    runPython(work, WITHOUT_MPP, work.path('drawn.tiff'), work.path('x.tiff'));
    const slide = readFileSync(work.path('x.tiff'));
    const { runId, ended } = await run('colon', {
      'x.tiff': slide,
      'unknown.tiff': slide,
      'repo.csv': 'slide,slide_id,repository_id\nx.tiff,known,7\nunknown.tiff,unknown,7\n',
    });
    expect(ended).toBe('SUCCEEDED');
    const summary = (await readJson(s3, silver(runJsonKey(runId)))) as RunSummary;
    expect(summary.slides.map(({ slideId, state, reason }) => [slideId, state, reason?.error])).toEqual([
      ['known', 'AGGREGATED', undefined],
      ['unknown', 'QUARANTINED', 'MppMissing'],
    ]);

    const [known, unknown] = await linesOf(runId);
    expect(known).toMatchObject({
      mpp: 0.5,
      mppSource: 'catalogue',
      metadata: { stain: 'H&E' },
      catalogue: { known: true, repositoryId: '7', imageId: '11' },
    });
    expect(unknown?.catalogue).toMatchObject({ known: false, reason: { error: 'CatalogueImageUnknown' } });
    const plan = (await readJson(s3, silver(planKey(runId)))) as Plan;
    expect(plan.catalogue).toEqual({
      kind: 'concentriq',
      asked: 2,
      known: 1,
      reasons: { CatalogueImageUnknown: 1 },
    });

    const prefix = resultPrefix(runId, 'known', 'haematoxylin-area');
    const result = (await readJson(s3, silver(`${prefix}result.json`))) as SlideResult;
    expect(result.slideGeometry).toMatchObject({ mppSource: 'catalogue', mppX: 0.5 });
    expect(concentriq.overlays).toMatchObject([{ imageId: 11, moduleId: 2 }]);
    const overlay = decode(concentriq.overlays[0]?.png ?? Buffer.alloc(0));
    expect({ width: overlay.width, height: overlay.height }).toEqual(result.heatmap?.area);
    const progress = (await readJson(s3, silver(overlaysKey(runId)))) as OverlayProgress;
    expect(progress).toMatchObject({ done: true, counts: { pushed: 1, present: 0, failed: 0 } });
  }, 180_000);

  it('fails clearly when the catalogue that it demands cannot be asked', async () => {
    concentriq.fault = () => ({ status: 401 });
    const { runId, ended } = await run('demanded', {
      'x.tiff': 'x',
      'repo.csv': 'slide,image_id\nx.tiff,11\n',
    });
    concentriq.fault = undefined;
    expect(ended).toBe('FAILED');
    const summary = (await readJson(s3, silver(runJsonKey(runId)))) as RunSummary;
    expect(summary).toMatchObject({ state: 'FAILED', reason: { error: 'CatalogueRefused' } });
    expect(summary.reason?.message).toContain('PlanRun: POST /api/v3/auth/token');
  }, 120_000);

  it('leaves neither password nor patient anywhere', () => {
    const text = written();
    const inText = (...parts: string[]) => parts.filter((part) => text.includes(part));
    expect(inText('CatalogueRefused')).toHaveLength(1);
    const encoded = Buffer.from(`${ACCOUNT.username}:${ACCOUNT.password}`).toString('base64');
    expect(inText(ACCOUNT.password, encoded, PATIENT)).toEqual([]);
  });
});
