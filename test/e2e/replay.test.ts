/** What did not succeed is run again, and a finished cohort with another model, from the project's own records. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { buffer } from 'node:stream/consumers';
import { createGunzip, gzipSync } from 'node:zlib';
import {
  DeleteObjectCommand,
  ListObjectVersionsCommand,
  PutObjectCommand,
  S3Client,
} from '@aws-sdk/client-s3';
import { DescribeExecutionCommand, ListExecutionsCommand, SFNClient } from '@aws-sdk/client-sfn';
import { GetQueueUrlCommand, SendMessageCommand, SQSClient } from '@aws-sdk/client-sqs';
import { extract, pack } from 'tar-stream';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { BUNDLES, PROJECT } from '../../cli/paths.ts';
import { ensureModel } from '../../cli/setup/model.ts';
import { ensurePackage } from '../../cli/setup/package.ts';
import { Screen } from '../../cli/terminal.ts';
import type { RunSummary } from '../../core/contracts.ts';
import { modelKey } from '../../core/keys.ts';
import { type LocalAws, startLocalAws } from '../../local/engine.ts';
import { drawSlide, python, readSummary, states, Workplace } from './support.ts';

const work = new Workplace();
const state = ['--state', work.path('state')];
const screen = new Screen(process.stderr, { quiet: true });
let aws: LocalAws | undefined;

beforeAll(() => {
  drawSlide(work.path('x.tiff'), '1024x1024', 1);
  drawSlide(work.path('y.tiff'), '1024x1024', 2);
}, 120_000);
afterEach(async () => {
  await aws?.stop();
  aws = undefined;
});
afterAll(() => work.remove());

/** The local AWS of the commands, to look into and to work with between them. */
async function engine() {
  const running = await startLocalAws({
    state: work.path('state'),
    package: await ensurePackage(screen, 'dev'),
    python,
    containers: join(PROJECT, 'containers'),
    bundles: BUNDLES,
  });
  aws = running;
  const { endpoint, region, credentials, outputs } = running;
  const config = { endpoint, region, credentials };
  return {
    s3: new S3Client({ ...config, forcePathStyle: true }),
    sqs: new SQSClient(config),
    stepFunctions: new SFNClient(config),
    outputs: outputs as Record<
      | 'LandingBucket'
      | 'BronzeBucket'
      | 'ModelsBucket'
      | 'DeadEventsQueue'
      | 'DeadInvocationsQueue'
      | 'StateMachineArn',
      string
    >,
    stop: async () => {
      await running.stop();
      aws = undefined;
    },
  };
}

/** The reference model's package under another name. */
async function renamed(name: string): Promise<Buffer> {
  const from = extract();
  const to = pack();
  from.on('entry', (header, stream, next) => {
    buffer(stream).then((content) => {
      const isDescriptor = header.name.endsWith('model.json');
      to.entry(
        { name: header.name, mode: header.mode ?? 0o644 },
        isDescriptor ? JSON.stringify({ ...JSON.parse(content.toString()), name }) : content,
      );
      next();
    }, next);
  });
  from.on('finish', () => to.finalize());
  const archive = createGunzip();
  archive.pipe(from);
  archive.end(readFileSync(await ensureModel(screen, python)));
  return gzipSync(await buffer(to));
}

const bronzeVersions = async ({ s3, outputs }: Awaited<ReturnType<typeof engine>>) => {
  const { Versions = [] } = await s3.send(new ListObjectVersionsCommand({ Bucket: outputs.BronzeBucket }));
  return Versions.map(({ Key, VersionId }) => `${Key} ${VersionId}`).sort();
};

