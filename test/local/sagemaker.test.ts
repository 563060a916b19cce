import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { FilterLogEventsCommand } from '@aws-sdk/client-cloudwatch-logs';
import { ListObjectsV2Command } from '@aws-sdk/client-s3';
import {
  AddTagsCommand,
  CreateProcessingJobCommand,
  type CreateProcessingJobCommandInput,
  DescribeProcessingJobCommand,
  type DescribeProcessingJobCommandOutput,
  ListProcessingJobsCommand,
  ListTagsCommand,
  SageMakerClient,
  StopProcessingJobCommand,
} from '@aws-sdk/client-sagemaker';
import { afterAll, afterEach, describe, expect, it } from 'vitest';
import { containerStart } from '../../local/sagemaker/dockerfile.ts';
import { DockerExecutor } from '../../local/sagemaker/executors.ts';
import { markOf, sessionOf } from '../../local/sagemaker/processes.ts';
import { PROCESSING_LOG_GROUP } from '../../local/sagemaker/service.ts';
import { UnsupportedLocally } from '../../local/types.ts';
import { projectPython } from '../support/python.ts';
import { Bench, get, namespacesWork, put, records, until } from './sagemaker-bench.ts';
import { type Engine, type EngineOptions, IMAGE, JOB_ROLE } from './sagemaker-engine.ts';

const JOB = `
import json, os, pathlib, signal, subprocess, sys, time

root = pathlib.Path(os.environ.get("SLIDEWAY_ML_ROOT", "/opt/ml"))
processing = root / "processing"
host = json.loads((root / "config/resourceconfig.json").read_text())["current_host"]


def describe():
    seen = {
        "root": str(root),
        "inputs": {
            str(p.relative_to(processing / "input")): p.read_text()
            for p in sorted((processing / "input").rglob("*"))
            if p.is_file()
        },
        "job": json.loads((root / "config/processingjobconfig.json").read_text()),
        "resource": json.loads((root / "config/resourceconfig.json").read_text()),
        "environment": dict(os.environ),
        "arguments": sys.argv[1:],
    }
    (processing / "output" / host).mkdir()
    (processing / "output" / host / "seen.json").write_text(json.dumps(seen))
    (processing / "output" / "link").symlink_to(processing / "output" / host / "seen.json")
    (root / "output/message").write_text("x" * 1023 + "\\u00e9")
    print("one line")
    print("to stderr", file=sys.stderr)


def fail():
    (root / "output/message").write_text("the slide is not a slide")
    sys.exit(3)


def sleep():
    print("asleep")
    time.sleep(60)


def stubborn():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen(["sleep", "61"])
    print("asleep")
    time.sleep(60)


def one_fails():
    if host == "algo-1":
        sys.exit(7)
    time.sleep(60)


def resume():
    """The first attempt hangs, with a process in the background; the second says what it found."""
    record = processing / "output" / "attempts.jsonl"
    before = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    alive = [pid for attempt in before for pid in attempt["pids"] if os.path.exists(f"/proc/{pid}/fd/0")]
    child = subprocess.Popen(["sleep", "61"], start_new_session=False)
    with record.open("a") as file:
        file.write(json.dumps({"pids": [os.getpid(), child.pid], "alive": alive}) + "\\n")
    print("attempt", len(before) + 1)
    if not before:
        time.sleep(60)
    child.kill()


{"describe": describe, "fail": fail, "sleep": sleep, "stubborn": stubborn, "one-fails": one_fails, "resume": resume}[
    sys.argv[1]
]()
`;

const bench = new Bench();
const folder = () => bench.folder();
const container = folder();
mkdirSync(join(container, 'job'));
writeFileSync(join(container, 'job', '__init__.py'), '');
writeFileSync(join(container, 'job', '__main__.py'), JOB);
writeFileSync(
  join(container, 'Dockerfile'),
  '# built by nobody\nFROM python:3.12 AS build\nENTRYPOINT ["false"]\nFROM python:3.12\nENTRYPOINT ["python3", \\\n  "-m", "job"]\nCMD ["describe"]\n',
);

const children: ChildProcess[] = [];
/** Supervisors of killed engines, each the leader of a process group; long gone unless a test failed. */
const leaders: number[] = [];
const engine = (options: Partial<EngineOptions> = {}) => bench.engine({ container, ...options });

afterEach(async () => {
  for (const child of children.splice(0)) child.kill('SIGKILL');
  for (const pid of leaders.splice(0)) if (markOf(pid)) process.kill(-pid, 'SIGKILL');
  await bench.close();
});
afterAll(() => bench.remove());

