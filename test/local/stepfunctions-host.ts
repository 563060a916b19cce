/**
 * Step Functions with what it calls, for its tests: the gateway, the local S3, functions given by name, and jobs
 * that end as the test says. Run as a program it is an engine that kills itself where it is told to:
 *
 *   node test/local/stepfunctions-host.ts <JSON of ProgramOptions>
 */
import { appendFileSync, existsSync, mkdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { S3Client } from '@aws-sdk/client-s3';
import {
  DescribeExecutionCommand,
  paginateGetExecutionHistory,
  SFNClient,
  StartExecutionCommand,
} from '@aws-sdk/client-sfn';
import { Gateway } from '../../local/gateway.ts';
import { S3Service } from '../../local/s3/service.ts';
import { StepFunctions } from '../../local/stepfunctions/service.ts';
import { type Caller, type JsonService, ServiceError } from '../../local/types.ts';

export const ROLE = 'arn:aws:iam::000000000000:role/slide-run';
const PERSON = 'arn:aws:iam::000000000000:root';
export const machineArn = (name: string) => `arn:aws:states:us-east-1:000000000000:stateMachine:${name}`;
export const functionArn = (name: string) => `arn:aws:lambda:us-east-1:000000000000:function:${name}`;

type Payload = Record<string, unknown>;
export type Functions = Record<string, (payload: never) => unknown>;

/** What a test says of a job when it is described: how it ended, or that it runs. */
export type JobOutcome = 'InProgress' | 'Completed' | { FailureReason: string };

/** Processing jobs by name; what was created stays on disk, as with the real service. */
class Jobs implements JsonService {
  readonly #file: string;
  readonly #outcome: (name: string, ageMs: number) => JobOutcome;
  readonly requests: Payload[] = [];
  readonly stopped: string[] = [];
  /** The next creation fails with this. */
  refusal: ServiceError | undefined;

  constructor(folder: string, outcome: (name: string, ageMs: number) => JobOutcome) {
    this.#file = join(folder, 'jobs.jsonl');
    this.#outcome = outcome;
  }

  created(): { name: string; at: number }[] {
    if (!existsSync(this.#file)) return [];
    return readFileSync(this.#file, 'utf8')
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line) as { name: string; at: number });
  }

  #answer(operation: string, input: Payload, caller: Caller): object {
    caller.authorize(`sagemaker:${operation}`, '*');
    this.requests.push(input);
    const refusal = this.refusal;
    this.refusal = undefined;
    if (refusal) throw refusal;
    return operation === 'CreateModel' ? { ModelArn: 'arn:of-the-model' } : {};
  }

  readonly operations: JsonService['operations'] = {
    CreateProcessingJob: async (input: Payload & { ProcessingJobName: string }, caller: Caller) => {
      caller.authorize('sagemaker:CreateProcessingJob', input.ProcessingJobName);
      this.requests.push(input);
      const refusal = this.refusal;
      this.refusal = undefined;
      if (refusal) throw refusal;
      const name = input.ProcessingJobName;
      if (this.created().some((job) => job.name === name))
        throw new ServiceError('ResourceInUse', `Job ${name} exists`);
      appendFileSync(this.#file, `${JSON.stringify({ name, at: Date.now() })}\n`);
      return { ProcessingJobArn: `arn:aws:sagemaker:us-east-1:000000000000:processing-job/${name}` };
    },
    DescribeProcessingJob: async ({ ProcessingJobName: name }: { ProcessingJobName: string }) => {
      const job = this.created().find((created) => created.name === name);
      if (!job) throw new ServiceError('ValidationException', 'Could not find requested job');
      const outcome = this.stopped.includes(name) ? 'Stopped' : this.#outcome(name, Date.now() - job.at);
      const failed = typeof outcome === 'object';
      return {
        ProcessingJobName: name,
        ProcessingJobStatus: failed ? 'Failed' : outcome,
        CreationTime: job.at / 1000,
        ...(failed ? outcome : {}),
      };
    },
    CreateModel: async (input: Payload, caller: Caller) => this.#answer('CreateModel', input, caller),
    DeleteModel: async (input: Payload, caller: Caller) => this.#answer('DeleteModel', input, caller),
    StopTransformJob: async (input: Payload, caller: Caller) =>
      this.#answer('StopTransformJob', input, caller),
    StopProcessingJob: async ({ ProcessingJobName: name }: { ProcessingJobName: string }) => {
      this.stopped.push(name);
      return {};
    },
  };
}

export interface HostOptions {
  folder: string;
  functions?: Functions;
  job?: (name: string, ageMs: number) => JobOutcome;
  timeScale?: number;
  /** Told of each S3 request before it is served. */
  onS3?: (method: string, path: string) => void;
}

export async function startHost(options: HostOptions) {
  const { folder, functions = {}, job = () => 'Completed', timeScale = 1, onS3 } = options;
  mkdirSync(folder, { recursive: true });
  const denied = new Set<string>();
  /** Actions asked for, as `<principal's name> <action>`. */
  const asked: string[] = [];
  const caller = (arn: string): Caller => ({
    arn,
    authorize(action) {
      asked.push(`${arn.split('/').at(-1)} ${action}`);
      if (denied.has(action)) throw new ServiceError('AccessDenied', `${arn} may not ${action}`, 403);
    },
  });
  const s3 = new S3Service({ folder: join(folder, 's3'), onObjectCreated: async () => {} });
  const jobs = new Jobs(folder, job);
  const principals: Record<string, string> = { person: PERSON, role: ROLE };
  let gateway: Gateway | undefined;
  const stepFunctions = new StepFunctions({
    folder: join(folder, 'executions'),
    endpoint: () => gateway?.endpoint ?? '',
    credentials: () => ({ accessKeyId: 'role', secretAccessKey: 'secret' }),
    async invokeLambda(arn, payload, roleArn) {
      const name = arn.slice(functionArn('').length);
      const handler = functions[name];
      if (roleArn !== ROLE || handler === undefined) {
        throw new ServiceError('ResourceNotFoundException', `Function not found: ${arn}`, 404);
      }
      return await handler(payload as never);
    },
    timeScale,
  });
  gateway = new Gateway({
    principals: (id) => {
      const arn = principals[id];
      return arn === undefined ? undefined : { caller: caller(arn), secretAccessKey: 'secret' };
    },
    services: {
      s3: {
        protocol: 's3',
        service: {
          handle(request, response, from) {
            onS3?.(request.method ?? '', request.url ?? '');
            return s3.handle(request, response, from);
          },
        },
      },
      states: { protocol: 'json', service: stepFunctions },
      sagemaker: { protocol: 'json', service: jobs },
    },
  });
  await s3.createBucket('silver', { versioning: true, eventBridge: false });
  await s3.recover();
  await gateway.listen(0);
  const client = {
    endpoint: gateway.endpoint,
    region: 'us-east-1',
    credentials: { accessKeyId: 'person', secretAccessKey: 'secret' },
  };
  const sfn = new SFNClient(client);
  const s3Client = new S3Client({ ...client, forcePathStyle: true });
  return {
    stepFunctions,
    jobs,
    sfn,
    s3: s3Client,
    denied,
    asked,
    /** The execution as DescribeExecution tells it when it has ended. */
    async outcome(executionArn: string) {
      await stepFunctions.ended(executionArn);
      const described = await sfn.send(new DescribeExecutionCommand({ executionArn }));
      return {
        ...described,
        output: described.output === undefined ? undefined : JSON.parse(described.output),
      };
    },
    async close() {
      await stepFunctions.close();
      sfn.destroy();
      s3Client.destroy();
      await gateway?.close();
      await s3.close();
    },
  };
}
export type Host = Awaited<ReturnType<typeof startHost>>;

// --- as a program -----------------------------------------------------------------------------------------------

/** Where the program kills itself: at the n-th line of effects of a kind, a job's n-th poll, or an S3 request. */
export interface ProgramOptions {
  folder: string;
  definition: unknown;
  input: unknown;
  kill?: { effect: string; count: number } | { poll: number } | { s3: string } | { afterMs: number };
}

export const effectsFile = (folder: string) => join(folder, 'effects.txt');

async function main({ folder, definition, input, kill }: ProgramOptions): Promise<void> {
  const die = () => process.kill(process.pid, 'SIGKILL');
  const counts = new Map<string, number>();
  const effect = (kind: string, name: string) => {
    appendFileSync(effectsFile(folder), `${kind} ${name}\n`);
    const count = (counts.get(kind) ?? 0) + 1;
    counts.set(kind, count);
    if (kill && 'effect' in kill && kill.effect === kind && kill.count === count) die();
  };
  let polls = 0;
  const host = await startHost({
    folder,
    functions: {
      async work({ name }: { name: string }) {
        effect('begin', name);
        await new Promise((resolve) => setTimeout(resolve, 15));
        effect('end', name);
        return { name };
      },
    },
    job: (_, ageMs) => {
      polls += 1;
      if (kill && 'poll' in kill && kill.poll === polls) die();
      return ageMs > 300 ? 'Completed' : 'InProgress';
    },
    onS3: (method, path) => {
      if (kill && 's3' in kill && kill.s3 === method + path.replace(/.*\//, ' ').replace(/\?.*/, '')) die();
    },
    timeScale: 0.2,
  });
  if (kill && 'afterMs' in kill) {
    // Counted from the end of the map, which lies before the wait.
    const wait = setInterval(() => {
      if ((counts.get('end') ?? 0) < 13) return;
      clearInterval(wait);
      setTimeout(die, kill.afterMs);
    }, 5);
  }
  host.stepFunctions.createStateMachine({
    name: 'slide-run',
    arn: machineArn('slide-run'),
    roleArn: ROLE,
    definition,
  });
  await host.stepFunctions.recover();
  const { executionArn = '' } = await host.sfn.send(
    new StartExecutionCommand({
      stateMachineArn: machineArn('slide-run'),
      name: 'one',
      input: JSON.stringify(input),
    }),
  );
  const outcome = await host.outcome(executionArn);
  const tally = host.stepFunctions.transitions(executionArn);
  const events: Record<string, number> = {};
  for await (const page of paginateGetExecutionHistory({ client: host.sfn }, { executionArn })) {
    for (const { type = '' } of page.events ?? []) events[type] = (events[type] ?? 0) + 1;
  }
  await host.close();
  process.stdout.write(JSON.stringify({ ...outcome, tally, events }));
}

if (process.argv[1] === import.meta.filename)
  await main(JSON.parse(process.argv[2] ?? '{}') as ProgramOptions);
