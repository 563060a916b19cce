/** A local S3 by itself, with the buckets that a bench needs, and the same behind a slow line. */
import { mkdtemp, rm } from 'node:fs/promises';
import { type AddressInfo, connect, createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { S3Client } from '@aws-sdk/client-s3';
import { Gateway } from '../local/gateway.ts';
import { S3Service } from '../local/s3/service.ts';
import { LOCAL_REGION } from '../local/types.ts';

export interface LocalS3 {
  endpoint: string;
  client: S3Client;
  /** What a process needs in its environment to call it. */
  env: Record<string, string>;
  close(): Promise<void>;
}

const CREDENTIALS = { accessKeyId: 'AKIABENCH', secretAccessKey: 'bench' };

export async function startS3(buckets: string[]): Promise<LocalS3> {
  const folder = await mkdtemp(join(tmpdir(), 'slideway-bench-s3-'));
  const service = new S3Service({ folder, onObjectCreated: async () => {} });
  for (const bucket of buckets) await service.createBucket(bucket, { versioning: false, eventBridge: false });
  const gateway = new Gateway({
    services: { s3: { protocol: 's3', service } },
    principals: () => ({
      caller: { arn: 'arn:aws:iam::000000000000:root', authorize: () => {} },
      secretAccessKey: CREDENTIALS.secretAccessKey,
    }),
  });
  await gateway.listen(0);
  const { endpoint } = gateway;
  const client = new S3Client({
    endpoint,
    region: LOCAL_REGION,
    credentials: CREDENTIALS,
    forcePathStyle: true,
  });
  return {
    endpoint,
    client,
    env: {
      AWS_ACCESS_KEY_ID: CREDENTIALS.accessKeyId,
      AWS_SECRET_ACCESS_KEY: CREDENTIALS.secretAccessKey,
      AWS_REGION: LOCAL_REGION,
    },
    close: async () => {
      client.destroy();
      await gateway.close();
      await rm(folder, { recursive: true, force: true });
    },
  };
}

export interface Line {
  /** Milliseconds that each request waits on its way. */
  latencyMs: number;
  /** Of each connection, in the direction of the answers. */
  bytesPerSecond: number;
}

const HELD_BYTES = 1 << 20;

/** A line to `endpoint` that is as slow as said; answers its own endpoint. Signatures hold, because the host's name
 * is not looked at again: it is signed as it was called. */
export async function slowLine(endpoint: string, line: Line): Promise<{ endpoint: string; close(): void }> {
  const target = new URL(endpoint);
  const sockets = new Set<Socket>();
  const server: Server = createServer((near) => {
    const far = connect({ host: target.hostname, port: Number(target.port) });
    for (const socket of [near, far]) {
      sockets.add(socket);
      socket.setNoDelay(true);
      socket.on('error', () => socket.destroy());
      socket.on('close', () => sockets.delete(socket));
    }
    near.on('data', (chunk) => setTimeout(() => far.write(chunk), line.latencyMs));
    near.on('close', () => far.destroy());
    let free = 0;
    let held = 0;
    // Timers alone do not keep the order.
    const chunks: Buffer[] = [];
    far.on('data', (chunk: Buffer) => {
      const now = performance.now();
      free = Math.max(free, now) + (chunk.length / line.bytesPerSecond) * 1000;
      held += chunk.length;
      chunks.push(chunk);
      if (held > HELD_BYTES) far.pause();
      setTimeout(() => {
        const next = chunks.shift();
        if (next === undefined) return;
        near.write(next);
        held -= next.length;
        if (held <= HELD_BYTES) far.resume();
      }, free - now);
    });
    far.on('close', () => setTimeout(() => near.destroy(), Math.max(free - performance.now(), 0) + 1));
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  return {
    endpoint: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    close: () => {
      server.close();
      for (const socket of sockets) socket.destroy();
    },
  };
}