function request(
  name: string,
  verb: string,
  more: Partial<CreateProcessingJobCommandInput> = {},
): CreateProcessingJobCommandInput {
  return {
    ProcessingJobName: name,
    ProcessingResources: {
      ClusterConfig: { InstanceCount: 1, InstanceType: 'ml.g5.xlarge', VolumeSizeInGB: 30 },
    },
    AppSpecification: { ImageUri: IMAGE, ContainerArguments: [verb] },
    ProcessingOutputConfig: {
      Outputs: [
        {
          OutputName: 'out',
          S3Output: {
            S3Uri: `s3://silver/${name}`,
            LocalPath: '/opt/ml/processing/output',
            S3UploadMode: 'EndOfJob',
          },
        },
      ],
    },
    RoleArn: JOB_ROLE,
    ...more,
  };
}

const instances = (count: number) => ({
  ProcessingResources: {
    ClusterConfig: { InstanceCount: count, InstanceType: 'ml.g5.xlarge', VolumeSizeInGB: 30 } as const,
  },
});

const create = ({ client }: Pick<Engine, 'client'>, input: CreateProcessingJobCommandInput) =>
  client.send(new CreateProcessingJobCommand(input));
const look = ({ client }: Pick<Engine, 'client'>, name: string) =>
  client.send(new DescribeProcessingJobCommand({ ProcessingJobName: name }));

const ended = (of: Pick<Engine, 'client'>, name: string): Promise<DescribeProcessingJobCommandOutput> =>
  until(async () => {
    const job = await look(of, name);
    return !['InProgress', 'Stopping'].includes(job.ProcessingJobStatus ?? '') && job;
  });

const lines = async ({ logs }: Engine, name: string): Promise<string[]> => {
  const { events = [] } = await logs
    .send(new FilterLogEventsCommand({ logGroupName: PROCESSING_LOG_GROUP, logStreamNamePrefix: `${name}/` }))
    .catch(() => ({ events: [] }));
  return events.map((event) => event.message ?? '');
};

const hasLine = (of: Engine, name: string, line: string) =>
  until(async () => (await lines(of, name)).includes(line));

const seenBy = async (of: Engine, name: string, host: string) =>
  JSON.parse(await get(of, `${name}/${host}/seen.json`));

const input = (
  name: string,
  uri: string,
  more: { S3DataType?: 'ManifestFile'; S3DataDistributionType?: 'ShardedByS3Key' } = {},
) => ({
  InputName: name,
  S3Input: {
    S3Uri: uri,
    LocalPath: `/opt/ml/processing/input/${name}`,
    S3DataType: 'S3Prefix' as const,
    S3InputMode: 'File' as const,
    ...more,
  },
});

