import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { buffer } from 'node:stream/consumers';
import { gzipSync } from 'node:zlib';
import { FilterLogEventsCommand } from '@aws-sdk/client-cloudwatch-logs';
import { HeadObjectCommand, ListObjectsV2Command } from '@aws-sdk/client-s3';
import {
  AddTagsCommand,
  CreateModelCommand,
  type CreateModelCommandInput,
  CreateTransformJobCommand,
  type CreateTransformJobCommandInput,
  DeleteModelCommand,
  DescribeModelCommand,
  DescribeTransformJobCommand,
  type DescribeTransformJobCommandOutput,
  ListModelsCommand,
  ListTagsCommand,
  ListTransformJobsCommand,
  SageMakerClient,
  StopTransformJobCommand,
} from '@aws-sdk/client-sagemaker';
import { pack } from 'tar-stream';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { markOf } from '../../local/sagemaker/processes.ts';
import { TRANSFORM_LOG_GROUP } from '../../local/sagemaker/service.ts';
import { Bench, get, namespacesWork, put, records, until } from './sagemaker-bench.ts';
import { type Engine, type EngineOptions, IMAGE, JOB_ROLE } from './sagemaker-engine.ts';

/** A server whose answers go by what an object says; it knows nothing of slides. */
const SERVER = `
import http.server, json, os, pathlib, socket, sys, threading, time

root = pathlib.Path(os.environ.get("SLIDEWAY_ML_ROOT", "/opt/ml"))
weights = (root / "model/weights.txt").read_text()
mode = os.environ.get("MODE", "")
if mode == "mute":
    time.sleep(60)
lock = threading.Lock()
running = most = 0
asked = {}


def reaches(endpoint):
    try:
        socket.create_connection(endpoint, timeout=2).close()
        return True
    except OSError as error:
        return type(error).__name__


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/execution-parameters" and mode == "says":
            return self.answer(200, b'{"MaxConcurrentTransforms": 3, "MaxPayloadInMB": 1, "BatchStrategy": "SINGLE_RECORD"}')
        self.answer(200 if self.path == "/ping" else 404, b"")

    def do_POST(self):
        global running, most
        body = self.rfile.read(int(self.headers["Content-Length"]))
        text = body[:40].decode(errors="replace")
        with lock:
            running += 1
            most = max(most, running)
            asked[text] = asked.get(text, 0) + 1
            times = asked[text]
        try:
            if text.startswith("fail"):
                return self.answer(500, b'{"error": "ModelError"}')
            if text.startswith("refuse"):
                return self.answer(400, b'{"error": "PackCorrupt"}')
            if text.startswith("flaky") and times < 3:
                return self.answer(503, b"later")
            if text.startswith("hang"):
                time.sleep(60)
            if text.startswith("die"):
                os._exit(9)
            if text.startswith("slow"):
                time.sleep(0.4)
            if text.startswith("network"):
                text = json.dumps(reaches(json.loads(body[7:])))
            said = {"text": text, "times": times, "most": most, "weights": weights, "root": str(root), "arguments": sys.argv[1:],
                    "host": os.getpid(), "headers": dict(self.headers), "environment": dict(os.environ)}
            self.answer(200, json.dumps(said).encode())
        finally:
            with lock:
                running -= 1

    def log_message(self, *args):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("SAGEMAKER_BIND_TO_PORT", "8080"))), Handler)
server.daemon_threads = True
print("serving", flush=True)
server.serve_forever()
`;

const bench = new Bench();
const container = bench.folder();
mkdirSync(join(container, 'server'));
writeFileSync(join(container, 'server', '__init__.py'), '');
writeFileSync(join(container, 'server', '__main__.py'), SERVER);
writeFileSync(join(container, 'Dockerfile'), 'FROM python:3.12\nENTRYPOINT ["python3", "-m", "server"]\n');

let weights: Buffer;
beforeAll(async () => {
  const tar = pack();
  tar.entry({ name: './', type: 'directory' });
  tar.entry({ name: './weights.txt' }, 'of the model');
  tar.finalize();
  weights = gzipSync(await buffer(tar));
});

const children: ChildProcess[] = [];
const leaders: number[] = [];
afterEach(async () => {
  for (const child of children.splice(0)) child.kill('SIGKILL');
  for (const pid of leaders.splice(0)) if (markOf(pid)) process.kill(-pid, 'SIGKILL');
  await bench.close();
});
afterAll(() => bench.remove());

