import { existsSync, readdirSync } from 'node:fs';
import { enableCompileCache } from 'node:module';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { type FunctionDefinition, Lambda } from '../../local/lambda/service.ts';
import { iamWith, temporaryFolder, until, zip } from './kit.ts';

const ROLE = 'arn:aws:iam::000000000000:role/worker';
const CALLER = 'arn:aws:iam::000000000000:role/caller';
const arnOf = (name: string) => `arn:aws:lambda:us-east-1:000000000000:function:${name}`;

const iam = iamWith({
  worker: [],
  caller: [{ Effect: 'Allow', Action: 'lambda:InvokeFunction', Resource: arnOf('echo') }],
});
const folder = temporaryFolder();
const logged: { group: string; stream: string; line: string }[] = [];
const lambda = new Lambda({
  folder: join(folder, 'lambda'),
  endpoint: () => 'http://127.0.0.1:1',
  credentials: (arn) => iam.credentials(arn),
  log: (group, stream, lines) => logged.push(...lines.map((line) => ({ group, stream, line }))),
});
afterAll(() => lambda.close());

/** Creates a function from the source of its one module. */
async function create(
  name: string,
  source: string,
  more: Partial<FunctionDefinition> & { file?: string } = {},
) {
  const { file = 'functions/f/handler.mjs', ...rest } = more;
  await lambda.createFunction({
    name,
    roleArn: ROLE,
    zip: zip(join(folder, `${name}.zip`), { [file]: source }),
    handler: 'functions/f/handler.handler',
    runtime: `nodejs${process.versions.node.split('.')[0]}.x`,
    timeout: 20,
    memorySize: 128,
    environment: {},
    ...rest,
  });
  return (payload?: unknown) => lambda.invoke(arnOf(name), payload);
}
const linesOf = (name: string) =>
  logged.filter(({ group }) => group === `/aws/lambda/${name}`).map(({ line }) => line);

describe('a function', () => {
  it('gets the event, its context and its own environment, and nothing of ours', async () => {
    process.env.SECRET_OF_THE_ENGINE = 'hidden';
    enableCompileCache(join(folder, 'compiled'));
    const invoke = await create(
      'echo',
      `export const handler = async (event, context) => ({
        event,
        context: { ...context, remaining: context.getRemainingTimeInMillis() },
        env: process.env,
      });`,
      { environment: { TABLE: 'state', POWERTOOLS_SERVICE_NAME: 'echo' } },
    );
    const answer = (await invoke({ a: [1, 'ü'] })) as Record<string, Record<string, string>>;
    expect(answer).toMatchObject({
      event: { a: [1, 'ü'] },
      context: {
        functionName: 'echo',
        functionVersion: '$LATEST',
        invokedFunctionArn: arnOf('echo'),
        memoryLimitInMB: '128',
        logGroupName: '/aws/lambda/echo',
        awsRequestId: expect.stringMatching(/^[0-9a-f-]{36}$/),
      },
    });
    expect(Number(answer.context?.remaining)).toBeGreaterThan(18_000);
    expect(answer.env).toMatchObject({
      TABLE: 'state',
      POWERTOOLS_SERVICE_NAME: 'echo',
      AWS_REGION: 'us-east-1',
      AWS_ENDPOINT_URL: 'http://127.0.0.1:1',
      AWS_ACCESS_KEY_ID: iam.credentials(ROLE).accessKeyId,
      AWS_LAMBDA_FUNCTION_NAME: 'echo',
      AWS_LAMBDA_FUNCTION_MEMORY_SIZE: '128',
      _HANDLER: 'functions/f/handler.handler',
    });
    expect(answer.env).not.toHaveProperty('SECRET_OF_THE_ENGINE');
    expect(answer.env).not.toHaveProperty('PATH');
    expect(answer.env).not.toHaveProperty('NODE_COMPILE_CACHE');
  });

  it('may be CommonJS, and may answer nothing', async () => {
    const invoke = await create('common', 'exports.handler = async () => {};', {
      file: 'functions/f/handler.js',
    });
    expect(await invoke({})).toBeNull();
  });

  it('finds the SDK that Lambda’s runtime brings', async () => {
    const invoke = await create(
      'sdk',
      `import { S3Client } from '@aws-sdk/client-s3';
       export const handler = async () => new S3Client({}).config.region();`,
    );
    expect(await invoke({})).toBe('us-east-1');
  });

  it('stays warm, and is not shared by two invocations at once', async () => {
    const invoke = await create(
      'warm',
      `let served = 0; let running = 0;
       export const handler = async ({ ms }) => {
         running += 1;
         const together = running;
         await new Promise((resolve) => setTimeout(resolve, ms));
         running -= 1;
         return { served: ++served, together };
       };`,
      { concurrency: 2 },
    );
    expect(await invoke({ ms: 0 })).toEqual({ served: 1, together: 1 });
    expect(await invoke({ ms: 0 })).toEqual({ served: 2, together: 1 });
    const many = (await Promise.all(Array.from({ length: 6 }, () => invoke({ ms: 20 })))) as {
      together: number;
    }[];
    expect(many.every(({ together }) => together === 1)).toBe(true);
    const streams = new Set(
      logged.filter(({ group }) => group === '/aws/lambda/warm').map(({ stream }) => stream),
    );
    expect(streams.size).toBe(2);
  });

  it('is unpacked once per content, and replaced by a new bundle', async () => {
    const first = await create('versioned', 'export const handler = async () => 1;');
    expect(await first({})).toBe(1);
    const before = readdirSync(join(folder, 'lambda')).length;
    await create('versioned', 'export const handler = async () => 1;');
    expect(readdirSync(join(folder, 'lambda'))).toHaveLength(before);
    const second = await create('versioned', 'export const handler = async () => 2;');
    expect(await second({})).toBe(2);
  });

  it('is invoked only by roles that may', async () => {
    await create('private', 'export const handler = async () => 1;');
    const caller = iam.caller(CALLER);
    expect(await lambda.invoke(arnOf('echo'), {}, caller)).toBeDefined();
    await expect(lambda.invoke(arnOf('private'), {}, caller)).rejects.toMatchObject({
      code: 'AccessDenied',
      message: expect.stringContaining(`lambda:InvokeFunction on resource: ${arnOf('private')}`),
    });
    await expect(lambda.invoke(arnOf('gone'), {})).rejects.toMatchObject({
      code: 'ResourceNotFoundException',
    });
  });
});