describe('a processing job', () => {
  it('gives the container its inputs, configuration and environment, and uploads its outputs', async () => {
    const on = await engine();
    await put(on, 'jobs/shard-0000.json', 'shard 0');
    await put(on, 'jobs/shard-0001.json', 'shard 1');
    await put(on, 'jobs/deep/er.json', 'deeper');
    await put(on, 'models/m/1/model.tar.gz', 'weights');
    await put(on, 'list.manifest', JSON.stringify([{ prefix: 's3://silver/jobs/' }, 'deep/er.json']));
    process.env.HOST_SECRET = 'of the machine';
    await create(
      on,
      request('full', 'describe', {
        ProcessingInputs: [
          input('shards', 's3://silver/jobs/'),
          input('bare', 's3://silver/jobs'),
          input('model', 's3://silver/models/m/1/model.tar.gz'),
          input('listed', 's3://silver/list.manifest', { S3DataType: 'ManifestFile' }),
        ],
        Environment: { BATCH: '64' },
      }),
    );
    const job = await ended(on, 'full');
    delete process.env.HOST_SECRET;

    expect(job.FailureReason).toBeUndefined();
    expect(job.ProcessingJobStatus).toBe('Completed');
    expect(job.ProcessingStartTime?.getTime()).toBeGreaterThanOrEqual(job.CreationTime?.getTime() ?? 0);
    expect(job.ProcessingEndTime?.getTime()).toBeGreaterThanOrEqual(job.ProcessingStartTime?.getTime() ?? 0);
    // 1 KB, and the character that the limit cuts in two left out.
    expect(job.ExitMessage).toBe('x'.repeat(1023));

    const seen = await seenBy(on, 'full', 'algo-1');
    const shards = { 'shard-0000.json': 'shard 0', 'shard-0001.json': 'shard 1', 'deep/er.json': 'deeper' };
    expect(seen.inputs).toEqual({
      ...Object.fromEntries(Object.entries(shards).map(([name, text]) => [`shards/${name}`, text])),
      ...Object.fromEntries(Object.entries(shards).map(([name, text]) => [`bare/${name}`, text])),
      'model/model.tar.gz': 'weights',
      'listed/deep/er.json': 'deeper',
    });
    expect(seen.resource).toEqual({
      current_host: 'algo-1',
      current_instance_type: 'ml.g5.xlarge',
      hosts: ['algo-1'],
    });
    expect(seen.job).toMatchObject({
      ProcessingJobArn: 'arn:aws:sagemaker:us-east-1:000000000000:processing-job/full',
      Environment: { BATCH: '64' },
      AppSpecification: { ImageUri: IMAGE },
    });
    expect(seen.environment).toMatchObject({
      BATCH: '64',
      AWS_REGION: 'us-east-1',
      AWS_DEFAULT_REGION: 'us-east-1',
      AWS_ENDPOINT_URL: on.endpoint,
      AWS_SECRET_ACCESS_KEY: 'job',
    });
    expect(seen.environment).not.toHaveProperty('HOST_SECRET');
    expect(seen.environment).not.toHaveProperty('VITEST');

    const { Contents = [] } = await on.s3.send(
      new ListObjectsV2Command({ Bucket: 'silver', Prefix: 'full/' }),
    );
    expect(Contents.map((object) => object.Key)).toEqual(['full/algo-1/seen.json']);
    expect(await lines(on, 'full')).toEqual(expect.arrayContaining(['one line', 'to stderr']));
  });

  it('reads its inputs with the job role, not with the rights of who created it', async () => {
    const on = await engine();
    await put(on, 'jobs/a.json', '1');
    const root = () => ({ ...on.requests()['arn:aws:iam::000000000000:root'] });
    const before = root();
    await create(on, request('role', 'describe', { ProcessingInputs: [input('a', 's3://silver/jobs/')] }));
    await ended(on, 'role');
    expect(on.requests()[JOB_ROLE]?.['s3.get']).toBeGreaterThan(0);
    expect(root()['s3.get']).toBe(before['s3.get']);
  });

  it.runIf(namespacesWork())('finds its volume at the real /opt/ml, which nobody else sees', async () => {
    const on = await engine();
    const before = existsSync('/opt/ml');
    await create(on, request('real', 'describe', { ProcessingInputs: [] }));
    expect((await ended(on, 'real')).ProcessingJobStatus).toBe('Completed');
    expect((await seenBy(on, 'real', 'algo-1')).root).toBe('/opt/ml');
    expect(existsSync('/opt/ml')).toBe(before);
  });

  it.runIf(namespacesWork())('sees everything else of the machine’s /opt', async () => {
    const on = await engine();
    const listing = request('opt', '', {
      AppSpecification: { ImageUri: IMAGE, ContainerEntrypoint: ['ls', '-A'], ContainerArguments: ['/opt'] },
    });
    await create(on, listing);
    expect((await ended(on, 'opt')).ProcessingJobStatus).toBe('Completed');
    const names = existsSync('/opt') ? readdirSync('/opt') : [];
    expect((await lines(on, 'opt')).sort()).toEqual([...new Set([...names, 'ml'])].sort());
  });

  it('is told its base directory where mount namespaces are not to be had', async () => {
    const state = folder();
    const on = await engine({ state, mountNamespace: false });
    await create(on, request('based', 'describe'));
    expect((await ended(on, 'based')).ProcessingJobStatus).toBe('Completed');
    expect((await seenBy(on, 'based', 'algo-1')).root).toBe(join(state, 'jobs', 'based', 'algo-1'));
  });

  it('runs on several instances at once, each with its share of a sharded input', async () => {
    const on = await engine({ maxConcurrentInstances: 3 });
    for (const name of ['a', 'b', 'c', 'd']) await put(on, `jobs/${name}`, name);
    await create(
      on,
      request('three', 'describe', {
        ...instances(3),
        ProcessingInputs: [
          input('mine', 's3://silver/jobs/', { S3DataDistributionType: 'ShardedByS3Key' }),
          input('all', 's3://silver/jobs/'),
        ],
      }),
    );
    expect((await ended(on, 'three')).ProcessingJobStatus).toBe('Completed');
    const seen = await Promise.all(['algo-1', 'algo-2', 'algo-3'].map((host) => seenBy(on, 'three', host)));
    const mine = seen.map(({ inputs }) =>
      Object.keys(inputs).filter((name: string) => name.startsWith('mine/')),
    );
    expect(mine).toEqual([['mine/a', 'mine/d'], ['mine/b'], ['mine/c']]);
    for (const [index, { inputs, resource }] of seen.entries()) {
      expect(Object.keys(inputs).filter((name: string) => name.startsWith('all/'))).toHaveLength(4);
      expect(resource).toMatchObject({
        current_host: `algo-${index + 1}`,
        hosts: ['algo-1', 'algo-2', 'algo-3'],
      });
    }
  });

  it('whose container ends badly is Failed, with exit code and message', async () => {
    const on = await engine();
    await create(on, request('bad', 'fail'));
    const job = await ended(on, 'bad');
    expect(job.ProcessingJobStatus).toBe('Failed');
    expect(job.FailureReason).toBe(
      'AlgorithmError: See job logs for more information. Exit code 3: the slide is not a slide',
    );
    expect(job.ExitMessage).toBe('the slide is not a slide');
  });

  it('fails as a whole, and ends the others, when one instance fails', async () => {
    const on = await engine();
    await create(on, request('half', 'one-fails', instances(2)));
    const job = await ended(on, 'half');
    expect(job.ProcessingJobStatus).toBe('Failed');
    expect(job.FailureReason).toContain('Exit code 7');
  });

  it('fails before its container starts when an input is not there', async () => {
    const on = await engine();
    await create(on, request('empty', 'describe', { ProcessingInputs: [input('a', 's3://silver/none/')] }));
    const job = await ended(on, 'empty');
    expect(job.ProcessingJobStatus).toBe('Failed');
    expect(job.FailureReason).toMatch(
      /^ClientError: .*No S3 objects found under S3 URL "s3:\/\/silver\/none\/"/,
    );
    expect(await lines(on, 'empty')).toEqual([]);
  });

  it('refuses a key that would leave its folder', async () => {
    const on = await engine();
    await put(on, 'list.manifest', JSON.stringify([{ prefix: 's3://silver/jobs/' }, '../../../escape']));
    const escaping = input('a', 's3://silver/list.manifest', { S3DataType: 'ManifestFile' });
    await create(on, request('escape', 'describe', { ProcessingInputs: [escaping] }));
    expect((await ended(on, 'escape')).FailureReason).toContain("would leave the input's folder");
  });

  it('that runs longer than it may is Stopped, and says so', async () => {
    const on = await engine();
    await create(on, request('long', 'sleep', { StoppingCondition: { MaxRuntimeInSeconds: 1 } }));
    const job = await ended(on, 'long');
    expect(job.ProcessingJobStatus).toBe('Stopped');
    expect(job.FailureReason).toContain('MaxRuntimeInSeconds (1)');
  });

  it('stops when asked to, with SIGTERM', async () => {
    const on = await engine();
    await create(on, request('stop', 'sleep'));
    await hasLine(on, 'stop', 'asleep');
    const asked = Date.now();
    await on.client.send(new StopProcessingJobCommand({ ProcessingJobName: 'stop' }));
    expect((await look(on, 'stop')).ProcessingJobStatus).toMatch(/Stopping|Stopped/);
    const job = await ended(on, 'stop');
    expect(job.ProcessingJobStatus).toBe('Stopped');
    expect(Date.now() - asked).toBeLessThan(10_000);
    await expect(
      on.client.send(new StopProcessingJobCommand({ ProcessingJobName: 'stop' })),
    ).rejects.toMatchObject({ name: 'ValidationException' });
  });

  it('that does not heed SIGTERM is killed after the grace, with all that it started', async () => {
    const state = folder();
    const on = await engine({ state, stopGraceSeconds: 0.5 });
    await create(on, request('stubborn', 'stubborn'));
    await hasLine(on, 'stubborn', 'asleep');
    const record = JSON.parse(readFileSync(join(state, 'jobs', 'stubborn', 'job.json'), 'utf8'));
    const mark = record.instances[0].process;
    expect(sessionOf(mark).length).toBeGreaterThanOrEqual(3);
    await on.client.send(new StopProcessingJobCommand({ ProcessingJobName: 'stubborn' }));
    expect((await ended(on, 'stubborn')).ProcessingJobStatus).toBe('Stopped');
    expect(sessionOf(mark)).toEqual([]);
  });

  it('waits its turn when the machine is taken, and can be stopped while it waits', async () => {
    const on = await engine({ maxConcurrentInstances: 1 });
    await create(on, request('first', 'sleep'));
    await create(on, request('second', 'describe'));
    await create(on, request('third', 'describe'));
    await hasLine(on, 'first', 'asleep');
    expect(await look(on, 'second')).not.toHaveProperty('ProcessingStartTime');
    await on.client.send(new StopProcessingJobCommand({ ProcessingJobName: 'second' }));
    expect((await look(on, 'second')).ProcessingJobStatus).toBe('Stopped');
    await on.client.send(new StopProcessingJobCommand({ ProcessingJobName: 'first' }));
    expect((await ended(on, 'third')).ProcessingJobStatus).toBe('Completed');
    expect(await lines(on, 'second')).toEqual([]);
  });

  it('can be told to fail as AWS does when it has no capacity, or no quota', async () => {
    const failureReason = 'CapacityError: Unable to provision requested ML compute capacity.';
    const on = await engine({
      faults: (name) =>
        name === 'capacity'
          ? { failureReason }
          : name === 'quota'
            ? { createError: 'ResourceLimitExceeded' }
            : undefined,
    });
    await create(on, request('capacity', 'describe'));
    expect(await ended(on, 'capacity')).toMatchObject({
      ProcessingJobStatus: 'Failed',
      FailureReason: failureReason,
    });
    await expect(create(on, request('quota', 'describe'))).rejects.toMatchObject({
      name: 'ResourceLimitExceeded',
    });
    await create(on, request('fine', 'describe'));
    expect((await ended(on, 'fine')).ProcessingJobStatus).toBe('Completed');
  });

  it('has no network and no credentials when it is isolated', async () => {
    const on = await engine();
    await create(on, request('alone', 'describe', { NetworkConfig: { EnableNetworkIsolation: true } }));
    expect((await ended(on, 'alone')).ProcessingJobStatus).toBe('Completed');
    const { environment } = await seenBy(on, 'alone', 'algo-1');
    expect(Object.keys(environment).filter((name) => /ACCESS_KEY|ENDPOINT/.test(name))).toEqual([]);
  });
});