const MODEL_DATA = 's3://silver/models/m/1/model.tar.gz';

const model = (name: string, more: Partial<CreateModelCommandInput> = {}): CreateModelCommandInput => ({
  ModelName: name,
  PrimaryContainer: { Image: IMAGE, ModelDataUrl: MODEL_DATA },
  ExecutionRoleArn: JOB_ROLE,
  ...more,
});

/** An engine with a model `m`, whose server is told its mode. */
async function engine(options: Partial<EngineOptions> = {}, mode = '', isolated = false): Promise<Engine> {
  const on = await bench.engine({ container, stopGraceSeconds: 1, ...options });
  if (!existsSync(join(options.state ?? '', 'jobs', '.models', 'm'))) {
    await put(on, 'models/m/1/model.tar.gz', weights);
    const PrimaryContainer = { Image: IMAGE, ModelDataUrl: MODEL_DATA, Environment: { MODE: mode } };
    await on.client.send(
      new CreateModelCommand(model('m', { PrimaryContainer, EnableNetworkIsolation: isolated })),
    );
  }
  return on;
}

const request = (
  name: string,
  more: Partial<CreateTransformJobCommandInput> = {},
): CreateTransformJobCommandInput => ({
  TransformJobName: name,
  ModelName: 'm',
  TransformInput: {
    DataSource: { S3DataSource: { S3DataType: 'S3Prefix', S3Uri: 's3://silver/in/' } },
    ContentType: 'application/x-tar',
  },
  TransformOutput: { S3OutputPath: `s3://silver/out/${name}`, Accept: 'application/jsonlines' },
  TransformResources: { InstanceType: 'ml.g5.xlarge', InstanceCount: 1 },
  MaxConcurrentTransforms: 2,
  MaxPayloadInMB: 1,
  ...more,
});

const create = ({ client }: Pick<Engine, 'client'>, input: CreateTransformJobCommandInput) =>
  client.send(new CreateTransformJobCommand(input));
const look = ({ client }: Pick<Engine, 'client'>, name: string) =>
  client.send(new DescribeTransformJobCommand({ TransformJobName: name }));
const ended = (of: Pick<Engine, 'client'>, name: string): Promise<DescribeTransformJobCommandOutput> =>
  until(async () => {
    const job = await look(of, name);
    return !['InProgress', 'Stopping'].includes(job.TransformJobStatus ?? '') && job;
  });

const keys = async ({ s3 }: Engine, name: string): Promise<string[]> => {
  const { Contents = [] } = await s3.send(
    new ListObjectsV2Command({ Bucket: 'silver', Prefix: `out/${name}/` }),
  );
  return Contents.map(({ Key = '' }) => Key.slice(`out/${name}/`.length));
};
const said = async (of: Engine, name: string, key: string) => JSON.parse(await get(of, `out/${name}/${key}`));

const lines = async ({ logs }: Engine, name: string): Promise<string[]> => {
  const { events = [] } = await logs
    .send(new FilterLogEventsCommand({ logGroupName: TRANSFORM_LOG_GROUP, logStreamNamePrefix: `${name}/` }))
    .catch(() => ({ events: [] }));
  return events.map((event) => event.message ?? '');
};

async function putAll(on: Engine, objects: Record<string, string>): Promise<void> {
  for (const [key, body] of Object.entries(objects)) await put(on, `in/${key}`, body);
}