describe('what a function prints', () => {
  it('is logged line by line, between start and end of its invocation', async () => {
    const invoke = await create(
      'printer',
      `export const handler = async () => {
         console.log('one');
         console.log(JSON.stringify({ _aws: { CloudWatchMetrics: [] } }));
         process.stdout.write('par');
         process.stdout.write('tial');
       };`,
    );
    await invoke({});
    expect(linesOf('printer')).toEqual([
      expect.stringMatching(/^START RequestId: \S+ Version: \$LATEST$/),
      'one',
      '{"_aws":{"CloudWatchMetrics":[]}}',
      'partial',
      expect.stringMatching(/^END RequestId: /),
      expect.stringMatching(/^REPORT RequestId: .*Duration: \d+ ms.*Memory Size: 128 MB$/),
    ]);
  });
});

describe('a function that fails', () => {
  it('by an error of its own comes back with type, message and trace', async () => {
    const invoke = await create(
      'thrower',
      `class ManifestEmpty extends Error { constructor(m) { super(m); this.name = 'ManifestEmpty'; } }
       export const handler = async ({ text }) => { throw text ?? new ManifestEmpty('no rows'); };`,
    );
    await expect(invoke({})).rejects.toMatchObject({
      name: 'ManifestEmpty',
      message: 'no rows',
      payload: {
        errorType: 'ManifestEmpty',
        errorMessage: 'no rows',
        trace: expect.arrayContaining([expect.stringContaining('handler.mjs')]),
      },
    });
    await expect(invoke({ text: 'plain' })).rejects.toMatchObject({ name: 'string', message: 'plain' });
    expect(await Promise.allSettled([invoke({})])).toMatchObject([{ status: 'rejected' }]);
  });

  it('by its time limit is Sandbox.Timedout, and the next invocation is served anew', async () => {
    const invoke = await create(
      'slow',
      'export const handler = async ({ loop }) => { while (loop); return 1; };',
      { timeout: 1 },
    );
    await expect(invoke({ loop: true })).rejects.toMatchObject({
      name: 'Sandbox.Timedout',
      message: expect.stringMatching(/^RequestId: \S+ Error: Task timed out after 1\.00 seconds$/),
    });
    expect(await invoke({})).toBe(1);
  });

  it('by its memory is Runtime.OutOfMemory, and takes nobody with it', async () => {
    const invoke = await create(
      'hungry',
      `export const handler = async ({ eat }) => {
         const kept = [];
         while (eat) kept.push(Array.from({ length: 10_000 }, (_, n) => ({ n })));
         return 'fed';
       };`,
    );
    await expect(invoke({ eat: true })).rejects.toMatchObject({ name: 'Runtime.OutOfMemory' });
    expect(await invoke({})).toBe('fed');
  });

  it.each([
    ['process.exit', 'process.exit(3)', 'exit status 3'],
    [
      'an error that nobody catches',
      'setTimeout(() => { throw new Error("late"); }, 0); await new Promise(() => {})',
      'late',
    ],
    [
      'a rejection that nobody handles',
      'Promise.reject(new Error("lost")); await new Promise(() => {})',
      'lost',
    ],
  ])('by %s is Runtime.ExitError', async (_, statement, why) => {
    const invoke = await create('crash', `export const handler = async () => { ${statement}; };`);
    await expect(invoke({})).rejects.toMatchObject({
      name: 'Runtime.ExitError',
      message: expect.stringContaining(why),
    });
  });

  it.each([
    [
      'a module that is not there',
      "import 'left-pad-of-nowhere'; export const handler = async () => 1;",
      {},
      'Runtime.ImportModuleError',
    ],
    ['a syntax error', 'export const handler = async () => {', {}, 'Runtime.UserCodeSyntaxError'],
    ['no such export', 'export const other = 1;', {}, 'Runtime.HandlerNotFound'],
    ['no such file', '', { handler: 'functions/g/handler.handler' }, 'Runtime.ImportModuleError'],
    ['no such form', '', { handler: 'handler' }, 'Runtime.MalformedHandlerName'],
    ['a callback', 'export const handler = (a, b, c) => c();', {}, 'Runtime.CallbackHandlerDeprecated'],
    ['an error while loading', 'throw new RangeError("at load")', {}, 'RangeError'],
  ])('by %s says so', async (_, source, more, name) => {
    const invoke = await create('broken', source, more);
    await expect(invoke({})).rejects.toMatchObject({ name });
  });

  it('by its size, in and out', async () => {
    const invoke = await create('big', `export const handler = async ({ n }) => 'x'.repeat(n);`);
    await expect(invoke({ n: 0, pad: 'x'.repeat(6 * 1024 * 1024) })).rejects.toMatchObject({
      name: 'RequestTooLargeException',
    });
    await expect(invoke({ n: 6 * 1024 * 1024 })).rejects.toMatchObject({
      name: 'Function.ResponseSizeTooLarge',
    });
  });
});