describe('an engine that is killed', () => {
  /** Kills an engine that runs a job of two instances; `before` is called with the ids of its supervisors. */
  async function kill(options: EngineOptions, before: (supervisors: number[]) => void = () => undefined) {
    const child = spawn(
      process.execPath,
      [join(import.meta.dirname, 'sagemaker-engine.ts'), JSON.stringify(options)],
      {
        stdio: ['ignore', 'pipe', 'inherit'],
      },
    );
    children.push(child);
    const [first] = await once(child.stdout, 'data');
    const client = new SageMakerClient({
      region: 'us-east-1',
      endpoint: String(first).trim(),
      credentials: { accessKeyId: 'ROOT', secretAccessKey: 'root' },
    });
    await create({ client }, request('again', 'resume', instances(2)));
    const attempts = (host: string) =>
      records<{ pids: number[]; alive: number[] }>(
        join(options.state, 'jobs', 'again', host, 'processing', 'output', 'attempts.jsonl'),
      );
    await until(() => attempts('algo-1').length === 1 && attempts('algo-2').length === 1);
    const record = JSON.parse(readFileSync(join(options.state, 'jobs', 'again', 'job.json'), 'utf8'));
    leaders.push(...record.instances.map((instance: { process: { pid: number } }) => instance.process.pid));
    before(leaders);
    const gone = once(child, 'exit');
    child.kill('SIGKILL');
    await gone;
    return attempts;
  }

  it('goes on with its jobs at the next start, in the same folder, never twice at once', async () => {
    const options = { state: folder(), container };
    const attempts = await kill(options);
    const on = await engine(options);
    expect((await ended(on, 'again')).ProcessingJobStatus).toBe('Completed');
    for (const host of ['algo-1', 'algo-2']) {
      expect(attempts(host)).toHaveLength(2);
      expect(attempts(host)[1]?.alive).toEqual([]);
    }
    expect(await hasLine(on, 'again', 'attempt 2')).toBe(true);
  });

  it('leaves containers behind when their supervisors hang, and the next start ends them first', async () => {
    const options = { state: folder(), container };
    const attempts = await kill(options, (supervisors) => {
      for (const pid of supervisors) process.kill(pid, 'SIGSTOP');
    });
    const left: number[] = [...attempts('algo-1'), ...attempts('algo-2')].flatMap(({ pids }) => pids);
    expect(left.map((pid) => markOf(pid)?.pid)).toEqual(left);
    const on = await engine(options);
    expect((await ended(on, 'again')).ProcessingJobStatus).toBe('Completed');
    for (const host of ['algo-1', 'algo-2']) expect(attempts(host)[1]?.alive).toEqual([]);
  });

  it('takes its containers with it, even when no other engine comes', async () => {
    const options = { state: folder(), container };
    const attempts = await kill(options);
    const pids: number[] = [...attempts('algo-1'), ...attempts('algo-2')].flatMap(({ pids }) => pids);
    expect(pids).toHaveLength(4);
    await until(() => pids.every((pid) => markOf(pid) === null));
  });

  it('leaves finished jobs as they are, and their names taken', async () => {
    const options = { state: folder(), container };
    const first = await engine(options);
    await create(first, request('done', 'describe'));
    const before = await ended(first, 'done');
    await first.close();
    const second = await engine(options);
    const { $metadata: _a, ...was } = before;
    const { $metadata: _b, ...is } = await look(second, 'done');
    expect(is).toEqual(was);
    await expect(create(second, request('done', 'describe'))).rejects.toMatchObject({
      name: 'ResourceInUse',
    });
  });

  it('that is closed in order leaves running jobs to the next', async () => {
    const options = { state: folder(), container };
    const first = await engine(options);
    await create(first, request('over', 'resume'));
    await hasLine(first, 'over', 'attempt 1');
    await first.close();
    const second = await engine(options);
    expect((await ended(second, 'over')).ProcessingJobStatus).toBe('Completed');
  });
});