describe('a transform job', () => {
  it('serves the unpacked model and puts each object’s answer beside no other', async () => {
    const on = await engine();
    await putAll(on, { 'a.tar': 'one', 'deep/b.tar': 'two' });
    process.env.HOST_SECRET = 'of the machine';
    await create(on, request('full', { Environment: { BATCH: '64' }, BatchStrategy: 'SingleRecord' }));
    const job = await ended(on, 'full');
    delete process.env.HOST_SECRET;

    expect(job.FailureReason).toBeUndefined();
    expect(job).toMatchObject({
      TransformJobStatus: 'Completed',
      ModelName: 'm',
      MaxConcurrentTransforms: 2,
      TransformJobArn: 'arn:aws:sagemaker:us-east-1:000000000000:transform-job/full',
    });
    expect(job.TransformStartTime?.getTime()).toBeGreaterThanOrEqual(job.CreationTime?.getTime() ?? 0);
    expect(job.TransformEndTime?.getTime()).toBeGreaterThan(job.TransformStartTime?.getTime() ?? 0);
    expect(await keys(on, 'full')).toEqual(['a.tar.out', 'deep/b.tar.out']);
    const seen = await said(on, 'full', 'deep/b.tar.out');
    expect(seen).toMatchObject({ text: 'two', times: 1, weights: 'of the model', arguments: ['serve'] });
    expect(seen.headers).toMatchObject({
      'Content-Type': 'application/x-tar',
      Accept: 'application/jsonlines',
      'Content-Length': '3',
    });
    expect(seen.environment).toMatchObject({
      BATCH: '64',
      SAGEMAKER_BATCH: 'true',
      SAGEMAKER_BATCH_STRATEGY: 'SINGLE_RECORD',
      SAGEMAKER_MAX_CONCURRENT_TRANSFORMS: '2',
      SAGEMAKER_MAX_PAYLOAD_IN_MB: '1',
      AWS_ENDPOINT_URL: on.endpoint,
    });
    expect(seen.environment).not.toHaveProperty('HOST_SECRET');
    const { ContentType } = await on.s3.send(
      new HeadObjectCommand({ Bucket: 'silver', Key: 'out/full/a.tar.out' }),
    );
    expect(ContentType).toBe('application/jsonlines');
    expect(await lines(on, 'full')).toEqual(
      expect.arrayContaining([
        'serving',
        '[sagemaker logs]: MaxConcurrentTransforms=2, MaxPayloadInMB=1, BatchStrategy=SINGLE_RECORD',
      ]),
    );
  });

  it('takes what a manifest lists, and names the answers by what stands in the manifest', async () => {
    const on = await engine();
    await putAll(on, { 'x/a.tar': 'one', 'x/b.tar': 'two', 'y/c.tar': 'three' });
    await put(on, 'list.json', JSON.stringify([{ prefix: 's3://silver/in/' }, 'x/a.tar', 'y/c.tar']));
    const S3DataSource = { S3DataType: 'ManifestFile', S3Uri: 's3://silver/list.json' } as const;
    await create(on, request('listed', { TransformInput: { DataSource: { S3DataSource } } }));
    expect((await ended(on, 'listed')).TransformJobStatus).toBe('Completed');
    expect(await keys(on, 'listed')).toEqual(['x/a.tar.out', 'y/c.tar.out']);
  });

  it('reads and writes with the model’s role, not with the rights of who created it', async () => {
    const on = await engine();
    await putAll(on, { a: 'one' });
    const root = () => ({ ...on.requests()['arn:aws:iam::000000000000:root'] });
    const before = root();
    await create(on, request('role'));
    await ended(on, 'role');
    // The package looked for and read, the object read; the listing, the answer.
    expect(on.requests()[JOB_ROLE]).toEqual({ 's3.get': 3, 's3.put': 2 });
    expect(root()['s3.get']).toBe(before['s3.get']);
  });

  it('shares the objects among its instances, and sends each as many at once as it may', async () => {
    const on = await engine();
    await putAll(on, Object.fromEntries(Array.from({ length: 9 }, (_, i) => [`${i}.tar`, `slow ${i}`])));
    await create(
      on,
      request('two', {
        TransformResources: { InstanceType: 'ml.g5.xlarge', InstanceCount: 2 },
        MaxConcurrentTransforms: 3,
      }),
    );
    expect((await ended(on, 'two')).TransformJobStatus).toBe('Completed');
    const answers = await Promise.all((await keys(on, 'two')).map((key) => said(on, 'two', key)));
    expect(answers).toHaveLength(9);
    const shares = Map.groupBy(answers, ({ environment }) => environment.SAGEMAKER_BIND_TO_PORT);
    expect([...shares.values()].map((share) => share.length).sort()).toEqual([4, 5]);
    expect(Math.max(...answers.map(({ most }) => most))).toBe(3);
  });

  it('goes by what the container says where the request leaves it open', async () => {
    const on = await engine({}, 'says');
    await putAll(on, { a: 'slow 1', b: 'slow 2', c: 'slow 3', d: 'slow 4', e: 'x'.repeat(1024 * 1024 + 1) });
    const { MaxConcurrentTransforms: _c, MaxPayloadInMB: _p, ...open } = request('open');
    await create(on, open);
    expect((await ended(on, 'open')).TransformJobStatus).toBe('Failed');
    expect(await lines(on, 'open')).toContain(
      '[sagemaker logs]: MaxConcurrentTransforms=3, MaxPayloadInMB=1, BatchStrategy=SINGLE_RECORD',
    );
    const answers = await Promise.all((await keys(on, 'open')).map((key) => said(on, 'open', key)));
    expect(Math.max(...answers.map(({ most }) => most))).toBe(3);

    await create(on, { ...open, TransformJobName: 'set', MaxConcurrentTransforms: 1, MaxPayloadInMB: 2 });
    expect((await ended(on, 'set')).TransformJobStatus).toBe('Completed');
  });

  it('fails at its end for one bad object, and the others’ answers are there', async () => {
    const on = await engine();
    await putAll(on, { 'a.tar': 'fail', 'b.tar': 'two', 'c.tar': 'three' });
    await create(
      on,
      request('bad', { ModelClientConfig: { InvocationsMaxRetries: 1 }, MaxConcurrentTransforms: 1 }),
    );
    const job = await ended(on, 'bad');
    expect(job.TransformJobStatus).toBe('Failed');
    expect(job.FailureReason).toBe(
      'AlgorithmError: See job logs for more information. 1 of 3 objects failed.',
    );
    expect(await keys(on, 'bad')).toEqual(['b.tar.out', 'c.tar.out']);
    const bad = (await lines(on, 'bad')).filter((line) => line.includes('Bad HTTP status'));
    expect(bad).toEqual([
      '[sagemaker logs]: silver/in/a.tar: Bad HTTP status received from algorithm: 500',
      '[sagemaker logs]: silver/in/a.tar: Bad HTTP status received from algorithm: 500',
    ]);
  });

  it('asks again what may pass, and not what the server refuses as wrong', async () => {
    const on = await engine();
    await putAll(on, { 'a.tar': 'flaky', 'b.tar': 'refuse' });
    await create(on, request('retry'));
    expect((await ended(on, 'retry')).FailureReason).toMatch(/^ClientError: .*1 of 2/);
    expect(await said(on, 'retry', 'a.tar.out')).toMatchObject({ times: 3 });
    expect(await keys(on, 'retry')).toEqual(['a.tar.out']);
    const refused = (await lines(on, 'retry')).filter((line) => line.includes('b.tar: Bad HTTP status'));
    expect(refused).toHaveLength(1);
    expect(await lines(on, 'retry')).toContain(
      '[sagemaker logs]: silver/in/b.tar: Message: {"error": "PackCorrupt"}',
    );
  });

  it('does not wait for ever for an answer', async () => {
    const on = await engine();
    await putAll(on, { 'a.tar': 'hang', 'b.tar': 'two' });
    const ModelClientConfig = { InvocationsTimeoutInSeconds: 1, InvocationsMaxRetries: 0 };
    await create(on, request('late', { ModelClientConfig }));
    expect((await ended(on, 'late')).FailureReason).toMatch(/^AlgorithmError: .*1 of 2/);
    expect(await keys(on, 'late')).toEqual(['b.tar.out']);
    expect((await lines(on, 'late')).join('\n')).toContain('a.tar: Unable to get response from algorithm');
  });

  it('sends no object that is larger than the payload it may', async () => {
    const on = await engine();
    await putAll(on, { 'a.tar': 'x'.repeat(1024 * 1024), 'b.tar': 'x'.repeat(1024 * 1024 + 1) });
    await create(on, request('large'));
    expect((await ended(on, 'large')).FailureReason).toMatch(/^ClientError: .*1 of 2/);
    expect(await keys(on, 'large')).toEqual(['a.tar.out']);
    expect((await lines(on, 'large')).join('\n')).toContain('b.tar: Too much data for max payload size');
  });

  it('fails when its server ends, never comes up, or has no model to serve', async () => {
    const on = await engine();
    await putAll(on, { 'a.tar': 'die' });
    await create(on, request('dead'));
    expect((await ended(on, 'dead')).FailureReason).toMatch(/^AlgorithmError: .*exit code 9/);

    await put(on, 'models/m/1/model.tar.gz', 'no archive');
    await create(on, request('broken'));
    expect((await ended(on, 'broken')).FailureReason).toMatch(
      /^ClientError: Failed to extract model data archive from URL "s3:\/\/silver\/models/,
    );

    const mute = await engine({ pingSeconds: 1 }, 'mute');
    await putAll(mute, { 'a.tar': 'one' });
    await create(mute, request('mute'));
    expect((await ended(mute, 'mute')).FailureReason).toBe(
      'AlgorithmError: The container did not answer /ping with 200 within 1 seconds.',
    );
  });

  it('unpacks no model out of its folder, and no links', async () => {
    const on = await engine();
    await putAll(on, { 'a.tar': 'one' });
    for (const [name, header] of [
      ['escape', { name: '../../escape' }],
      ['link', { name: 'link', type: 'symlink', linkname: '/etc/passwd' }],
    ] as const) {
      const tar = pack();
      if (name === 'escape') tar.entry(header, 'out');
      else tar.entry(header);
      tar.finalize();
      await put(on, 'models/m/1/model.tar.gz', gzipSync(await buffer(tar)));
      await create(on, request(name));
      expect((await ended(on, name)).FailureReason, name).toMatch(/would leave the folder|no plain file/);
    }
  });

  it('fails when there is nothing under its prefix', async () => {
    const on = await engine();
    await create(on, request('none'));
    expect((await ended(on, 'none')).FailureReason).toMatch(/^ClientError: No S3 objects found under S3 URL/);
  });

  it('stops when asked to, and keeps what is done', async () => {
    const on = await engine();
    await putAll(on, { 'a.tar': 'one', 'b.tar': 'hang' });
    await create(on, request('stop', { MaxConcurrentTransforms: 1 }));
    await until(async () => (await keys(on, 'stop')).length === 1);
    await on.client.send(new StopTransformJobCommand({ TransformJobName: 'stop' }));
    const job = await ended(on, 'stop');
    expect(job.TransformJobStatus).toBe('Stopped');
    expect(await keys(on, 'stop')).toEqual(['a.tar.out']);
    await expect(
      on.client.send(new StopTransformJobCommand({ TransformJobName: 'stop' })),
    ).rejects.toMatchObject({ name: 'ValidationException' });
  });

  it.runIf(namespacesWork())(
    'has no network and no credentials when its model is isolated, yet is served',
    async () => {
      const probe = (on: Engine) =>
        `network${JSON.stringify(['127.0.0.1', Number(new URL(on.endpoint).port)])}`;
      const open = await engine();
      await putAll(open, { 'a.tar': probe(open) });
      await create(open, request('open'));
      await ended(open, 'open');
      expect((await said(open, 'open', 'a.tar.out')).text).toBe('true');

      const on = await engine({}, '', true);
      await putAll(on, { 'a.tar': probe(on), 'b.tar': 'x'.repeat(1024 * 1024) });
      await create(on, request('alone'));
      expect((await ended(on, 'alone')).FailureReason).toBeUndefined();
      const { text, environment, root } = await said(on, 'alone', 'a.tar.out');
      expect(text).toBe('"ConnectionRefusedError"');
      expect(root).toBe('/opt/ml');
      expect(Object.keys(environment).filter((name) => /ACCESS_KEY|ENDPOINT|BIND/.test(name))).toEqual([]);
      expect((await said(on, 'alone', 'b.tar.out')).headers['Content-Length']).toBe(String(1024 * 1024));
    },
  );

  it('is served on a port of its own where mount namespaces are not to be had', async () => {
    const state = bench.folder();
    const on = await engine({ state, mountNamespace: false }, '', true);
    await putAll(on, { a: 'one' });
    await create(on, request('based'));
    expect((await ended(on, 'based')).TransformJobStatus).toBe('Completed');
    expect((await said(on, 'based', 'a.out')).root).toBe(
      join(state, 'jobs', '.transform', 'based', 'algo-1'),
    );
  });

  it('can be told to fail as AWS does when it has no capacity, and takes turns with other jobs', async () => {
    const failureReason = 'CapacityError: Unable to provision requested ML compute capacity.';
    const on = await engine({
      maxConcurrentInstances: 1,
      faults: (name) => (name === 'capacity' ? { failureReason } : undefined),
    });
    await putAll(on, { a: 'hang' });
    await create(on, request('capacity'));
    expect(await ended(on, 'capacity')).toMatchObject({
      TransformJobStatus: 'Failed',
      FailureReason: failureReason,
    });
    await create(on, request('first'));
    await create(on, request('second'));
    await until(async () => (await lines(on, 'first')).includes('serving'));
    expect(await look(on, 'second')).not.toHaveProperty('TransformStartTime');
    for (const name of ['second', 'first'])
      await on.client.send(new StopTransformJobCommand({ TransformJobName: name }));
    await ended(on, 'first');
    expect(await lines(on, 'second')).toEqual([]);
  });
});