describe('a run of which one slide failed', () => {
  let first: RunSummary;
  let counter = 0;

  async function replay(...args: string[]) {
    const out = work.path(`replay-${counter++}`);
    const ended = await work.slideway('replay', ...args, ...state, '--out', out);
    return { ...ended, summary: () => readSummary(out) };
  }

  beforeAll(async () => {
    const out = work.path('first');
    const study = work.study('cohort', {
      'x.tiff': { copy: work.path('x.tiff') },
      'y.tiff': { copy: work.path('y.tiff') },
      'repo.csv': 'slide,slide_id,model,stain\nx.tiff,x,,HE\ny.tiff,y,area-two,HE\n',
    });
    const { code, stderr } = await work.slideway('run', study, ...state, '--out', out);
    expect(code, stderr).toBe(3);
    first = readSummary(out);
  }, 180_000);

  it('is replayed when what it lacked is there, as a run that names it, and ends SUCCEEDED', async () => {
    expect(states(first)).toEqual({ '2 x.tiff': 'AGGREGATED', '3 y.tiff': 'FAILED ModelNotFound' });
    const { s3, outputs, stop } = await engine();
    await s3.send(
      new PutObjectCommand({
        Bucket: outputs.ModelsBucket,
        Key: modelKey('area-two', '1.0.0'),
        Body: await renamed('area-two'),
      }),
    );
    await stop();

    const { code, stderr, summary } = await replay(first.runId.slice(0, -3), '--failed');
    expect(code, stderr).toBe(0);
    const second = summary();
    expect(second.state).toBe('SUCCEEDED');
    expect(second.runId).not.toBe(first.runId);
    expect(second.followUp).toEqual({ kind: 'replay', of: first.runId });
    expect(second.study).toBe(first.study);
    expect(second.slides).toMatchObject([
      { slideId: 'y', state: 'AGGREGATED', results: [{ model: 'area-two' }] },
    ]);

    const nothing = await replay(second.runId);
    expect(nothing.code).toBe(2);
    expect(nothing.stderr).toMatch(/has nothing to replay/);
  }, 180_000);

  it('is run with another model over the slides in Bronze, though Landing has been emptied', async () => {
    const before = await engine();
    for (const name of ['x.tiff', 'y.tiff']) {
      await before.s3.send(
        new DeleteObjectCommand({ Bucket: before.outputs.LandingBucket, Key: `${first.study}/${name}` }),
      );
    }
    const versions = await bronzeVersions(before);
    await before.stop();

    const { code, stderr, summary } = await replay(first.runId, '--model', 'area-two');
    expect(code, stderr).toBe(0);
    const third = summary();
    expect(third.state).toBe('SUCCEEDED');
    expect(third.slides).toMatchObject([
      {
        slideId: 'x',
        state: 'AGGREGATED',
        checksum: first.slides[0]?.checksum,
        results: [{ model: 'area-two', version: '1.0.0' }],
      },
    ]);
    // It is the same model under another name.
    const values = ({ slides }: RunSummary) => slides[0]?.results[0]?.outputs;
    expect(values(third)).toEqual(values(first));
    expect(await bronzeVersions(await engine())).toEqual(versions);
  }, 180_000);

  it('says in one line what it cannot replay', async () => {
    for (const [args, message] of [
      [[first.runId, '--slide', 'z'], /has no slide z/],
      [['no-such-run'], /There is no run no-such-run/],
      [[], /Give the id of a run, or --dead-letters/],
      [[first.runId, '--model', 'no-such-model'], /no-such-model/],
    ] as const) {
      const { code, stderr } = await replay(...args);
      expect(code, args.join(' ')).toBe(2);
      expect(stderr).toMatch(message);
    }
  }, 120_000);
});

describe('dead letters', () => {
  it('are shown, delivered to their targets and deleted; what is not taken stays', async () => {
    const { sqs, stepFunctions, outputs } = await engine();
    const send = async (QueueName: string, body: unknown, attributes: Record<string, string> = {}) => {
      const { QueueUrl } = await sqs.send(new GetQueueUrlCommand({ QueueName }));
      const typed = Object.entries(attributes).map(
        ([name, StringValue]) => [name, { DataType: 'String', StringValue }] as const,
      );
      await sqs.send(
        new SendMessageCommand({
          QueueUrl,
          MessageBody: JSON.stringify(body),
          MessageAttributes: Object.fromEntries(typed),
        }),
      );
    };
    const functionArn = (name: string) =>
      `arn:aws:lambda:us-east-1:000000000000:function:slideway-dev-${name}`;
    const invocation = (name: string) => ({
      requestContext: { functionArn: `${functionArn(name)}:$LATEST`, condition: 'RetriesExhausted' },
      requestPayload: {},
      responsePayload: { errorType: 'ServiceUnavailable', errorMessage: 'not now' },
    });
    const object = { key: 'gone/repo.csv', etag: 'abc', 'version-id': 'never' };
    await send(
      outputs.DeadEventsQueue,
      { detail: { bucket: { name: outputs.LandingBucket }, object } },
      { TARGET_ARN: outputs.StateMachineArn, ERROR_CODE: 'SlowDown', ERROR_MESSAGE: 'not now' },
    );
    await send(outputs.DeadInvocationsQueue, invocation('sweep'));
    await send(outputs.DeadInvocationsQueue, invocation('of-the-past'));

    const listed = await work.slideway('replay', '--dead-letters', '--list', ...state);
    expect(listed.code, listed.stderr).toBe(0);
    expect(listed.stdout).toMatch(/event for slideway-dev-slide-run: SlowDown: not now/);
    expect(listed.stdout).toMatch(/invocation for slideway-dev-sweep: ServiceUnavailable: not now/);

    const delivered = await work.slideway('replay', '--dead-letters', '--json', ...state);
    expect(delivered.code, delivered.stderr).toBe(3);
    const letters = JSON.parse(delivered.stdout) as {
      messageId: string;
      delivered: boolean;
      targetArn: string;
    }[];
    expect(letters.map(({ targetArn, delivered: taken }) => [targetArn.split(/[:-]/).at(-1), taken])).toEqual(
      [
        ['run', true],
        ['sweep', true],
        ['past', false],
      ],
    );
    const { executions = [] } = await stepFunctions.send(
      new ListExecutionsCommand({ stateMachineArn: outputs.StateMachineArn }),
    );
    const started = executions.find(({ name }) => name === `dead-letter-${letters[0]?.messageId}`);
    const { input } = await stepFunctions.send(
      new DescribeExecutionCommand({ executionArn: started?.executionArn }),
    );
    expect(JSON.parse(input ?? '')).toMatchObject({ detail: { object } });

    const left = await work.slideway('replay', '--dead-letters', '--list', '--json', ...state);
    expect((JSON.parse(left.stdout) as unknown[]).length).toBe(1);
  }, 120_000);
});