describe('two engines on one machine', () => {
  it('run jobs of the same name side by side', async () => {
    const [one, two] = await Promise.all([engine(), engine()]);
    await put(one, 'jobs/a', 'of one');
    await put(two, 'jobs/a', 'of two');
    const both = request('same', 'describe', { ProcessingInputs: [input('a', 's3://silver/jobs/')] });
    await Promise.all([create(one, both), create(two, both)]);
    await Promise.all([ended(one, 'same'), ended(two, 'same')]);
    expect((await seenBy(one, 'same', 'algo-1')).inputs).toEqual({ 'a/a': 'of one' });
    expect((await seenBy(two, 'same', 'algo-1')).inputs).toEqual({ 'a/a': 'of two' });
  });
});

describe('a request', () => {
  const cluster = { InstanceCount: 1, InstanceType: 'ml.g5.xlarge', VolumeSizeInGB: 30 } as const;
  const output = {
    OutputName: 'o',
    S3Output: { S3Uri: 's3://b/k', LocalPath: '/opt/ml/processing/o', S3UploadMode: 'EndOfJob' },
  } as const;
  const wrong: [string, Partial<Record<keyof CreateProcessingJobCommandInput, unknown>>, RegExp][] = [
    ['a name with an underscore', { ProcessingJobName: 'a_b' }, /processingJobName.*regular expression/],
    ['a name of 64 characters', { ProcessingJobName: 'a'.repeat(64) }, /processingJobName.*63/],
    ['no role', { RoleArn: undefined }, /null at 'roleArn'/],
    [
      'no volume',
      { ProcessingResources: { ClusterConfig: { InstanceCount: 1, InstanceType: 'ml.g5.xlarge' } } },
      /volumeSizeInGB.*not be null/,
    ],
    [
      'an instance type that there is not',
      { ProcessingResources: { ClusterConfig: { ...cluster, InstanceType: 'ml.p4d.24xlarge' } } },
      /instanceType.*enum value set/,
    ],
    [
      'no instances',
      { ProcessingResources: { ClusterConfig: { ...cluster, InstanceCount: 0 } } },
      /instanceCount.*greater than or equal to 1/,
    ],
    [
      'a volume too large',
      { ProcessingResources: { ClusterConfig: { ...cluster, VolumeSizeInGB: 16385 } } },
      /volumeSizeInGB.*16384/,
    ],
    [
      'a volume key where the disk is the instance’s own',
      { ProcessingResources: { ClusterConfig: { ...cluster, VolumeKmsKeyId: 'key' } } },
      /VolumeKmsKeyId/,
    ],
    [
      'a run longer than nine days',
      { StoppingCondition: { MaxRuntimeInSeconds: 777_601 } },
      // Seven days in Debian's botocore.
      /maxRuntimeInSeconds.*less than or equal to (777600|604800)/,
    ],
    ['a variable’s name with a dash', { Environment: { 'A-B': '1' } }, /environment.*regular expression/],
    ['a member that there is not', { Envronment: {} } as never, /Unknown member 'envronment'/],
    [
      'an input outside /opt/ml/processing',
      {
        ProcessingInputs: [
          { InputName: 'a', S3Input: { S3Uri: 's3://b/k', S3DataType: 'S3Prefix', LocalPath: '/etc' } },
        ],
      },
      /localPath.*\/opt\/ml\/processing/,
    ],
    [
      'two inputs of one name',
      { ProcessingInputs: [input('a', 's3://b/k'), input('a', 's3://b/l')] },
      /'a' at 'processingInputs.inputName'.*unique/,
    ],
    [
      'output as it is written',
      {
        ProcessingOutputConfig: {
          Outputs: [{ ...output, S3Output: { ...output.S3Output, S3UploadMode: 'Continuous' } }],
        },
      },
      /does not support S3UploadMode Continuous/,
    ],
    [
      'input by pipe',
      {
        ProcessingInputs: [
          { InputName: 'a', S3Input: { ...input('a', 's3://b/k').S3Input, S3InputMode: 'Pipe' } },
        ],
      },
      /does not support S3InputMode Pipe/,
    ],
  ];

  it('that SageMaker would not take, or that cannot run here, is refused by the name of the member', async () => {
    const on = await engine();
    // The protocol itself: the SDK would hold some of these back.
    const { operations } = on.sagemaker;
    const caller = { arn: 'root', authorize: () => undefined };
    for (const [what, part, message] of wrong) {
      const attempt = operations.CreateProcessingJob?.(
        { ...request('wrong', 'describe'), ...part } as never,
        caller,
      );
      await expect(attempt, what).rejects.toMatchObject({ code: 'ValidationException', status: 400 });
      await expect(attempt, what).rejects.toThrow(message);
    }
    const { ProcessingJobSummaries } = await on.client.send(new ListProcessingJobsCommand({}));
    expect(ProcessingJobSummaries).toEqual([]);
  });

  it('for an image that there is not, or a name that is taken, is refused', async () => {
    const on = await engine();
    const image = { AppSpecification: { ImageUri: 'nothing:1' } };
    await expect(create(on, request('image', 'describe', image))).rejects.toMatchObject({
      name: 'ValidationException',
    });
    await create(on, request('taken', 'fail'));
    await expect(create(on, request('taken', 'fail'))).rejects.toMatchObject({ name: 'ResourceInUse' });
    await ended(on, 'taken');
    await expect(create(on, request('taken', 'fail'))).rejects.toMatchObject({ name: 'ResourceInUse' });
  });

  it.each(['sagemaker:CreateProcessingJob', 'iam:PassRole', 'sagemaker:AddTags'])(
    'is denied to who may not %s',
    async (action) => {
      const on = await engine({ denied: [action] });
      const tagged = request('denied', 'describe', { Tags: [{ Key: 'study', Value: 's1' }] });
      await expect(create(on, tagged)).rejects.toMatchObject({ name: 'AccessDeniedException' });
      await expect(look(on, 'denied')).rejects.toMatchObject({ name: 'ResourceNotFound' });
    },
  );

  it('may list jobs by status, name and time, a page at a time, and tag them', async () => {
    const on = await engine({
      faults: (name) => (name === 'b' ? { failureReason: 'CapacityError' } : undefined),
    });
    for (const name of ['a', 'b', 'c'])
      await create(on, request(name, 'describe', { Tags: [{ Key: 'study', Value: name }] }));
    for (const name of ['a', 'b', 'c']) await ended(on, name);
    const list = async (more: object) => {
      const { ProcessingJobSummaries = [], NextToken } = await on.client.send(
        new ListProcessingJobsCommand(more),
      );
      return [ProcessingJobSummaries.map((job) => job.ProcessingJobName), NextToken] as const;
    };
    expect(await list({ StatusEquals: 'Failed' })).toEqual([['b'], undefined]);
    expect(await list({ SortBy: 'Name', SortOrder: 'Ascending', MaxResults: 2 })).toEqual([['a', 'b'], '2']);
    expect(await list({ SortBy: 'Name', SortOrder: 'Ascending', NextToken: '2' })).toEqual([
      ['c'],
      undefined,
    ]);
    expect(await list({})).toEqual([['c', 'b', 'a'], undefined]);
    expect(await list({ CreationTimeAfter: new Date(Date.now() + 60_000) })).toEqual([[], undefined]);

    const { ProcessingJobArn: arn } = await look(on, 'a');
    await on.client.send(new AddTagsCommand({ ResourceArn: arn, Tags: [{ Key: 'run', Value: '1' }] }));
    const { Tags } = await on.client.send(new ListTagsCommand({ ResourceArn: arn }));
    expect(Tags).toEqual([
      { Key: 'study', Value: 'a' },
      { Key: 'run', Value: '1' },
    ]);
  });
});