describe('an engine that is killed', () => {
  it('goes on with what is not done yet, and has no server left from before', async () => {
    const options = { state: bench.folder(), container, stopGraceSeconds: 1 };
    const first = await engine(options);
    await putAll(first, { 'a.tar': 'one', 'b.tar': 'flaky', 'c.tar': 'hang' });
    await first.close();

    const child = spawn(
      process.execPath,
      [join(import.meta.dirname, 'sagemaker-engine.ts'), JSON.stringify(options)],
      { stdio: ['ignore', 'pipe', 'inherit'] },
    );
    children.push(child);
    const [line] = await once(child.stdout, 'data');
    const client = new SageMakerClient({
      region: 'us-east-1',
      endpoint: String(line).trim(),
      credentials: { accessKeyId: 'ROOT', secretAccessKey: 'root' },
    });
    const ModelClientConfig = { InvocationsTimeoutInSeconds: 4, InvocationsMaxRetries: 3 };
    await create({ client }, request('again', { MaxConcurrentTransforms: 1, ModelClientConfig }));
    const folder = join(options.state, 'jobs', '.transform', 'again');
    const outcomes = () => records<{ key: string }>(join(folder, 'outcomes.jsonl')).map(({ key }) => key);
    await until(() => outcomes().length === 2);
    const { instances } = JSON.parse(readFileSync(join(folder, 'job.json'), 'utf8'));
    const [{ process: server }] = instances;
    leaders.push(server.pid);
    const gone = once(child, 'exit');
    child.kill('SIGKILL');
    await gone;

    const second = await engine(options);
    await put(second, 'in/c.tar', 'three');
    expect((await ended(second, 'again')).TransformJobStatus).toBe('Completed');
    expect(markOf(server.pid)?.started).not.toBe(server.started);
    expect(outcomes()).toEqual(['in/a.tar', 'in/b.tar', 'in/c.tar']);
    // Asked three times of the first server, and never of the second.
    expect(await said(second, 'again', 'b.tar.out')).toMatchObject({ times: 3 });
    expect(await said(second, 'again', 'c.tar.out')).toMatchObject({ text: 'three' });
  });
});

