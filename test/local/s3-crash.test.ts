/** What is left of the local S3 when its process is killed in the middle of its work. */
import { type ChildProcess, spawn } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { GetObjectCommand, ListObjectsV2Command, PutObjectCommand, S3Client } from '@aws-sdk/client-s3';
import { Upload } from '@aws-sdk/lib-storage';
import { afterEach, beforeEach, expect, it } from 'vitest';
import { S3Service } from '../../local/s3/service.ts';
import { Store } from '../../local/s3/store.ts';
import { startS3 } from './s3-server.ts';

const Bucket = 'crash-bucket';
const MIB = 1024 ** 2;
const md5 = (bytes: Uint8Array) => createHash('md5').update(bytes).digest('hex');

let root: string;
let folder: string;
let log: string;

beforeEach(async () => {
  root = await mkdtemp(join(tmpdir(), 'slideway-s3-'));
  folder = join(root, 's3');
  log = join(root, 'delivered');
  await writeFile(log, '');
});
afterEach(() => rm(root, { recursive: true }));

async function startChild(): Promise<{ child: ChildProcess; client: S3Client }> {
  const script = new URL('./s3-crash-child.ts', import.meta.url).pathname;
  const child = spawn(process.execPath, [script, folder, log], { stdio: ['ignore', 'pipe', 'inherit'] });
  const died = once(child, 'exit').then(() => Promise.reject(new Error('the child did not start')));
  const [endpoint] = (await Promise.race([once(createInterface({ input: child.stdout }), 'line'), died])) as [
    string,
  ];
  died.catch(() => {});
  const credentials = { accessKeyId: 'test', secretAccessKey: 'test' };
  const client = new S3Client({ endpoint, region: 'us-east-1', credentials, maxAttempts: 1 });
  return { child, client };
}

/** Puts until the process is gone; `acknowledged` learns of each put that was answered. */
async function putUntilKilled(
  client: S3Client,
  writer: string,
  acknowledged: Map<string, string>,
): Promise<void> {
  for (let i = 0; ; i++) {
    const Key = `${writer}/${i}`;
    const large = i % 8 === 7;
    const Body = randomBytes(large ? 7 * MIB : 1 + Math.floor(Math.random() * 200_000));
    try {
      if (large) await new Upload({ client, params: { Bucket, Key, Body }, partSize: 5 * MIB }).done();
      else await client.send(new PutObjectCommand({ Bucket, Key, Body }));
    } catch {
      return;
    }
    acknowledged.set(Key, md5(Body));
  }
}

it('killed while objects are put: none is lost, none is partial, every event is told, no file is left over', async () => {
  const acknowledged = new Map<string, string>();
  for (const lifetime of [300, 600, 900]) {
    const { child, client } = await startChild();
    const writers = [0, 1, 2].map((n) => putUntilKilled(client, `${lifetime}-${n}`, acknowledged));
    await sleep(lifetime);
    child.kill('SIGKILL');
    await Promise.all(writers);
    client.destroy();
  }
  expect(acknowledged.size).toBeGreaterThan(10);

  const s3 = await startS3(folder);
  const client = s3.client();
  const listed = new Map<string, string>();
  let token: string | undefined;
  do {
    const page = await client.send(new ListObjectsV2Command({ Bucket, ContinuationToken: token }));
    for (const { Key = '', Size } of page.Contents ?? []) {
      // The client checks the content against the checksum that was stored with it.
      const found = await client.send(new GetObjectCommand({ Bucket, Key, ChecksumMode: 'ENABLED' }));
      const bytes = (await found.Body?.transformToByteArray()) ?? new Uint8Array();
      expect(bytes.length).toBe(Size);
      listed.set(Key, md5(bytes));
    }
    token = page.NextContinuationToken;
  } while (token);
  for (const [key, sum] of acknowledged) expect(listed.get(key)).toBe(sum);

  // Every object that is there was told of, by the killed processes or by this one.
  const toldBefore = (await readFile(log, 'utf8')).split('\n').map((line) => line.split(' ')[0]);
  const told = () => new Set([...toldBefore, ...s3.events.map(({ key }) => key)]);
  await expect.poll(() => [...listed.keys()].filter((key) => !told().has(key))).toEqual([]);
  await s3.close();

  // What was acknowledged is not told again.
  const again = await startS3(folder);
  await sleep(100);
  expect(again.events).toEqual([]);
  const files = (await readdir(join(folder, 'content'), { withFileTypes: true, recursive: true })).filter(
    (entry) => entry.isFile(),
  );
  const referred = new Set<string>();
  await again.close();
  const store = new Store(join(folder, 'index'));
  await store.open();
  for await (const { file } of store.extents()) referred.add(file);
  await store.close();
  expect(new Set(files.map(({ name }) => name))).toEqual(referred);
});

it('tells again of an event whose listener failed, without a restart and after one', async () => {
  let fail = true;
  const s3 = await startS3(folder, async () => {
    if (fail) throw new Error('the listener is not there yet');
  });
  await s3.service.createBucket(Bucket, { versioning: false, eventBridge: true });
  const client = s3.client();
  await client.send(new PutObjectCommand({ Bucket, Key: 'retried', Body: 'x' }));
  await sleep(50);
  expect(s3.events).toEqual([]);
  fail = false;
  await expect.poll(() => s3.events.map(({ key }) => key), { timeout: 5000 }).toEqual(['retried']);
  fail = true;
  await client.send(new PutObjectCommand({ Bucket, Key: 'restarted', Body: 'x' }));
  await s3.close();

  const next = await startS3(folder);
  await expect.poll(() => next.events.map(({ key }) => key)).toEqual(['restarted']);
  await next.close();
});

it('removes what a crash left before any request is served', async () => {
  const s3 = await startS3(folder);
  await s3.close();
  const leftover = join(folder, 'content', 'ab', 'ab'.repeat(16));
  await mkdir(join(folder, 'content', 'ab'), { recursive: true });
  await writeFile(leftover, 'partial');
  const next = await startS3(folder);
  expect(existsSync(leftover)).toBe(false);
  await next.close();
});

it('refuses a folder that another process works on', async () => {
  const { child } = await startChild();
  const second = new S3Service({ folder, onObjectCreated: async () => {} });
  await expect(second.recover()).rejects.toMatchObject({ name: 'FolderInUse' });
  child.kill('SIGKILL');
});
