/** What may go wrong between tiles and slides, on the packaged flow, with a container that fails as it is told. */
import { cpSync, mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import { buffer } from 'node:stream/consumers';
import { setTimeout as wait } from 'node:timers/promises';
import { gzipSync } from 'node:zlib';
import { ListObjectsV2Command, PutObjectCommand, S3Client } from '@aws-sdk/client-s3';
import {
  ListModelsCommand,
  ListTransformJobsCommand,
  SageMakerClient,
  StopTransformJobCommand,
} from '@aws-sdk/client-sagemaker';
import { ListExecutionsCommand, SFNClient, StopExecutionCommand } from '@aws-sdk/client-sfn';
import { pack } from 'tar-stream';
import { afterAll, beforeAll, beforeEach, describe, expect, it, vi } from 'vitest';
import { BUNDLES } from '../../cli/paths.ts';
import { ensurePackage } from '../../cli/setup/package.ts';
import { Screen } from '../../cli/terminal.ts';
import type { RunSummary } from '../../core/contracts.ts';
import { packsKey, runJsonKey } from '../../core/keys.ts';
import { readJson } from '../../core/store.ts';
import { type LocalAws, startLocalAws } from '../../local/engine.ts';
import { MODEL } from '../support/results.ts';
import { python, Workplace } from './support.ts';

const work = new Workplace();
const MODEL_NAME = 'served';
const OTHER_MODEL = 'other';
/** What a batch may take, as the package says it. */
const MODEL_SECONDS = 150;
/** Longer than any of these Transform jobs takes, but one. */
const TRANSFORM_SECONDS = 45;

/**
 * The three parts of the container without slides and models: what a slide is called says how its packs fare. Joining
 * quarantines every slide whose packs were answered, so that nothing has to be aggregated.
 */
const CONTAINER = `
import http.server, json, os, pathlib, sys, threading, time

import boto3

root = pathlib.Path(os.environ.get("SLIDEWAY_ML_ROOT", "/opt/ml"))
notes = pathlib.Path(${JSON.stringify(work.path('notes'))})


def shards():
    return [json.loads(path.read_text()) for path in sorted((root / "processing/input/shards").glob("shard-*.json"))]


def put(place, name, body):
    boto3.client("s3").put_object(Bucket=place["bucket"], Key=place["prefix"] + name, Body=body)


def packs_of(slide):
    kind = slide["slide"].split(".")[0]
    return [f"{kind}-{slide['slideId']}-{n:05d}.tar" for n in range(2 if kind == "two" else 1)]


def tile():
    for shard in shards():
        for slide in shard["slides"]:
            if slide["slide"].startswith("crash"):
                (root / "output/message").write_text("the tiler fell over")
                sys.exit(3)
            packs = []
            for name in packs_of(slide):
                put(shard["tiling"], f"{slide['slideId']}/{name}", name)
                key = f"{shard['tiling']['prefix']}{slide['slideId']}/{name}"
                packs.append({"key": key, "bytes": len(name), "tiles": 1})
            told = {"slideId": slide["slideId"], "state": "TILED", "packs": packs}
            put(shard["tiled"], f"{slide['slideId']}.json", json.dumps(told))


def times(name):
    """How often this pack was asked for, over all servers."""
    with (notes / name).open("a") as file:
        file.write("x")
        return file.tell()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status):
        self.send_response(status)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def do_GET(self):
        self.answer(200)

    def do_POST(self):
        name = self.rfile.read(int(self.headers["Content-Length"])).decode()
        asked = times(name)
        # A job asks twice before it gives a pack up.
        if name.startswith("never") or name.startswith("once") and asked <= 2:
            return self.answer(500)
        if name.startswith("hang") and asked == 1:
            time.sleep(300)
        if name.startswith("slow"):
            time.sleep(3)
        self.answer(200)

    def log_message(self, *args):
        pass


def serve():
    limits = [os.environ.get(f"SLIDEWAY_{name}_SECONDS", "") for name in ("REQUEST", "MODEL")]
    (notes / "limits").write_text(" ".join(limits))
    port = int(os.environ.get("SAGEMAKER_BIND_TO_PORT", "8080"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    server.serve_forever()


def join():
    s3 = boto3.client("s3")
    for shard in shards():
        place = shard["transformed"]
        found = s3.list_objects_v2(Bucket=place["bucket"], Prefix=place["prefix"]).get("Contents", [])
        there = {item["Key"].split("/")[-1] for item in found}
        for slide in shard["slides"]:
            whole = all(name + ".out" in there for name in packs_of(slide))
            marker = {
                "runId": shard["runId"], "slideId": slide["slideId"],
                "state": "QUARANTINED" if whole else "FAILED",
                "error": "Joined" if whole else "PackFailed", "message": "as told",
                "checksum": slide["bronze"]["checksum"],
                "model": {name: shard["model"][name] for name in ("name", "version", "digest")},
                "parameters": shard["parameters"], "codeVersion": "0", "jobName": "j",
                "completedAt": "2026-01-01T00:00:00Z", "outputs": {}, "timings": {},
                "requests": {"get": 0, "put": 0}, "device": "cpu",
            }
            put(shard["output"], f"{slide['slideId']}/{shard['model']['name']}/complete.json", json.dumps(marker))


{"tile": tile, "serve": serve, "join": join}[sys.argv[1]]()
`;

/** The packaged deployment, but for a limit of Transform jobs that can be waited for. */
async function packageWithShortLimit(): Promise<string> {
  const folder = work.path('package');
  cpSync(await ensurePackage(new Screen(process.stderr, { quiet: true }), 'dev'), folder, {
    recursive: true,
  });
  const path = `${folder}/cloudformation-template-update-stack.json`;
  const template = readFileSync(path, 'utf8');
  const limit = /(TimeoutSeconds\\+": ?)86400/g;
  expect(template.match(limit)).toHaveLength(1);
  writeFileSync(path, template.replace(limit, `$1${TRANSFORM_SECONDS}`));
  return folder;
}

let aws: LocalAws;
let s3: S3Client;
let sageMaker: SageMakerClient;
let stepFunctions: SFNClient;
let silver: string;

/** Jobs and models that were asked for, without what is the run's own in their names. */
const asked: string[] = [];
/** What SageMaker is to answer, or what is to happen, when one of that name is asked for; each once. */
const plan = new Map<string, { createError: string } | { failureReason: string } | (() => void)>();

beforeAll(async () => {
  const folder = work.path('containers', 'slide-inference');
  mkdirSync(work.path('notes'), { recursive: true });
  mkdirSync(work.path('containers', 'slide-inference', 'container'), { recursive: true });
  writeFileSync(`${folder}/container/__init__.py`, '');
  writeFileSync(`${folder}/container/__main__.py`, CONTAINER);
  writeFileSync(`${folder}/Dockerfile`, 'FROM python:3.12\nENTRYPOINT ["python", "-m", "container"]\n');
  aws = await startLocalAws({
    state: work.path('state'),
    package: await packageWithShortLimit(),
    python,
    containers: work.path('containers'),
    bundles: BUNDLES,
    timeScale: 0.001,
    executor: 'process',
    faults: (name) => {
      const short = name.replace(/^slideway-dev-[0-9a-f]{12}-/, '');
      asked.push(short);
      const next = plan.get(short);
      plan.delete(short);
      if (typeof next !== 'function') return next;
      next();
      return undefined;
    },
  });
  const config = { endpoint: aws.endpoint, region: aws.region, credentials: aws.credentials };
  s3 = new S3Client({ ...config, forcePathStyle: true });
  sageMaker = new SageMakerClient(config);
  stepFunctions = new SFNClient(config);
  silver = aws.outputs.SilverBucket ?? '';
  for (const model of [MODEL_NAME, OTHER_MODEL]) await putModel(model);
}, 240_000);
afterAll(async () => {
  for (const client of [s3, sageMaker, stepFunctions]) client?.destroy();
  await aws?.stop();
  work.remove();
});
beforeEach(() => {
  asked.length = 0;
  plan.clear();
});

const put = (bucket: string | undefined, key: string, body: Buffer | string) =>
  s3.send(new PutObjectCommand({ Bucket: bucket, Key: key, Body: body }));

async function putModel(model = MODEL_NAME): Promise<void> {
  const tar = pack();
  tar.entry(
    { name: 'model.json' },
    JSON.stringify({ ...MODEL, name: model, mode: 'transform', modelSeconds: MODEL_SECONDS }),
  );
  tar.entry({ name: 'model.pt' }, 'weights');
  tar.finalize();
  const key = `models/${model}/${MODEL.version}/model.tar.gz`;
  await put(aws.outputs.ModelsBucket, key, gzipSync(await buffer(tar)));
}

let known = 0;
/** Drops a study of such slides; resolves when its execution is there. */
async function drop(study: string, slides: string[], models: Record<string, string> = {}): Promise<void> {
  for (const slide of slides)
    await put(aws.outputs.LandingBucket, `${study}/${slide}.tiff`, `${study} ${slide}`);
  const rows = slides.map((slide) => `${slide}.tiff,${models[slide] ?? MODEL_NAME}\n`).join('');
  await put(aws.outputs.LandingBucket, `${study}/repo.csv`, `slide,model\n${rows}`);
  known += 1;
  await until(async () => (await executions()).length === known);
}

const executions = async () =>
  (await stepFunctions.send(new ListExecutionsCommand({ stateMachineArn: aws.outputs.StateMachineArn })))
    .executions ?? [];

async function until<T>(check: () => Promise<T | false | undefined>): Promise<T> {
  const deadline = Date.now() + 150_000;
  for (;;) {
    const value = await check();
    if (value) return value;
    if (Date.now() > deadline) throw new Error(`not within its time; asked for: ${asked.join(', ')}`);
    await wait(100);
  }
}

async function runIdOf(study: string): Promise<string> {
  const { CommonPrefixes = [] } = await s3.send(
    new ListObjectsV2Command({ Bucket: silver, Prefix: `runs/${study}-`, Delimiter: '/' }),
  );
  return CommonPrefixes[0]?.Prefix?.split('/')[1] ?? '';
}

/** The run's end, and the transitions that its execution took. */
async function ended(study: string): Promise<{ summary: RunSummary; transitions: number }> {
  const [newest] = await until(async () => {
    const all = await executions();
    return all[0]?.status !== 'RUNNING' && all;
  });
  const key = runJsonKey(await runIdOf(study));
  const { standard } = aws.services.stepFunctions.transitions(newest?.executionArn ?? '');
  return { summary: (await readJson(s3, { bucket: silver, key })) as RunSummary, transitions: standard };
}

async function run(study: string, slides: string[], models?: Record<string, string>) {
  await drop(study, slides, models);
  return ended(study);
}

const reasons = ({ slides }: RunSummary) =>
  Object.fromEntries(slides.map(({ slide, reason }) => [slide.replace('.tiff', ''), reason?.error]));
const jobs = ({ jobs }: RunSummary) =>
  jobs.map(({ kind, jobName, state, reason }) => [kind, jobName.split('-').at(-1), state, reason?.error]);
const modelNames = async () =>
  ((await sageMaker.send(new ListModelsCommand({}))).Models ?? []).map(({ ModelName }) => ModelName);

const CAPACITY = { failureReason: 'CapacityError: Unable to provision requested ML compute capacity.' };
const name = (kind: string, attempt = 1) => `${MODEL_NAME}-${kind}-${attempt}`;

describe('a pack that fails', () => {
  it('is tried again alone, twice more in vain, and takes only its own slide with it', async () => {
    const { summary, transitions } = await run('packs', ['two', 'once', 'never']);
    expect(asked).toEqual([
      name('tile'),
      MODEL_NAME,
      name('transform'),
      name('transform', 2),
      name('transform', 3),
      name('transform', 4),
      name('join'),
    ]);
    expect(reasons(summary)).toEqual({ two: 'Joined', once: 'Joined', never: 'PackFailed' });
    expect(jobs(summary)).toEqual([
      ['join', '1', 'SUCCEEDED', undefined],
      ['tile', '1', 'SUCCEEDED', undefined],
      ['transform', '1', 'FAILED', 'TransformFailed'],
      ['transform', '2', 'FAILED', 'TransformFailed'],
      ['transform', '3', 'FAILED', 'TransformFailed'],
      ['transform', '4', 'FAILED', 'TransformFailed'],
    ]);
    const given = summary.jobs.filter(({ kind }) => kind === 'transform');
    expect(given.map(({ packs, fruitless }) => [packs, fruitless])).toEqual([
      ...[
        [4, 0],
        [2, 0],
        [1, 0],
        [1, 1],
      ],
    ]);
    const { runId } = summary;
    const packs = async (attempt: number) => {
      const key = packsKey(runId, MODEL_NAME, attempt);
      const [, ...names] = (await readJson(s3, { bucket: silver, key })) as [object, ...string[]];
      return names.map((pack) => pack.replace(/^.*\/(\w+)-.*$/, '$1'));
    };
    expect((await packs(1)).sort()).toEqual(['never', 'once', 'two', 'two']);
    expect((await packs(2)).sort()).toEqual(['never', 'once']);
    for (const attempt of [3, 4]) expect(await packs(attempt)).toEqual(['never']);
    expect(await modelNames()).toEqual([]);
    expect(summary.cost.transitions).toBe(transitions);
    expect(readFileSync(work.path('notes', 'limits'), 'utf8')).toBe(`590 ${MODEL_SECONDS}`);
  }, 120_000);

  it('is given up after two jobs where not one was answered', async () => {
    const { summary } = await run('nothing', ['never']);
    expect(asked.filter((job) => job.includes('transform'))).toEqual([
      name('transform'),
      name('transform', 2),
    ]);
    expect(reasons(summary)).toEqual({ never: 'PackFailed' });
    expect(await modelNames()).toEqual([]);
  }, 120_000);
});

it('slides that were not tiled are not scored: the job’s own reason stands with them', async () => {
  const { summary } = await run('untiled', ['crash']);
  expect(asked).toEqual([name('tile')]);
  expect(jobs(summary)).toEqual([['tile', '1', 'FAILED', 'TilingFailed']]);
  expect(reasons(summary)).toEqual({ crash: 'TilingFailed' });
  expect(summary.slides[0]?.reason?.message).toContain('the tiler fell over');
}, 120_000);

describe('a model', () => {
  it('whose image is not there ends the model’s inference, with SageMaker’s own words', async () => {
    const folder = work.path('containers', 'slide-inference');
    plan.set(MODEL_NAME, () => renameSync(folder, `${folder}-away`));
    try {
      const { summary } = await run('imageless', ['two']);
      expect(asked).toEqual([name('tile'), MODEL_NAME]);
      expect(jobs(summary)).toEqual([
        ['tile', '1', 'SUCCEEDED', undefined],
        ['transform', '1', 'FAILED', 'ModelCreationFailed'],
      ]);
      expect(reasons(summary)).toEqual({ two: 'ModelCreationFailed' });
      expect(summary.slides[0]?.reason?.message).toMatch(/Requested image .*slide-inference:.* not found/);
      expect(await modelNames()).toEqual([]);
    } finally {
      renameSync(`${folder}-away`, folder);
    }
  }, 120_000);

  it('is asked for again when SageMaker throttles or the quota is used up', async () => {
    plan.set(MODEL_NAME, { createError: 'ThrottlingException' });
    expect(reasons((await run('throttled', ['two'])).summary)).toEqual({ two: 'Joined' });
    expect(asked.filter((job) => job === MODEL_NAME)).toHaveLength(2);
    plan.set(MODEL_NAME, { createError: 'ResourceLimitExceeded' });
    expect(reasons((await run('models', ['two'])).summary)).toEqual({ two: 'Joined' });
    expect(await modelNames()).toEqual([]);
  }, 120_000);

  it('whose package is another when its job has ended is not trusted, and is deleted', async () => {
    plan.set(name('transform'), () => void putModel());
    const { summary } = await run('changed', ['slow']);
    expect(asked).toEqual([name('tile'), MODEL_NAME, name('transform')]);
    expect(jobs(summary)).toEqual([
      ['tile', '1', 'SUCCEEDED', undefined],
      ['transform', '1', 'SUCCEEDED', undefined],
      ['transform', '2', 'FAILED', 'ModelDigestMismatch'],
    ]);
    expect(reasons(summary)).toEqual({ slow: 'ModelDigestMismatch' });
    expect(await modelNames()).toEqual([]);
  }, 120_000);
});

describe('a job of any kind', () => {
  it('for which no machine is free is asked for again under a new name', async () => {
    for (const kind of ['tile', 'transform', 'join']) {
      plan.set(name(kind, 1), CAPACITY);
      plan.set(name(kind, 2), CAPACITY);
    }
    const { summary } = await run('capacity', ['two']);
    expect(asked).toEqual([
      ...[name('tile'), name('tile', 2), name('tile', 3), MODEL_NAME],
      ...[name('transform'), name('transform', 2), name('transform', 3)],
      ...[name('join'), name('join', 2), name('join', 3)],
    ]);
    expect(reasons(summary)).toEqual({ two: 'Joined' });
    expect(jobs(summary).map(([kind, attempt, state]) => [kind, attempt, state])).toEqual([
      ['join', '3', 'SUCCEEDED'],
      ['tile', '3', 'SUCCEEDED'],
      ['transform', '3', 'SUCCEEDED'],
    ]);
  }, 120_000);

  it('that is throttled or beyond the quota is asked for again', async () => {
    plan.set(name('transform'), { createError: 'ThrottlingException' });
    plan.set(name('transform', 2), { createError: 'ResourceLimitExceeded' });
    expect(reasons((await run('asked', ['two'])).summary)).toEqual({ two: 'Joined' });
    expect(asked.filter((job) => job.includes('transform'))).toEqual([
      name('transform'),
      name('transform', 2),
      name('transform', 2),
    ]);
  }, 120_000);

  it('that somebody stops midway is followed by one for what is missing', async () => {
    await drop('stopped', ['two', 'hang']);
    const job = await until(async () => {
      const { Contents = [] } = await s3.send(
        new ListObjectsV2Command({ Bucket: silver, Prefix: 'transform/stopped-' }),
      );
      return Contents.filter(({ Key }) => Key?.endsWith('.out')).length === 2 && asked.at(-1);
    });
    const [model = ''] = await modelNames();
    await sageMaker.send(new StopTransformJobCommand({ TransformJobName: model.replace(MODEL_NAME, job) }));
    const { summary } = await ended('stopped');
    expect(reasons(summary)).toEqual({ two: 'Joined', hang: 'Joined' });
    expect(jobs(summary)).toEqual([
      ['join', '1', 'SUCCEEDED', undefined],
      ['tile', '1', 'SUCCEEDED', undefined],
      ['transform', '1', 'FAILED', 'TransformFailed'],
      ['transform', '2', 'SUCCEEDED', undefined],
    ]);
  }, 120_000);
});

describe('a job whose end cannot be put on record', () => {
  /** What record-job fails for one model until the test has ended. */
  function unrecorded(model: string) {
    const { lambda } = aws.services;
    const invoke = lambda.invoke.bind(lambda);
    const spy = vi.spyOn(lambda, 'invoke').mockImplementation(async (arn, payload, caller) => {
      if (arn.endsWith('-record-job') && (payload as { job: { model: string } }).job.model === model)
        throw Object.assign(new Error('no record today'), { name: 'NoRecord' });
      return invoke(arn, payload, caller);
    });
    return { [Symbol.dispose]: () => spy.mockRestore() };
  }

  it('takes neither its own slides nor those of another model with it', async () => {
    using _ = unrecorded(MODEL_NAME);
    const { summary } = await run('unrecorded', ['two', 'once', 'slow'], { slow: OTHER_MODEL });
    expect(reasons(summary)).toEqual({ two: 'Joined', once: 'Joined', slow: 'Joined' });
    expect(summary.jobs.map(({ model, kind }) => [model, kind])).toEqual([
      [OTHER_MODEL, 'join'],
      [OTHER_MODEL, 'tile'],
      [OTHER_MODEL, 'transform'],
    ]);
    expect(await modelNames()).toEqual([]);
  }, 120_000);

  it('is not trusted any more for that, where its package is another', async () => {
    using _ = unrecorded(MODEL_NAME);
    plan.set(name('transform'), () => void putModel());
    const { summary } = await run('unrecorded-change', ['slow']);
    expect(asked).toEqual([name('tile'), MODEL_NAME, name('transform')]);
    expect(reasons(summary).slow).not.toBe('Joined');
    expect(await modelNames()).toEqual([]);
  }, 120_000);

  it('is not missed where there is no model', async () => {
    using _ = unrecorded(MODEL_NAME);
    const folder = work.path('containers', 'slide-inference');
    plan.set(MODEL_NAME, () => renameSync(folder, `${folder}-away`));
    try {
      expect((await run('unrecorded-model', ['two'])).summary.reason?.error).toBe('NoResults');
    } finally {
      renameSync(`${folder}-away`, folder);
    }
  }, 120_000);
});

it('a Transform job that takes too long is stopped, and another does what is missing', async () => {
  const { summary } = await run('long', ['two', 'hang']);
  expect(reasons(summary)).toEqual({ two: 'Joined', hang: 'Joined' });
  expect(jobs(summary).slice(2)).toEqual([
    ['transform', '1', 'FAILED', 'JobTimedOut'],
    ['transform', '2', 'SUCCEEDED', undefined],
  ]);
  const [seconds = 0] = summary.jobs.slice(2).map(({ instanceSeconds }) => instanceSeconds);
  // It began before Step Functions had waited for the first time, and is stopped soon after.
  expect(seconds).toBeGreaterThan(TRANSFORM_SECONDS / 2);
  expect(seconds).toBeLessThan(TRANSFORM_SECONDS + 30);
  const { TransformJobSummaries = [] } = await sageMaker.send(
    new ListTransformJobsCommand({ StatusEquals: 'Stopped' }),
  );
  const hung = TransformJobSummaries.find(({ TransformJobName = '' }) =>
    summary.jobs.some(({ jobName }) => jobName === TransformJobName),
  );
  expect(hung?.TransformJobName).toMatch(/-transform-1$/);
}, 180_000);

it('a run that is stopped by hand leaves its model to the sweep', async () => {
  await drop('aborted', ['hang']);
  await until(async () => asked.includes(name('transform')) && (await modelNames()).length === 1);
  const [running] = await executions();
  await stepFunctions.send(new StopExecutionCommand({ executionArn: running?.executionArn }));
  await until(async () => (await executions())[0]?.status === 'ABORTED');
  expect(await modelNames()).toHaveLength(1);
  const sweep = await aws.services.lambda.invoke(
    'arn:aws:lambda:us-east-1:000000000000:function:slideway-dev-sweep',
    {},
    { arn: 'arn:aws:iam::000000000000:root', authorize: () => undefined },
  );
  expect(sweep).toMatchObject({ SweepLeftModels: 1 });
  expect(await modelNames()).toEqual([]);
}, 120_000);