describe('a model', () => {
  it('is described, listed, tagged and deleted; a job that serves it goes on', async () => {
    const on = await engine();
    await putAll(on, { a: 'slow' });
    const tagged = model('n', { Tags: [{ Key: 'slideway:run', Value: 'r' }], EnableNetworkIsolation: true });
    const { ModelArn } = await on.client.send(new CreateModelCommand(tagged));
    expect(ModelArn).toBe('arn:aws:sagemaker:us-east-1:000000000000:model/n');
    const described = await on.client.send(new DescribeModelCommand({ ModelName: 'n' }));
    expect(described).toMatchObject({
      ModelName: 'n',
      PrimaryContainer: { Image: IMAGE, ModelDataUrl: MODEL_DATA },
      ExecutionRoleArn: JOB_ROLE,
      EnableNetworkIsolation: true,
      CreationTime: expect.any(Date),
    });
    await on.client.send(new AddTagsCommand({ ResourceArn: ModelArn, Tags: [{ Key: 'study', Value: 's' }] }));
    const { Tags } = await on.client.send(new ListTagsCommand({ ResourceArn: ModelArn }));
    expect(Tags?.map(({ Key }) => Key)).toEqual(['slideway:run', 'study']);
    const names = async (more: object) => {
      const { Models = [] } = await on.client.send(new ListModelsCommand(more));
      return Models.map(({ ModelName }) => ModelName);
    };
    expect(await names({ SortBy: 'Name', SortOrder: 'Ascending' })).toEqual(['m', 'n']);
    expect(await names({ NameContains: 'n' })).toEqual(['n']);

    await create(on, request('running'));
    await on.client.send(new DeleteModelCommand({ ModelName: 'm' }));
    expect((await ended(on, 'running')).TransformJobStatus).toBe('Completed');
    for (const gone of [
      new DeleteModelCommand({ ModelName: 'm' }),
      new DescribeModelCommand({ ModelName: 'm' }),
    ])
      await expect(on.client.send(gone as DeleteModelCommand)).rejects.toMatchObject({
        name: 'ValidationException',
        message: 'Could not find model "arn:aws:sagemaker:us-east-1:000000000000:model/m".',
      });
    await expect(create(on, request('late'))).rejects.toThrow(/Could not find model/);
    await on.client.send(new CreateModelCommand(model('m')));
    expect(await names({})).toHaveLength(2);
  });

  it('is refused as SageMaker refuses it: taken, without image, without package', async () => {
    const on = await engine();
    const attempt = (more: Partial<CreateModelCommandInput>) =>
      on.client.send(new CreateModelCommand(model('other', more)));
    await expect(attempt({ ModelName: 'm' })).rejects.toMatchObject({
      name: 'ValidationException',
      message: 'Cannot create already existing model "arn:aws:sagemaker:us-east-1:000000000000:model/m".',
    });
    const image = `${IMAGE}-gone`;
    await expect(
      attempt({ PrimaryContainer: { Image: image, ModelDataUrl: MODEL_DATA } }),
    ).rejects.toMatchObject({
      name: 'ValidationException',
      message: `Requested image ${image} not found.`,
    });
    const data = 's3://silver/models/m/2/model.tar.gz';
    await expect(attempt({ PrimaryContainer: { Image: IMAGE, ModelDataUrl: data } })).rejects.toMatchObject({
      name: 'ValidationException',
      message: `Could not find model data at ${data}.`,
    });
    await expect(
      attempt({ PrimaryContainer: { Image: IMAGE, ModelDataUrl: 's3://silver/m' } }),
    ).rejects.toThrow(/must be a \.tar\.gz/);
    await expect(attempt({ ExecutionRoleArn: undefined })).rejects.toThrow(/executionRoleArn/);
    await expect(attempt({ PrimaryContainer: undefined })).rejects.toThrow(/primaryContainer/);
    await expect(
      attempt({ PrimaryContainer: { Image: IMAGE, Mode: 'MultiModel', ModelDataUrl: MODEL_DATA } }),
    ).rejects.toThrow(/does not support PrimaryContainer.Mode MultiModel/);
    await expect(
      attempt({ VpcConfig: { SecurityGroupIds: ['sg-1'], Subnets: ['subnet-1'] } }),
    ).rejects.toThrow(/does not support VpcConfig/);
  });
});

