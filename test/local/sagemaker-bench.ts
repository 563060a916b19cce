/** What the tests of SageMaker's jobs share: folders and engines that are gone afterwards, objects, and patience. */
import { execFileSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { GetObjectCommand, PutObjectCommand } from '@aws-sdk/client-s3';
import { type Engine, type EngineOptions, startEngine } from './sagemaker-engine.ts';

export class Bench {
  readonly #folders: string[] = [];
  readonly #engines: Engine[] = [];

  folder(): string {
    const path = mkdtempSync(join(tmpdir(), 'sagemaker-'));
    this.#folders.push(path);
    return path;
  }

  async engine(options: Partial<EngineOptions> & { container: string }): Promise<Engine> {
    const started = await startEngine({ state: this.folder(), ...options });
    this.#engines.push(started);
    return started;
  }

  /** Ends the engines; those that a test closed itself are none the worse for it. */
  async close(): Promise<void> {
    for (const started of this.#engines.splice(0)) await started.close();
  }

  remove(): void {
    for (const path of this.#folders) rmSync(path, { recursive: true, force: true });
  }
}

export function namespacesWork(): boolean {
  for (const flags of [['--mount'], ['--user', '--map-root-user', '--mount']]) {
    try {
      execFileSync('unshare', [...flags, 'true'], { stdio: 'ignore' });
      return true;
    } catch {
      // The next way.
    }
  }
  return false;
}

export async function until<T>(
  check: () => Promise<T | undefined | false> | T | undefined | false,
): Promise<T> {
  const deadline = Date.now() + 30_000;
  while (Date.now() < deadline) {
    const value = await check();
    if (value) return value;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  throw new Error('It did not come to pass within 30 s.');
}

/** The records of a file that another process appends to; a line that it has not ended yet is left for later. */
export function records<T>(path: string): T[] {
  if (!existsSync(path)) return [];
  const lines = readFileSync(path, 'utf8').split('\n').slice(0, -1);
  return lines.map((line) => JSON.parse(line) as T);
}

export async function put({ s3 }: Engine, key: string, body: string | Uint8Array): Promise<void> {
  await s3.send(new PutObjectCommand({ Bucket: 'silver', Key: key, Body: body }));
}

export async function get({ s3 }: Engine, key: string): Promise<string> {
  const { Body } = await s3.send(new GetObjectCommand({ Bucket: 'silver', Key: key }));
  return (await Body?.transformToString()) ?? '';
}