describe('what requests must be', () => {
  const list = ({ client }: Engine) => client.send(new ListProcessingJobsCommand({}));

  /** An interpreter of its own, which starts the environment's after `script`. */
  function interpreter(script: string): string {
    const path = join(folder(), 'python');
    writeFileSync(path, `#!/bin/sh\n${script}\nexec '${projectPython()}' "$@"\n`, { mode: 0o755 });
    return path;
  }

  it('is asked of the environment’s botocore once, and not before the first request', async () => {
    const calls = join(folder(), 'calls');
    const python = interpreter(`echo "$*" >>'${calls}'`);
    const on = await engine({ python });
    expect(existsSync(calls)).toBe(false);
    await Promise.all([list(on), list(on)]);
    await list(await engine({ python }));
    expect(readFileSync(calls, 'utf8').trim().split('\n')).toHaveLength(1);
  });

  it('is read from Debian’s botocore, too: plain, and older than many an instance type', async () => {
    const other = folder();
    const api = join(other, 'botocore', 'data', 'sagemaker', '2017-07-24');
    mkdirSync(api, { recursive: true });
    writeFileSync(join(other, 'botocore', '__init__.py'), '');
    const copy = `
import botocore.loaders, json, sys
model = botocore.loaders.create_loader().load_service_model("sagemaker", "service-2")
types = model["shapes"]["ProcessingInstanceType"]["enum"]
types[:] = [name for name in types if not name.startswith("ml.g5")]
json.dump(model, open(sys.argv[1], "w"))
`;
    execFileSync(projectPython(), ['-c', copy, join(api, 'service-2.json')]);
    const on = await engine({ python: interpreter(`export PYTHONPATH='${other}':"$PYTHONPATH"`) });
    await create(on, request('debian', 'describe', { Environment: { SEEN: '1' } }));
    expect((await ended(on, 'debian')).ProcessingJobStatus).toBe('Completed');
    const { environment } = await seenBy(on, 'debian', 'algo-1');
    expect(environment.PYTHONPATH).toContain(other);
    await expect(create(on, request('de_bian', 'describe'))).rejects.toThrow(/processingJobName/);
  });

  it('cannot be known without botocore, and says what to do; it is looked for again', async () => {
    const whole = join(folder(), 'whole');
    const python = interpreter(`[ -e '${whole}' ] || set -- -S "$@"`);
    const on = await engine({ python });
    const missing = list(on);
    await expect(missing).rejects.toThrow(/No module named 'botocore'.*slideway setup/);
    // Not of the kind that a caller takes for passing and repeats.
    await expect(missing).rejects.toMatchObject({
      name: 'ServiceModelUnavailable',
      $metadata: { httpStatusCode: 400 },
    });
    writeFileSync(whole, '');
    expect((await list(on)).ProcessingJobSummaries).toEqual([]);
    const none = await engine({ python: join(folder(), 'none', 'bin', 'python') });
    await expect(list(none)).rejects.toThrow(/none\/bin\/python.*slideway setup/);
  });
});