describe('a request', () => {
  const input = request('x').TransformInput;
  const wrong: [string, Partial<Record<keyof CreateTransformJobCommandInput, unknown>>, RegExp][] = [
    ['a name with an underscore', { TransformJobName: 'a_b' }, /transformJobName.*regular expression/],
    ['no model', { ModelName: undefined }, /null at 'modelName'/],
    ['a model that there is not', { ModelName: 'none' }, /Could not find model/],
    [
      'an instance type that there is not',
      { TransformResources: { InstanceType: 'ml.huge', InstanceCount: 1 } },
      /instanceType.*enum value set/,
    ],
    ['a payload over 100 MB', { MaxPayloadInMB: 101 }, /MaxPayloadInMB/],
    [
      'more in flight than 100 MB',
      { MaxConcurrentTransforms: 11, MaxPayloadInMB: 10 },
      /cannot exceed 100 MB/,
    ],
    ['four retries', { ModelClientConfig: { InvocationsMaxRetries: 4 } }, /invocationsMaxRetries.*3/],
    [
      'seventeen variables',
      { Environment: Object.fromEntries(Array.from({ length: 17 }, (_, i) => [`V${i}`, '1'])) },
      /environment.*16/,
    ],
    ['lines for records', { TransformInput: { ...input, SplitType: 'Line' } }, /not support SplitType Line/],
    [
      'answers put together by line',
      { TransformOutput: { S3OutputPath: 's3://b/k', AssembleWith: 'Line' } },
      /not support AssembleWith Line/,
    ],
    ['packed input', { TransformInput: { ...input, CompressionType: 'Gzip' } }, /CompressionType Gzip/],
    [
      'an augmented manifest',
      {
        TransformInput: {
          DataSource: { S3DataSource: { S3DataType: 'AugmentedManifestFile', S3Uri: 's3://b/k' } },
        },
      },
      /S3DataType AugmentedManifestFile/,
    ],
    ['a join of its own', { DataProcessing: { JoinSource: 'Input' } }, /not support DataProcessing/],
  ];

  it('that SageMaker would not take, or that cannot run here, is refused by the name of the member', async () => {
    const on = await engine();
    const { operations } = on.sagemaker;
    const caller = { arn: 'root', authorize: () => undefined };
    for (const [what, part, message] of wrong) {
      const attempt = operations.CreateTransformJob?.({ ...request('wrong'), ...part } as never, caller);
      await expect(attempt, what).rejects.toMatchObject({ code: 'ValidationException', status: 400 });
      await expect(attempt, what).rejects.toThrow(message);
    }
    const { TransformJobSummaries } = await on.client.send(new ListTransformJobsCommand({}));
    expect(TransformJobSummaries).toEqual([]);
  });

  it('for a name that is taken is refused, and so is one for a job that there is not', async () => {
    const on = await engine();
    await create(on, request('taken'));
    await ended(on, 'taken');
    await expect(create(on, request('taken'))).rejects.toMatchObject({ name: 'ResourceInUse' });
    await expect(look(on, 'none')).rejects.toMatchObject({ name: 'ResourceNotFound' });
    const { TransformJobSummaries = [] } = await on.client.send(
      new ListTransformJobsCommand({ StatusEquals: 'Failed' }),
    );
    expect(TransformJobSummaries.map(({ TransformJobName }) => TransformJobName)).toEqual(['taken']);
  });

  it.each(['sagemaker:CreateTransformJob', 'sagemaker:AddTags'])(
    'is denied to who may not %s',
    async (action) => {
      const on = await engine({ denied: [action] });
      const tagged = request('denied', { Tags: [{ Key: 'study', Value: 's1' }] });
      await expect(create(on, tagged)).rejects.toMatchObject({ name: 'AccessDeniedException' });
      await expect(look(on, 'denied')).rejects.toMatchObject({ name: 'ResourceNotFound' });
    },
  );

  it.each(['sagemaker:CreateModel', 'iam:PassRole'])(
    'for a model is denied to who may not %s',
    async (action) => {
      const on = await bench.engine({ container, denied: [action] });
      await put(on, 'models/m/1/model.tar.gz', weights);
      await expect(on.client.send(new CreateModelCommand(model('m')))).rejects.toMatchObject({
        name: 'AccessDeniedException',
      });
    },
  );
});

