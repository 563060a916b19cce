import { request as httpRequest } from 'node:http';
import { DynamoDBClient, ListTablesCommand } from '@aws-sdk/client-dynamodb';
import { GetObjectCommand, PutObjectCommand, S3Client } from '@aws-sdk/client-s3';
import { DescribeExecutionCommand, SFNClient, StartExecutionCommand } from '@aws-sdk/client-sfn';
import { describe, expect, it } from 'vitest';
import type { Credentials } from '../../local/iam.ts';
import { type Caller, type HttpService, type JsonService, ServiceError } from '../../local/types.ts';
import { iamWith, serve } from './kit.ts';

/** What the SDK's signer also does. */
interface Presigner {
  presign(
    request: object,
    options: { expiresIn: number; signingDate: Date },
  ): Promise<{ path: string; query: Record<string, string> }>;
}

const WORKER = 'arn:aws:iam::000000000000:role/worker';
const seen: { method?: string; url?: string; caller: string; bytes: number }[] = [];

const s3: HttpService = {
  async handle(request, response, caller) {
    let bytes = 0;
    for await (const chunk of request) bytes += (chunk as Buffer).length;
    seen.push({ method: request.method ?? '', url: request.url ?? '', caller: caller.arn, bytes });
    response.writeHead(200, { etag: '"e"' }).end('content');
  },
};
const states: JsonService = {
  operations: {
    StartExecution: async (input: { name?: string }, caller: Caller) => {
      caller.authorize('states:StartExecution', 'arn:aws:states:::machine');
      if (input.name === 'twice') throw new ServiceError('ExecutionAlreadyExists', 'It exists');
      return { executionArn: `by ${caller.arn}`, startDate: 1 };
    },
  },
};

const iam = iamWith({
  worker: [{ Effect: 'Allow', Action: 'states:StartExecution', Resource: '*' }],
  idle: [],
});
const gateway = await serve(iam, {
  s3: { protocol: 's3', service: s3 },
  states: { protocol: 'json', service: states },
});
const options = (credentials: Credentials) => ({
  endpoint: gateway.endpoint,
  region: 'us-east-1',
  credentials,
  maxAttempts: 1,
});
const worker = iam.credentials(WORKER);
const start = new StartExecutionCommand({ stateMachineArn: 'arn:aws:states:::machine' });

describe('a signed request', () => {
  it('is known by its key', async () => {
    expect((await new SFNClient(options(worker)).send(start)).executionArn).toBe(`by ${WORKER}`);
    expect((await new SFNClient(options(iam.root)).send(start)).executionArn).toBe(
      'by arn:aws:iam::000000000000:root',
    );
  });

  it.each(['plain.txt', 'with space/ä+b.svs', "quote'(1)!*~.svs", 'a//b/../c', '100%/x=y&z.svs', 'emoji-🔬'])(
    'for the object %s is verified, streamed or not',
    async (Key) => {
      const client = new S3Client(options(worker));
      await client.send(
        new PutObjectCommand({ Bucket: 'landing', Key, Body: 'x', Metadata: { a: '  b   c ' } }),
      );
      await client.send(
        new GetObjectCommand({ Bucket: 'landing', Key, VersionId: 'v/1 +', ResponseContentType: 'a b' }),
      );
      expect(seen.at(-1)).toMatchObject({ method: 'GET', caller: WORKER });
    },
  );

  it('may be presigned, until it expires', async () => {
    const client = new S3Client(options(worker));
    const presign = async (signedSecondsAgo: number, expiresIn: number) => {
      const signer = (await client.config.signer()) as unknown as Presigner;
      const { hostname, port } = new URL(gateway.endpoint);
      const { path, query } = await signer.presign(
        {
          method: 'GET',
          protocol: 'http:',
          hostname,
          port: Number(port),
          path: '/landing/with%20space/%C3%A4.svs',
          query: { 'response-content-type': 'a b/c' },
          headers: { host: `${hostname}:${port}`, 'x-amz-content-sha256': 'UNSIGNED-PAYLOAD' },
        },
        { expiresIn, signingDate: new Date(Date.now() - signedSecondsAgo * 1000) },
      );
      return `${gateway.endpoint}${path}?${new URLSearchParams(query)}`;
    };
    const url = await presign(0, 60);
    expect((await fetch(url)).status).toBe(200);
    expect(seen.at(-1)).toMatchObject({ method: 'GET', caller: WORKER });
    expect((await fetch(url.replace('space', 'other'))).status).toBe(403);
    const late = await fetch(await presign(120, 60));
    expect(late.status).toBe(403);
    expect(await late.text()).toContain('expired');
  });

  it('with another secret is refused', async () => {
    const forged = { ...worker, secretAccessKey: 'guess' };
    await expect(new SFNClient(options(forged)).send(start)).rejects.toMatchObject({
      name: 'InvalidSignatureException',
    });
    await expect(
      new S3Client(options(forged)).send(new GetObjectCommand({ Bucket: 'landing', Key: 'k' })),
    ).rejects.toMatchObject({ name: 'SignatureDoesNotMatch', $metadata: { httpStatusCode: 403 } });
  });

  it('of an unknown key is refused', async () => {
    const stranger = { accessKeyId: 'AKIASTRANGER', secretAccessKey: 'x' };
    await expect(new SFNClient(options(stranger)).send(start)).rejects.toMatchObject({
      name: 'UnrecognizedClientException',
    });
    await expect(
      new S3Client(options(stranger)).send(new GetObjectCommand({ Bucket: 'b', Key: 'k' })),
    ).rejects.toMatchObject({ name: 'InvalidAccessKeyId' });
  });

  it('whose body was changed on the way is refused', async () => {
    const client = new SFNClient(options(worker));
    client.middlewareStack.add(
      (next) => (args) => {
        const request = args.request as { body: Uint8Array | string; headers: Record<string, string> };
        request.body = Buffer.concat([request.body as Uint8Array])
          .toString()
          .replace('machine', 'another');
        request.headers['content-length'] = String(request.body.length);
        return next(args);
      },
      { step: 'finalizeRequest', priority: 'low' },
    );
    await expect(client.send(start)).rejects.toMatchObject({ name: 'InvalidSignatureException' });
  });
});