it('a runtime that is not this Node is refused', async () => {
  await expect(create('old', '', { runtime: 'nodejs20.x' })).rejects.toMatchObject({
    name: 'UnsupportedLocally',
    message: expect.stringContaining('nodejs20.x'),
  });
});

it('a bundle cannot write outside its folder', async () => {
  await expect(create('evil', 'x', { file: '../../evil.txt' })).rejects.toThrow();
  expect(existsSync(join(folder, 'evil.txt'))).toBe(false);
});

it('closing ends what runs', async () => {
  const own = new Lambda({
    folder: join(folder, 'own'),
    endpoint: () => '',
    credentials: (arn) => iam.credentials(arn),
    log: () => {},
  });
  await own.createFunction({
    name: 'forever',
    roleArn: ROLE,
    zip: zip(join(folder, 'forever.zip'), {
      'h.mjs': 'export const handler = () => new Promise(() => setInterval(() => {}, 9));',
    }),
    handler: 'h.handler',
    runtime: 'nodejs24.x',
    timeout: 60,
    memorySize: 128,
    environment: {},
  });
  const running = Promise.allSettled([own.invoke('forever', {})]);
  await until(() => true);
  await own.close();
  expect(await running).toMatchObject([{ reason: { name: 'Runtime.ExitError' } }]);
});