describe('Docker', () => {
  const bin = bench.folder();
  const calls = join(bin, 'calls');
  writeFileSync(
    join(bin, 'docker'),
    `#!/bin/sh\nprintf '%s\\n' "$*" >>'${calls}'\ncase $1 in\nrun) exit 4 ;;\nesac\n`,
    { mode: 0o755 },
  );
  const { PATH } = process.env;
  afterEach(() => {
    process.env.PATH = PATH;
  });

  it('serves on a port of this machine, which alone is published where the model is isolated', async () => {
    process.env.PATH = `${bin}:${PATH}`;
    for (const isolated of [false, true]) {
      const on = await engine({ executor: 'auto' }, '', isolated);
      await putAll(on, { a: 'one' });
      await create(on, request('dock'));
      expect((await ended(on, 'dock')).FailureReason).toContain('exit code 4');
    }
    const [open = '', alone = ''] = readFileSync(calls, 'utf8')
      .split('\n')
      .filter((line) => line.startsWith('run'));
    expect(open).toMatch(/--network host .*--env SAGEMAKER_BIND_TO_PORT .*slide-inference:1 serve$/);
    expect(alone).toMatch(/--publish 127\.0\.0\.1:\d+:8080 /);
    expect(alone).not.toMatch(/--network|AWS_SECRET_ACCESS_KEY|BIND_TO_PORT/);
  });
});
