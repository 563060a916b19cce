/** Building and checking of model packages, by the container's own code: what it accepts here, a job accepts. */
import { spawn } from 'node:child_process';
import { text } from 'node:stream/consumers';
import { z } from 'zod';
import { CONTAINER } from './paths.ts';
import { UserError } from './terminal.ts';

const FORMATS = ['torchscript', 'onnx', 'code'] as const;
const MODES = ['processing', 'transform'] as const;

const failureSchema = z.object({ ok: z.literal(false), error: z.string(), message: z.string() });
export interface Failure extends z.infer<typeof failureSchema> {
  /** The last lines of the tool's log. */
  log: string[];
}

const builtSchema = z.object({
  file: z.string(),
  name: z.string(),
  version: z.string(),
  digest: z.string(),
  bytes: z.number(),
  format: z.enum(FORMATS),
  files: z.array(z.object({ name: z.string(), bytes: z.number() })),
});
export type Built = z.infer<typeof builtSchema>;

const checkedSchema = z.object({
  ok: z.literal(true),
  name: z.string(),
  version: z.string(),
  license: z.string(),
  digest: z.string(),
  bytes: z.number(),
  format: z.enum(FORMATS),
  task: z.string(),
  mode: z.enum(MODES),
  outputs: z.array(z.string()).optional(),
  dimensions: z.number().optional(),
  tile: z.object({ px: z.number(), mpp: z.number(), overlap: z.number() }),
  device: z.string(),
  tiles: z.number(),
  /** Between the answers of both modes for the same tiles. */
  maxDifference: z.number(),
  tilesPerSecond: z.record(z.enum(MODES), z.number()),
  /** Of the first tile, a few outputs. */
  sample: z.record(z.string(), z.number()),
  head: z
    .object({ task: z.string(), outputs: z.record(z.string(), z.number()), attention: z.boolean() })
    .optional(),
  warnings: z.array(z.string()),
});
export type Checked = z.infer<typeof checkedSchema>;

export interface PackageTool {
  python: string;
  signal: AbortSignal;
  /** Hears what the tool says while it works. */
  onLine(line: string): void;
}

/** Writes model.tar.gz from model.json and weights or a folder with code. */
export const buildPackage = (
  tool: PackageTool,
  given: { model: string; from: string; head?: string | undefined; out: string },
): Promise<Built | Failure> =>
  ask(tool, builtSchema, [
    ...['build', '--model', given.model, '--from', given.from, '--out', given.out],
    ...(given.head ? ['--head', given.head] : []),
  ]);

/** Loads a package, runs it on generated tiles as both modes do, and compares. */
export const checkPackage = (
  tool: PackageTool,
  path: string,
  { tiles, seconds, allowCode }: { tiles: number; seconds: number; allowCode: boolean },
): Promise<Checked | Failure> =>
  ask(tool, checkedSchema, [
    ...['check', path, '--tiles', `${tiles}`, '--seconds', `${seconds}`],
    ...(allowCode ? [] : ['--no-code']),
  ]);

/** Runs the tool; its answer is one JSON object on standard output, also of a package that is no good. */
async function ask<T>(
  { python, signal, onLine }: PackageTool,
  schema: z.ZodType<T>,
  args: string[],
): Promise<T | Failure> {
  const child = spawn(python, ['-m', 'slideway_inference', 'package', ...args], {
    env: { ...process.env, PYTHONPATH: CONTAINER, PYTHONDONTWRITEBYTECODE: '1', PYTHONUNBUFFERED: '1' },
    stdio: ['ignore', 'pipe', 'pipe'],
    signal,
  });
  const tail: string[] = [];
  child.stderr.setEncoding('utf8').on('data', (part: string) => {
    for (const line of part.split('\n').filter((said) => said.trim() !== '')) {
      tail.push(line);
      tail.splice(0, Math.max(tail.length - 20, 0));
      onLine(line);
    }
  });
  const ended = new Promise<number | null>((resolve, reject) => {
    child.once('error', reject);
    child.once('close', resolve);
  });
  const [answer, code] = await Promise.all([text(child.stdout), ended]);
  const document = parsed(answer);
  const good = schema.safeParse(document);
  if (good.success) return good.data;
  const failure = failureSchema.safeParse(document);
  if (failure.success) return { ...failure.data, log: tail };
  const said = tail.at(-1) ?? z.prettifyError(good.error);
  throw new UserError(`The package could not be worked on: Python ended with code ${code}: ${said}`);
}

function parsed(answer: string): unknown {
  try {
    return JSON.parse(answer);
  } catch {
    return undefined;
  }
}