describe('an error', () => {
  it('has the name and status that the service gave it', async () => {
    const twice = new StartExecutionCommand({ stateMachineArn: 'arn:aws:states:::machine', name: 'twice' });
    await expect(new SFNClient(options(worker)).send(twice)).rejects.toMatchObject({
      name: 'ExecutionAlreadyExists',
      message: 'It exists',
      $metadata: { httpStatusCode: 400, requestId: expect.stringMatching(/^[0-9a-f-]{36}$/) },
    });
  });

  it('of rights is AccessDeniedException in JSON', async () => {
    const idle = iam.credentials('arn:aws:iam::000000000000:role/idle');
    await expect(new SFNClient(options(idle)).send(start)).rejects.toMatchObject({
      name: 'AccessDeniedException',
      message: expect.stringContaining('is not authorized to perform: states:StartExecution'),
    });
  });

  it('names the operation or service that is not there', async () => {
    const describeExecution = new DescribeExecutionCommand({ executionArn: 'arn:aws:states:::x' });
    await expect(new SFNClient(options(worker)).send(describeExecution)).rejects.toMatchObject({
      name: 'UnknownOperationException',
      message: expect.stringContaining('states:DescribeExecution; it supports StartExecution'),
    });
    await expect(new DynamoDBClient(options(worker)).send(new ListTablesCommand({}))).rejects.toMatchObject({
      name: 'UnknownService',
      message: expect.stringContaining("'dynamodb'"),
    });
  });

  it('meets a request that is not signed', async () => {
    const answer = await fetch(`${gateway.endpoint}/landing/key`);
    expect(answer.status).toBe(403);
    expect(await answer.json()).toMatchObject({ __type: 'MissingAuthenticationToken' });
  });
});

it('listens on loopback only', () => {
  expect(gateway.endpoint).toMatch(/^http:\/\/127\.0\.0\.1:\d+$/);
});

it('cuts an upload that is refused, instead of reading it to its end', async () => {
  const url = new URL(gateway.endpoint);
  const status = await new Promise<number | undefined>((resolve, reject) => {
    const upload = httpRequest({
      host: url.hostname,
      port: url.port,
      method: 'PUT',
      path: '/landing/slide.svs',
      headers: { 'content-length': 10_000_000_000 },
    });
    upload.on('response', (response) => resolve(response.statusCode));
    upload.on('error', reject);
    upload.write('the first bytes of ten gigabytes');
  });
  expect(status).toBe(403);
});

it('counts requests by class and by who made them', async () => {
  const own = await serve(iam, {
    s3: { protocol: 's3', service: s3 },
    states: { protocol: 'json', service: states },
  });
  const to = (credentials: Credentials) => ({ ...options(credentials), endpoint: own.endpoint });
  const client = new S3Client(to(worker));
  await client.send(new PutObjectCommand({ Bucket: 'b', Key: 'k', Body: 'x' }));
  await client.send(new GetObjectCommand({ Bucket: 'b', Key: 'k' }));
  await new SFNClient(to(iam.root)).send(start);
  expect(own.counts()).toEqual({
    byClass: { 's3.put': 1, 's3.get': 1, 'states.StartExecution': 1 },
    byPrincipal: {
      [WORKER]: { 's3.put': 1, 's3.get': 1 },
      'arn:aws:iam::000000000000:root': { 'states.StartExecution': 1 },
    },
  });
});
