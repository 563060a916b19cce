import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { StateMachine } from 'aws-local-stepfunctions';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { PROJECT } from '../../cli/paths.ts';
import type { InferenceJob, Mode } from '../../core/contracts.ts';
import { jobNameOf } from '../../core/inference.ts';
import { Logs } from '../../local/logs.ts';
import { SageMaker } from '../../local/sagemaker/service.ts';
import { projectPython } from '../support/python.ts';
import {
  aslErrors,
  cfnLint,
  definition,
  hasCfnLint,
  hasCurrentServiceModel,
  serviceModelFindings,
  template,
} from './packaged.ts';
import {
  askedMetrics,
  buckets,
  type Definition,
  deadLetters,
  functions,
  jobRights,
  jobs,
  leastPrivilege,
  logGroups,
  machineRights,
  metrics,
  type Placed,
  record,
  type State,
  type Statement,
  sagemakerTasks,
  states,
  stores,
  type Template,
  tasks,
} from './rules.ts';

let packaged: Template;
let flow: Definition;
beforeAll(() => {
  packaged = template();
  flow = definition();
});

interface Policy {
  Statement: Statement[];
}

/** A copy of the template, with one thing of one resource broken. */
function broken<P = Record<string, unknown>>(id: string, change: (properties: P) => void): Template {
  const copy = structuredClone(packaged);
  const resource = copy.Resources[id];
  if (!resource) throw new Error(`The template has no ${id}; break something else.`);
  change(resource.Properties as P);
  return copy;
}

/** A copy of the template, with one statement of one role changed. */
const withStatement = (id: string, sid: string, change: (statement: Statement) => void) =>
  broken<{ Policies: { PolicyDocument: Policy }[] }>(id, ({ Policies }) => {
    const statement = Policies.flatMap(({ PolicyDocument }) => PolicyDocument.Statement).find(
      ({ Sid }) => Sid === sid,
    );
    if (!statement) throw new Error(`${id} has no statement ${sid}; break another.`);
    change(statement);
  });

/** A copy of the definition, with one state changed. */
function brokenState(name: string, change: (state: State) => void): Definition {
  const copy = structuredClone(flow);
  const placed = [...states(copy)].find((candidate) => candidate.name === name);
  if (!placed) throw new Error(`The definition has no state ${name}; break another.`);
  change(placed.state);
  return copy;
}