describe('Docker', () => {
  // No engine is to be had where these tests run: a program of its name writes down how it is called, and is the
  // container as far as its exit goes.
  const bin = folder();
  const calls = join(bin, 'calls');
  writeFileSync(
    join(bin, 'docker'),
    `#!/bin/sh\nprintf '%s\\n' "$*" >>'${calls}'\ncase $1 in\nrun) echo "in the container"; exit "$CODE" ;;\ninfo) echo '{"nvidia":{}}' ;;\nesac\n`,
    { mode: 0o755 },
  );
  const { PATH } = process.env;
  afterEach(() => {
    process.env.PATH = PATH;
  });

  it('is used where it has the image, with the job’s own entry point, volume and environment', async () => {
    process.env.PATH = `${bin}:${PATH}`;
    const state = folder();
    const on = await engine({ state, executor: 'auto' });
    await create(
      on,
      request('dock', 'describe', {
        AppSpecification: {
          ImageUri: IMAGE,
          ContainerEntrypoint: ['run', 'me'],
          ContainerArguments: ['now'],
        },
        Environment: { CODE: '4' },
      }),
    );
    const job = await ended(on, 'dock');
    expect(job.FailureReason).toContain('Exit code 4');
    expect(await lines(on, 'dock')).toEqual(['in the container']);
    const [inspect, info, run, remove] = readFileSync(calls, 'utf8').split('\n');
    expect(inspect).toContain(IMAGE);
    expect(info).toMatch(/^info/);
    expect(run).toContain(`--volume ${join(state, 'jobs', 'dock', 'algo-1')}:/opt/ml`);
    expect(run).toMatch(/--network host .*--gpus all/);
    expect(run).toContain('--env CODE --env AWS_REGION');
    expect(run).toMatch(new RegExp(`--entrypoint run ${IMAGE} me now$`));
    const [, name = 'no name'] = /--name (\S+)/.exec(run ?? '') ?? [];
    expect(remove).toBe(`rm --force ${name}`);
  });
});

describe('what a container starts', () => {
  it('is the last stage’s ENTRYPOINT and CMD', () => {
    expect(containerStart(container)).toEqual({ entrypoint: ['python3', '-m', 'job'], cmd: ['describe'] });
  });

  it('is refused in shell form', () => {
    const other = folder();
    writeFileSync(join(other, 'Dockerfile'), 'FROM x\nENTRYPOINT python -m job\n');
    expect(() => containerStart(other)).toThrow(UnsupportedLocally);
  });

  it('is not asked of Docker when Docker lacks the image', async () => {
    expect(await new DockerExecutor().image('slideway.invalid/there-is-no-such-image:0')).toBeNull();
    const on = await engine({ executor: 'auto' });
    await create(on, request('auto', 'describe'));
    expect((await ended(on, 'auto')).ProcessingJobStatus).toBe('Completed');
    const only = await engine({ executor: 'docker' });
    await create(only, request('docker', 'describe'));
    expect((await ended(only, 'docker')).FailureReason).toMatch(/^ClientError: Cannot start the container/);
  });
});