/** Whether a function's handler emits a metric: its name stands there, and so do the names of further dimensions. */
function emits(service: string, metric: string, further: string[]): boolean {
  const path = join(PROJECT, 'functions', service, 'handler.ts');
  if (!existsSync(path)) return false;
  const code = readFileSync(path, 'utf8');
  const single = /(\w+)\.addDimension\('(\w+)'/.exec(code);
  const emitted = new RegExp(`\\b(\\w+)\\.addMetric\\(\\s*'${metric}'`).exec(code);
  if (further.length > 0) {
    return single !== null && emitted?.[1] === single[1] && further.join() === single[2];
  }
  // By a table of names and values, or one by one on what has no dimensions of its own.
  return emitted ? emitted[1] === 'metrics' : new RegExp(`^ +${metric}: `, 'm').test(code);
}

const firstId = (type: string) => {
  const [id] = Object.entries(packaged.Resources).find(([, { Type }]) => Type === type) ?? [];
  if (id === undefined) throw new Error(`The template has no ${type}.`);
  return id;
};

/** The environment of the function whose name ends so. */
function variablesOf(name: string): Record<string, string> {
  const found = Object.values(packaged.Resources).find(({ Properties }) =>
    String(Properties.FunctionName).endsWith(name),
  );
  if (!found) throw new Error(`The template has no function ${name}.`);
  return (found.Properties.Environment as { Variables: Record<string, string> }).Variables;
}

describe.skipIf(!hasCfnLint)('cfn-lint', () => {
  it('has nothing to say on the template', () => {
    expect(cfnLint(packaged)).toEqual([]);
  });

  it('would find a property that there is not, and a reference to nothing', () => {
    const copy = broken('SilverBucket', (properties) => {
      Object.assign(properties, { BucketNam: 'x', Tags: [{ Key: 'a', Value: { Ref: 'Nothing' } }] });
    });
    const findings = cfnLint(copy).join('\n');
    expect(findings).toMatch(/E3002.*BucketNam/);
    expect(findings).toMatch(/E1020.*Nothing/);
  });
});

describe('asl-validator', () => {
  it('has nothing to say on the state machine', () => {
    expect(aslErrors(flow)).toBe('');
  });

  it('would find a state that leads nowhere, and one that nothing leads to', () => {
    expect(aslErrors(brokenState('Plan run', (state) => Object.assign(state, { Next: 'Nowhere' })))).toMatch(
      /MISSING_TRANSITION_TARGET.*Nowhere/,
    );
    expect(aslErrors({ ...flow, StartAt: 'Nothing' })).not.toBe('');
  });
});

describe('least privilege', () => {
  it('names for every role certain actions on certain things, and gives each function its own', () => {
    expect(leastPrivilege(packaged)).toEqual([]);
  });

  it.each<[string, string, Partial<Statement>, RegExp]>([
    ['all actions', 'ReadSlides', { Action: '*' }, /action \* is a pattern/],
    [
      'all actions of a service',
      'ReadSlides',
      { Action: ['s3:GetObject', 's3:*'] },
      /action s3:\* is a pattern/,
    ],
    ['everything', 'ReadSlides', { Resource: '*' }, /resource \* is everything/],
    ['every bucket', 'ReadSlides', { Resource: 'arn:aws:s3:::*' }, /names nothing of its kind/],
    [
      'every table',
      'ReadSlides',
      // biome-ignore lint/suspicious/noTemplateCurlyInString: CloudFormation's own syntax
      { Resource: { 'Fn::Sub': 'arn:${AWS::Partition}:dynamodb:${AWS::Region}:${AWS::AccountId}:table/*' } },
      /names nothing of its kind/,
    ],
    [
      'every account',
      'ReadSlides',
      { Resource: 'arn:aws:dynamodb:us-east-1:*:table/slideway' },
      /no region or account/,
    ],
    [
      'more than the token of the registry',
      'LogInToRegistry',
      { Action: 'ecr:BatchGetImage' },
      /is everything/,
    ],
    ['all but some', 'ReadSlides', { NotAction: 's3:DeleteObject' } as never, /all but some/],
  ])('would find a right to %s', (_, sid, change, finding) => {
    const copy = withStatement('JobRole', sid, (statement) => Object.assign(statement, change));
    expect(leastPrivilege(copy)).toEqual([expect.stringMatching(finding)]);
  });

  it('would find a role passed to any service, a managed policy, a foreign account, a shared role', () => {
    expect(
      leastPrivilege(
        withStatement('SlideRunRole', 'PassJobRole', (statement) => {
          delete statement.Condition;
        }),
      ),
    ).toEqual([expect.stringContaining('without iam:PassedToService')]);
    expect(
      leastPrivilege(
        broken('JobRole', (properties) => {
          Object.assign(properties, {
            ManagedPolicyArns: ['arn:aws:iam::aws:policy/AmazonSageMakerFullAccess'],
          });
        }),
      ),
    ).toEqual([expect.stringContaining('managed policies')]);
    expect(
      leastPrivilege(
        broken<{ AssumeRolePolicyDocument: Policy }>('JobRole', ({ AssumeRolePolicyDocument: document }) => {
          const [statement] = document.Statement;
          Object.assign(statement ?? {}, { Principal: { AWS: '123456789012' } });
        }),
      ),
    ).toEqual([expect.stringContaining('others than a service')]);
    const [one = '', two = ''] = Object.keys(packaged.Resources).filter(
      (id) => packaged.Resources[id]?.Type === 'AWS::Lambda::Function',
    );
    expect(
      leastPrivilege(
        broken(one, (properties) => {
          Object.assign(properties, { Role: packaged.Resources[two]?.Properties.Role });
        }),
      ),
    ).toEqual([expect.stringContaining(`${one} and ${two}`)]);
  });

  it.each(['JobRole', 'TransformRole'])('leaves SageMaker enough around the container, in %s', (role) => {
    expect(jobRights(packaged)).toEqual([]);
    const silent = withStatement(role, 'MeasureInstances', (statement) => {
      statement.Effect = 'Deny';
    });
    expect(jobRights(silent)).toEqual([`${role}: lacks cloudwatch:PutMetricData`]);
    const wide = withStatement(role, 'MeasureInstances', (statement) => {
      statement.Condition = { StringEquals: { 'aws:SourceAccount': '1' } };
    });
    expect(leastPrivilege(wide)).toEqual([expect.stringContaining('without a namespace')]);
  });

  it('leaves the state machine enough to call its functions and run its jobs', () => {
    expect(machineRights(packaged, flow)).toEqual([]);
  });

  const processing = ['Join predictions', 'Run job', 'Tile slides'];
  it.each([
    ['RunJobs', 'sagemaker:AddTags', processing],
    ['RunJobs', 'sagemaker:StopProcessingJob', processing],
    ['RunTransformJobs', 'sagemaker:ListTags', ['Run transform job']],
    ['RunTransformJobs', 'sagemaker:StopTransformJob', ['Run transform job', 'Stop transform job']],
    ['MakeModels', 'sagemaker:AddTags', ['Create model']],
    ['MakeModels', 'sagemaker:DeleteModel', ['Delete model']],
    ['PassJobRole', 'iam:PassRole', ['Create model', ...processing]],
    ['HearOfJobs', 'events:PutRule', ['Run transform job', ...processing]],
  ])('would find that in %s %s is lacking', (sid, action, names) => {
    const copy = withStatement('SlideRunRole', sid, (statement) => {
      statement.Action = [statement.Action].flat().filter((allowed) => allowed !== action);
    });
    expect(machineRights(copy, flow).sort()).toEqual(names.map((name) => `${name}: lacks ${action}`).sort());
  });

  it('would find a right to hear of jobs, or to pass a role, that is for the other kind of job only', () => {
    for (const [sid, name] of [
      ['HearOfJobs', 'Run transform job'],
      ['PassJobRole', 'Create model'],
    ] as const) {
      const copy = withStatement('SlideRunRole', sid, (statement) => {
        statement.Resource = [(statement.Resource as unknown[])[0]];
      });
      expect(machineRights(copy, flow).join()).toMatch(new RegExp(`${name}: lacks`));
    }
  });

  it('would find a function that the state machine may not invoke', () => {
    const copy = withStatement('SlideRunRole', 'RunFunctions', (statement) => {
      statement.Resource = (statement.Resource as unknown[]).slice(1);
    });
    expect(machineRights(copy, flow)).not.toEqual([]);
  });
});

describe('what is kept', () => {
  it('lies in buckets that are encrypted, versioned, closed to the public and reached over TLS only', () => {
    expect(buckets(packaged)).toEqual([]);
  });

  it('would find a bucket without any of these', () => {
    const without = (name: string) =>
      buckets(
        broken('SilverBucket', (properties) => {
          delete properties[name];
        }),
      );
    expect(without('BucketEncryption')).toEqual(['SilverBucket: is not encrypted']);
    expect(without('VersioningConfiguration')).toEqual(['SilverBucket: keeps no versions']);
    expect(without('PublicAccessBlockConfiguration')).toHaveLength(4);
  });

  it.each<[string, (statement: Statement) => void]>([
    ['none', (statement) => Object.assign(statement, { Effect: 'Allow' })],
    [
      'one on the bucket alone',
      (statement) => Object.assign(statement, { Resource: [[statement.Resource].flat()[0]] }),
    ],
    ['one without the condition', (statement) => Object.assign(statement, { Condition: {} })],
    ['one on reading alone', (statement) => Object.assign(statement, { Action: 's3:GetObject' })],
  ])('would find a policy that is not TLS-only: %s', (_, change) => {
    const copy = broken<{ PolicyDocument: Policy }>('SilverBucketPolicy', ({ PolicyDocument: document }) => {
      const [statement] = document.Statement;
      if (statement) change(statement);
    });
    expect(buckets(copy)).toEqual(['SilverBucket: may be reached without TLS']);
  });

  it('expires where it can be made again: tiles, and what Transform jobs exchange; nothing else does', () => {
    interface Rule {
      Prefix?: string;
      ExpirationInDays?: number;
    }
    const expiring = Object.entries(packaged.Resources).flatMap(([id, { Type, Properties }]) => {
      if (Type !== 'AWS::S3::Bucket') return [];
      const { Rules = [] } = (Properties.LifecycleConfiguration ?? {}) as { Rules?: Rule[] };
      return Rules.filter(({ ExpirationInDays }) => ExpirationInDays !== undefined).map(
        ({ Prefix, ExpirationInDays }) => [id, Prefix, ExpirationInDays],
      );
    });
    const keepDays = Number(variablesOf('-plan-inference').TILES_KEEP_DAYS);
    expect(expiring).toEqual([
      ['SilverBucket', 'tiles/', keepDays],
      ['SilverBucket', 'transform/', keepDays],
    ]);
    // The tiler makes a tileset anew two days before it expires.
    expect(keepDays).toBeGreaterThan(2);
  });

  it('lies in tables, topics and repositories that are encrypted, and can be put back', () => {
    expect(stores(packaged)).toEqual([]);
  });

  it.skipIf(!hasCurrentServiceModel).each([
    ['StateTable', 'SSESpecification'],
    ['LineageTable', 'PointInTimeRecoverySpecification'],
    ['RunsTopic', 'KmsMasterKeyId'],
    ['SlideInferenceRepository', 'ImageTagMutability'],
  ])('would find %s without %s', (id, name) => {
    const copy = broken(id, (properties) => {
      delete properties[name];
    });
    expect(stores(copy)).toEqual([expect.stringContaining(id)]);
  });

  it('is, where it is the record, only added to, and anchored under lock', () => {
    expect(record(packaged)).toEqual([]);
    const more = (action: string) =>
      withStatement('AnchorLineageRole', 'WriteAnchors', (statement) => {
        statement.Action = [statement.Action, action].flat();
      });
    expect(record(more('s3:BypassGovernanceRetention'))).toEqual([expect.stringContaining('more than add')]);
    expect(
      record(
        withStatement('RecordJobRole', 'AddToLineage', (statement) => {
          statement.Action = ['dynamodb:PutItem', 'dynamodb:UpdateItem'];
        }),
      ),
    ).toEqual([expect.stringContaining('dynamodb:UpdateItem does more than add')]);
    for (const name of ['ObjectLockEnabled', 'ObjectLockConfiguration']) {
      const unlocked = broken('AnchorsBucket', (properties) => {
        delete properties[name];
      });
      expect(record(unlocked)).toEqual([expect.stringContaining('not locked')]);
    }
  });

  it('includes logs, for a time that is said', () => {
    expect(logGroups(packaged)).toEqual([]);
    const id = firstId('AWS::Logs::LogGroup');
    const forEver = broken(id, (properties) => {
      delete properties.RetentionInDays;
    });
    expect(logGroups(forEver)).toEqual([`${id}: keeps its lines for ever`]);
    const elsewhere = broken(id, (properties) => {
      Object.assign(properties, { LogGroupName: '/elsewhere' });
    });
    expect(logGroups(elsewhere)).toEqual([expect.stringContaining('has no log group of its own')]);
  });
});

describe('every asynchronous edge', () => {
  it('has a queue for what nobody takes, encrypted, kept for 14 days and watched', () => {
    expect(deadLetters(packaged)).toEqual([]);
  });

  it.each<[string, string, (properties: Record<string, unknown>) => void, RegExp]>([
    [
      'a target without one',
      'ManifestArrived',
      ({ Targets }) => delete (Targets as Record<string, unknown>[])[0]?.DeadLetterConfig,
      /slide-run: has no dead-letter queue/,
    ],
    [
      'a function without a destination',
      'SweepInvocations',
      (properties) => delete properties.DestinationConfig,
      /has no destination for what it fails/,
    ],
    [
      'a queue that EventBridge may not use',
      'DeadEventsPolicy',
      ({ PolicyDocument: document }) => (document as Policy).Statement.shift(),
      /EventBridge may not send/,
    ],
    ['a queue in the clear', 'DeadEvents', (queue) => delete queue.SqsManagedSseEnabled, /is not encrypted/],
    ['a queue that forgets', 'DeadEvents', (queue) => delete queue.MessageRetentionPeriod, /14 days/],
    [
      'a queue that nobody watches',
      'InvocationsDead',
      (alarm) => Object.assign(alarm, { MetricName: 'NumberOfMessagesSent' }),
      /DeadInvocations: no alarm rings/,
    ],
  ])('would be found to be %s', (_, id, change, finding) => {
    expect(deadLetters(broken(id, change)).join('\n')).toMatch(finding);
  });

  it('would be found to be a function that may not send to its destination', () => {
    const copy = withStatement('SweepRole', 'SendDeadInvocations', (statement) => {
      statement.Action = 'sqs:ReceiveMessage';
    });
    expect(deadLetters(copy)).toEqual([expect.stringMatching(/may not send to its destination/)]);
  });
});

describe('alarms and dashboard', () => {
  it('ask for metrics that are emitted, by the dimensions they are emitted by, and watch every function', () => {
    expect(askedMetrics(packaged).length).toBeGreaterThan(30);
    expect(metrics(packaged, emits)).toEqual([]);
  });

  it.each<[string, string, Record<string, unknown>, RegExp]>([
    ['that no function emits', 'FailedRuns', { MetricName: 'RunsLost' }, /publish-run does not emit it so/],
    [
      'by a dimension too many',
      'StuckSlides',
      {
        Dimensions: [
          { Name: 'service', Value: 'sweep' },
          { Name: 'stage', Value: 'dev' },
          { Name: 'state', Value: 'COPYING' },
        ],
      },
      /sweep does not emit it so/,
    ],
    ['of AWS that there is not', 'EventsDead', { MetricName: 'Messages' }, /AWS does not emit it/],
    [
      'of a function that there is not',
      'ErrorsOfSweep',
      { Dimensions: [{ Name: 'FunctionName', Value: 'gone' }] },
      /there is no gone/,
    ],
    ['without anybody to hear', 'StaleManifests', { AlarmActions: [] }, /rings nobody/],
  ])('would be found to be on a metric %s', (_, id, change, finding) => {
    const copy = broken(id, (properties) => Object.assign(properties, change));
    expect(metrics(copy, emits).join('\n')).toMatch(finding);
  });
});

describe('every function', () => {
  it('runs on Node 24, on Arm', () => {
    expect(functions(packaged)).toEqual([]);
    const id = firstId('AWS::Lambda::Function');
    const older = broken(id, (properties) => {
      Object.assign(properties, { Runtime: 'nodejs20.x', Architectures: ['x86_64'] });
    });
    expect(functions(older)).toEqual([`${id}: runs on nodejs20.x`, `${id}: does not run on arm64`]);
  });
});

describe('every task of the state machine', () => {
  it('has a limit, retries what may pass, and is caught', () => {
    expect(tasks(flow)).toEqual([]);
  });

  it.each<[string, string, (state: State) => void]>([
    ['a limit', 'has no TimeoutSeconds', (state) => delete state.TimeoutSeconds],
    ['retries', 'has no Retry', (state) => delete state.Retry],
    ['something that catches', 'nothing catches its failures', (state) => delete state.Catch],
    [
      'something that catches all',
      'nothing catches its failures',
      (state) => {
        state.Catch = [{ ErrorEquals: ['Throttled'] }];
      },
    ],
    [
      'thought on what it retries',
      'retries whatever it was',
      (state) => {
        state.Retry = [{ ErrorEquals: ['States.ALL'] }];
      },
    ],
  ])('would be found without %s', (_, finding, change) => {
    expect(tasks(brokenState('Plan run', change))).toEqual([`Plan run: ${finding}`]);
  });

  it('within a Map is caught there, unless the Map tolerates what its children fail', () => {
    const inner = 'Fail slide';
    expect([...states(flow)].find(({ name }) => name === inner)?.around).toHaveLength(1);
    const strict = brokenState('Ingest slides', (state) => delete state.ToleratedFailurePercentage);
    expect(tasks(strict)).toEqual([`${inner}: nothing catches its failures`]);
    const open = brokenState('Record failed plan', (state) => delete state.Catch);
    expect(tasks(open)).toEqual(['Record failed plan: nothing catches its failures']);
    const copy = brokenState('Ingest slides', (state) => delete state.Catch);
    expect(tasks(copy)).toEqual(['Ingest slides: nothing catches its failures']);
  });

  it('of an Express child ends before its execution does', () => {
    const copy = brokenState('Aggregate slide', (state) => {
      state.TimeoutSeconds = 301;
    });
    expect(tasks(copy)).toEqual(['Aggregate slide: may take longer than an Express execution']);
  });

  it('that runs a job limits it, waits for the quota, and encrypts what its instances say', () => {
    expect([...sagemakerTasks(flow)].length).toBeGreaterThan(0);
    expect(jobs(flow)).toEqual([]);
    const copy = brokenState('Run job', (state) => {
      state.Retry = [];
      delete state.Parameters?.StoppingCondition;
      delete state.Parameters?.NetworkConfig;
      delete state.Parameters?.Environment;
    });
    expect(jobs(copy)).toHaveLength(5);
    const transform = brokenState('Run transform job', (state) => {
      state.Retry = [];
      state.Catch = [{ ErrorEquals: ['States.ALL'] }];
      delete state.Parameters?.['MaxPayloadInMB.$'];
      delete state.Parameters?.Environment;
    });
    expect(jobs(transform)).toHaveLength(5);
    const open = brokenState('Create model', (state) => {
      Object.assign(state.Parameters ?? {}, { EnableNetworkIsolation: false });
    });
    expect(jobs(open)).toEqual(['Create model: its server has a network']);
  });
});

describe('every SageMaker call', () => {
  const folder = mkdtempSync(join(tmpdir(), 'calls-'));
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  /** The request that the state makes of its input, as the interpreter of the local AWS renders it. */
  async function rendered({ name, state }: Placed, input: unknown): Promise<Record<string, unknown>> {
    const { Type, Resource, Parameters } = state;
    const alone = { StartAt: name, States: { [name]: { Type, Resource, Parameters, End: true } } };
    let request: Record<string, unknown> = {};
    const machine = new StateMachine(alone as never, { validationOptions: { noValidate: true } });
    await machine.run(input as never, {
      overrides: {
        taskResourceLocalHandlers: {
          [name]: async (given) => {
            request = given as Record<string, unknown>;
            return {};
          },
        },
      },
    }).result;
    return request;
  }

  /** What the local SageMaker keeps of the request when it takes it; the job itself is not to run. */
  async function recorded(request: Record<string, unknown>): Promise<Record<string, unknown>> {
    const sagemaker = new SageMaker({
      folder: join(folder, 'jobs'),
      endpoint: () => 'http://127.0.0.1:9',
      credentials: () => ({ accessKeyId: 'none', secretAccessKey: 'none' }),
      logs: new Logs({ folder: join(folder, 'logs') }),
      containers: () => ({ folder }),
      python: projectPython(),
      executor: 'process',
      faults: () => ({ failureReason: 'CapacityError' }),
    });
    const caller = { arn: 'test', authorize: () => undefined };
    await sagemaker.operations.CreateProcessingJob?.(request as never, caller);
    const path = join(folder, 'jobs', String(request.ProcessingJobName), 'job.json');
    return JSON.parse(readFileSync(path, 'utf8')).request;
  }

  /** A job as PlanInference makes them, with the stage's own figures and the longest name. */
  function job(mode: Mode): InferenceJob {
    const Variables = variablesOf('-plan-inference');
    return {
      model: 'haematoxylin-area',
      version: '1.0.0',
      mode,
      begin: mode === 'transform' ? 'tile' : 'process',
      jobName: jobNameOf(Variables.JOB_PREFIX ?? '', '0123456789abcdef', 'm'.repeat(63), mode),
      shardsUri: 's3://silver/runs/0123456789abcdef/jobs/haematoxylin-area/',
      modelUri: 's3://models/models/haematoxylin-area/1.0.0/model.tar.gz',
      slides: 3,
      instanceCount: Number(Variables.MAX_INSTANCES),
      instanceType: String(Variables.INSTANCE_TYPE),
      volumeSizeInGB: Number(Variables.VOLUME_SIZE_IN_GB),
      maxRuntimeInSeconds: Number(Variables.MAX_RUNTIME_IN_SECONDS),
      modelSeconds: Number(Variables.MODEL_SECONDS),
      join: {
        instanceCount: Number(Variables.JOIN_MAX_INSTANCES),
        instanceType: String(Variables.JOIN_INSTANCE_TYPE),
        volumeSizeInGB: Number(Variables.JOIN_VOLUME_SIZE_IN_GB),
      },
    };
  }

  /** The request of a state that calls SageMaker. */
  async function call(task: Placed & { operation: string }) {
    const input = {
      run: { runId: '0123456789abcdef' },
      job: job(task.name === 'Run job' ? 'processing' : 'transform'),
      step: { attempt: 25 },
      transform: {
        manifestUri: 's3://silver/transform/r/m/attempt-1/manifest.json',
        outputUri: 's3://silver/transform/r/m/out/',
        instanceType: 'ml.g5.xlarge',
        instanceCount: 2,
        maxConcurrentTransforms: 7,
        maxPayloadInMB: 13,
        invocationTimeoutSeconds: 600,
        requestSeconds: 590,
      },
    };
    return { service: 'sagemaker', operation: task.operation, request: await rendered(task, input) };
  }
  const runJob = () => {
    const task = [...sagemakerTasks(flow)].find(({ name }) => name === 'Run job');
    if (!task) throw new Error('The definition has no state Run job.');
    return call(task);
  };

  it('tells the container how long the model may take for a batch, as text', async () => {
    const { request } = await runJob();
    expect(request.Environment).toMatchObject({ SLIDEWAY_MODEL_SECONDS: '590' });
  });

  it.skipIf(!hasCurrentServiceModel)('is a request that AWS’s service model takes', async () => {
    const requests = await Promise.all([...sagemakerTasks(flow)].map(call));
    expect(new Set(requests.map(({ operation }) => operation))).toEqual(
      new Set([
        'createProcessingJob',
        'createModel',
        'createTransformJob',
        'stopTransformJob',
        'deleteModel',
      ]),
    );
    expect(serviceModelFindings(requests)).toEqual([]);
    for (const { request, operation, service } of requests)
      if (operation === 'createProcessingJob')
        expect(serviceModelFindings([{ service, operation, request: await recorded(request) }])).toEqual([]);
  });

  const cluster = (request: Record<string, unknown>, change: object) =>
    Object.assign((request.ProcessingResources as { ClusterConfig: object }).ClusterConfig, change);

  it.each<[string, (request: Record<string, unknown>) => void, RegExp]>([
    ['with a member that there is not', (request) => Object.assign(request, { JobName: 'x' }), /JobName/],
    ['without a member that is required', (request) => delete request.RoleArn, /RoleArn/],
    [
      'with a name of wrong characters',
      (request) => Object.assign(request, { ProcessingJobName: 'a_b' }),
      /'a_b' does not match/,
    ],
    [
      'with a name that is too long',
      (request) => Object.assign(request, { ProcessingJobName: 'a'.repeat(64) }),
      /length 64 is above 63/,
    ],
    [
      'with an instance type that there is not',
      (request) => cluster(request, { InstanceType: 'ml.p4d.24xlarge' }),
      /ml\.p4d\.24xlarge.*values/,
    ],
    ['with text for a number', (request) => cluster(request, { VolumeSizeInGB: '30' }), /VolumeSizeInGB/],
    [
      'with a run that is too long',
      (request) => Object.assign(request, { StoppingCondition: { MaxRuntimeInSeconds: 777_601 } }),
      /777601 is above 777600/,
    ],
  ])('would be found %s', async (_, change, finding) => {
    const { request, ...rest } = await runJob();
    change(request);
    expect(serviceModelFindings([{ ...rest, request }]).join('\n')).toMatch(finding);
  });

  it('would be found to be of no operation', () => {
    expect(
      serviceModelFindings([{ service: 'sagemaker', operation: 'createSlideJob', request: {} }]),
    ).toEqual(['sagemaker:CreateSlideJob: there is no such operation']);
  });
});
