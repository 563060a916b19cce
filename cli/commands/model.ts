/** `slideway model`: packages built, checked, registered and looked at. */
import { existsSync } from 'node:fs';
import { mkdtemp, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { basename, dirname, extname, join, resolve } from 'node:path';
import { forEachConcurrently } from '../../core/concurrency.ts';
import { type Model, outputNames } from '../../core/contracts.ts';
import { parseModel } from '../../core/models.ts';
import { type Deployment, openDeployment, type Place, placeOf } from '../deployment.ts';
import { findModel, listModels, type Registered, readPackageFile, registerModel } from '../models.ts';
import { buildPackage, type Checked, checkPackage, type Failure, type PackageTool } from '../package.ts';
import { shortPath } from '../paths.ts';
import { ensurePython } from '../setup/python.ts';
import { table } from '../table.ts';
import { bytes, EXIT, plural, type Screen, usageError } from '../terminal.ts';
import { listRuns, readPlan } from '../watch.ts';
import type { Streams } from './run.ts';
import { reading } from './show.ts';

interface Answering {
  json?: boolean;
}

/** What a model.json says, as flags; each wins over the file. */
export interface ModelFlags {
  name?: string;
  version?: string;
  license?: string;
  description?: string;
  task?: string;
  outputs?: string[];
  dimensions?: number;
  px?: number;
  mpp?: number;
  overlap?: number;
  encoding?: string;
  mean?: number[];
  std?: number[];
  mode?: string;
  batch?: number;
  aggregate?: string[];
}

export interface BuildOptions extends ModelFlags, Answering {
  modelJson?: string;
  head?: string;
  out?: string;
}

export interface CheckOptions extends Answering {
  tiles: number;
  /** For each mode at most. */
  seconds: number;
  /** False: as a stage that runs no code of packages. */
  code: boolean;
}

export interface RegisterOptions extends Place, Answering {}

// --- build --------------------------------------------------------------------------------------------------------

const WEIGHTS = ['code/inference.py', 'model.pt', 'model.onnx'];
const NO_CHANGE = { mean: [0, 0, 0], std: [1, 1, 1] };

export async function build(
  given: string,
  options: BuildOptions,
  { screen, answer }: Streams,
  signal: AbortSignal,
): Promise<number> {
  const source = await sourceOf(given, options);
  const document = describeModel(given, source.described, options);
  const model = checkedModel(document);
  const out = resolve(options.out ?? `${model.name}-${model.version}.tar.gz`);
  const folder = await mkdtemp(join(tmpdir(), 'slideway-model-'));
  try {
    const described = join(folder, 'model.json');
    await writeFile(described, source.text ?? `${JSON.stringify(document, null, 2)}\n`);
    const head = model.head && (options.head ?? join(source.folder, model.head.file));
    if (head && !existsSync(head)) {
      throw usageError(
        `model.json describes a head, but there is no ${head}. Give its TorchScript with --head.`,
      );
    }
    const python = await ensurePython(screen);
    const built = await screen.task(`Packing ${model.name} ${model.version}`, (at) =>
      buildPackage({ python, signal, onLine: at }, { model: described, from: source.from, head, out }),
    );
    if ('error' in built) return failed(built, options, answer);
    if (options.json) answer.print(JSON.stringify(built, null, 2));
    else {
      answer.print(
        `${shortPath(built.file)}  ${bytes(built.bytes)}  ${built.format}  ${answer.paint('dim', built.digest)}`,
      );
      for (const file of built.files)
        answer.print(`  ${file.name}  ${answer.paint('dim', bytes(file.bytes))}`);
      answer.print(`Try it: slideway model check ${shellWord(shortPath(out))}`);
    }
    return EXIT.succeeded;
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

interface Source {
  /** What is packed: weights, or a folder with code. */
  from: string;
  folder: string;
  described: Record<string, unknown>;
  /** The model.json as it is, where no flag changes it. */
  text: string | undefined;
}

async function sourceOf(given: string, options: BuildOptions): Promise<Source> {
  const path = resolve(given);
  const about = await stat(path).catch((error: unknown) => {
    throw usageError(`${given} cannot be read: ${(error as NodeJS.ErrnoException).code ?? error}.`, {
      cause: error,
    });
  });
  const folder = about.isDirectory() ? path : dirname(path);
  const weights = WEIGHTS.find((name) => existsSync(join(folder, name)));
  if (about.isDirectory() && !weights) {
    throw usageError(`${given} holds none of ${WEIGHTS.join(', ')}.`);
  }
  const isCode = about.isDirectory() && weights === WEIGHTS[0];
  const own = join(folder, 'model.json');
  const file = options.modelJson ?? (existsSync(own) ? own : undefined);
  const text = file === undefined ? undefined : await readFile(file, 'utf8').catch(noModelJson(file));
  const changes = Object.keys(flagsOf(options)).length > 0;
  return {
    from: about.isDirectory() && !isCode ? join(folder, weights ?? '') : path,
    folder,
    described: text === undefined ? {} : jsonObject(text, file ?? ''),
    text: changes ? undefined : text,
  };
}

const noModelJson = (file: string) => (error: unknown) => {
  throw usageError(`${file} cannot be read: ${(error as NodeJS.ErrnoException).code ?? error}.`);
};

function jsonObject(text: string, file: string): Record<string, unknown> {
  try {
    const value: unknown = JSON.parse(text);
    if (typeof value === 'object' && value !== null && !Array.isArray(value)) {
      return value as Record<string, unknown>;
    }
  } catch (error) {
    throw usageError(`${file} is not JSON: ${(error as Error).message}`, { cause: error });
  }
  throw usageError(`${file} is not a JSON object.`);
}

/** The flags that were given, as members of model.json. */
function flagsOf({
  px,
  mpp,
  overlap,
  encoding,
  mean,
  std,
  ...options
}: BuildOptions): Record<string, unknown> {
  const { name, version, license, description, task, outputs, dimensions, mode, batch, aggregate } = options;
  const given = (members: Record<string, unknown>) =>
    Object.fromEntries(Object.entries(members).filter(([, value]) => value !== undefined));
  const tile = given({ px, mpp, overlap, ...(encoding && { encoding: { format: encoding } }) });
  const input = given({ mean, std });
  return {
    ...given({ name, version, license, description, task, outputs, dimensions, mode, batch, aggregate }),
    ...(Object.keys(tile).length > 0 && { tile }),
    ...(Object.keys(input).length > 0 && { input }),
  };
}

/**
 * model.json of a file, flags over it, and for what neither says a sane default. Nothing is guessed that only the
 * author knows: licence, task, pixel size.
 */
export function describeModel(
  given: string,
  described: Record<string, unknown>,
  options: BuildOptions,
): Record<string, unknown> {
  const flags = flagsOf(options);
  const inner = (field: string): object => ({
    ...(described[field] as object | undefined),
    ...(flags[field] as object | undefined),
  });
  const tile = inner('tile');
  const document: Record<string, unknown> = {
    name: nameFrom(given),
    version: '0.1.0',
    ...(options.dimensions !== undefined && { task: 'embedding' }),
    mode: 'processing',
    ...described,
    ...flags,
    tile,
    input: { ...NO_CHANGE, ...inner('input') },
  };
  const task = document.task;
  const missing = [
    ...(document.license ? [] : ['--license <of the weights>']),
    ...(task ? [] : ['--task classification, regression or embedding']),
    ...(task !== 'embedding' && task && !document.outputs ? ['--outputs <name,name,…>'] : []),
    ...(task === 'embedding' && !document.outputs && !document.dimensions ? ['--dimensions <n>'] : []),
    ...('px' in tile ? [] : ['--px <pixels a side>']),
    ...('mpp' in tile ? [] : ['--mpp <µm per pixel at which it was trained>']),
  ];
  if (missing.length > 0) {
    throw usageError(`There is no model.json that says it all. Give ${missing.join(', ')}.`);
  }
  return document;
}

/** A model's name from that of its file. */
function nameFrom(given: string): string {
  const path = resolve(given);
  const stem = basename(path, extname(path));
  // `runs/tumour/model.pt` is the model tumour.
  const name = stem === 'model' ? basename(dirname(path)) : stem;
  return (
    name
      .toLowerCase()
      .replace(/[^a-z0-9]+/g, '-')
      .replace(/^-+|-+$/g, '')
      .slice(0, 63) || 'model'
  );
}

function checkedModel(document: Record<string, unknown>): Model {
  try {
    return parseModel(JSON.stringify(document));
  } catch (error) {
    throw usageError((error as Error).message, { cause: error });
  }
}

const shellWord = (word: string) => (/^[\w./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

// --- check --------------------------------------------------------------------------------------------------------

/** What an author can do about an error whose message does not say it. */
function adviceOn({ error, message }: Failure): string | undefined {
  if (message.includes('not TorchScript')) {
    return 'A checkpoint holds weights only. Load it into its network and save that: torch.jit.script(network.eval()).save("model.pt"); see docs/models.md.';
  }
  if (error === 'ModelPackageInvalid') return 'Correct what is named, and build the package again.';
  if (error === 'ModelError') return 'docs/models.md says what a model gets, and what it must give.';
  return undefined;
}

export async function check(
  path: string,
  options: CheckOptions,
  { screen, answer }: Streams,
  signal: AbortSignal,
): Promise<number> {
  const { model } = await readPackageFile(path);
  const python = await ensurePython(screen);
  const title = `Checking ${model.name} ${model.version}: loads, runs ${plural(options.tiles, 'tile')} as both modes do`;
  const checked = await screen.task(title, (at) => {
    const tool: PackageTool = { python, signal, onLine: at };
    return checkPackage(tool, path, { ...options, allowCode: options.code });
  });
  if ('error' in checked) return failed(checked, options, answer);
  if (options.json) answer.print(JSON.stringify(checked, null, 2));
  else for (const line of outcome(checked, path, answer)) answer.print(line);
  return EXIT.succeeded;
}

/** Tells of a package that is no good. */
function failed(failure: Failure, { json }: Answering, answer: Screen): number {
  if (json) answer.print(JSON.stringify(failure, null, 2));
  else {
    answer.print(`${answer.paint('red', failure.error)}: ${failure.message}`);
    if (failure.error === 'ServeFailed')
      for (const line of failure.log) answer.print(answer.paint('dim', line));
    const advice = adviceOn(failure);
    if (advice) answer.print(advice);
  }
  return EXIT.failed;
}

/** The outcome of a check that went well. */
export function outcome(checked: Checked, path: string, { paint }: Pick<Screen, 'paint'>): string[] {
  const { tile, tilesPerSecond, maxDifference, head } = checked;
  const says = checked.dimensions
    ? plural(checked.dimensions, 'feature')
    : (checked.outputs ?? []).join(', ');
  const overlap = tile.overlap > 0 ? `, overlapping by ${tile.overlap}` : '';
  const row = (title: string, text: string) => `${title.padEnd(12)}${text}`;
  const numbers = (values: Record<string, number>) =>
    Object.entries(values)
      .map(([name, value]) => `${name} ${short(value)}`)
      .join(', ');
  return [
    `${paint('green', '✓')} ${paint('bold', `${checked.name} ${checked.version}`)}  ${paint('dim', checked.digest)}`,
    row('Package', `${checked.format}, ${bytes(checked.bytes)}, ${checked.license}`),
    row('Answers', `${checked.task} for mode ${checked.mode}: ${says}`),
    row('Tiles', `${tile.px} px at ${tile.mpp} µm${overlap}; ${checked.tiles} tried on ${checked.device}`),
    row(
      'Both modes',
      maxDifference === 0 ? 'the same numbers' : `differ by at most ${maxDifference.toExponential(1)}`,
    ),
    row(
      'Speed',
      Object.entries(tilesPerSecond)
        .map(([mode, speed]) => `${mode} ${short(speed)} tiles/s`)
        .join(', '),
    ),
    row('First tile', numbers(checked.sample)),
    ...(head
      ? [row('Head', `${head.task}${head.attention ? ' with attention' : ''}: ${numbers(head.outputs)}`)]
      : []),
    ...checked.warnings.map((warning) => `${paint('yellow', '!')} ${warning}`),
    `Register it: slideway model add ${shellWord(path)}`,
  ];
}

const short = (value: number) => String(Number(value.toPrecision(4)));

// --- the register -------------------------------------------------------------------------------------------------

export async function add(
  paths: string[],
  options: RegisterOptions,
  { screen, answer }: Streams,
  signal: AbortSignal,
): Promise<number> {
  // What is no good is told before anything is started or sent.
  for (const path of paths) await readPackageFile(path);
  const deployment = await openDeployment(screen, placeOf(options));
  try {
    const added: Registered[] = [];
    for (const path of paths) added.push(await addOne(path, deployment, screen, signal));
    if (options.json) answer.print(JSON.stringify(added, null, 2));
    else {
      for (const { name, version, digest, added: fresh } of added) {
        const what = fresh ? 'Registered' : 'Already registered';
        answer.print(`${what}: ${name}@${version}  ${answer.paint('dim', digest)}`);
      }
      answer.print(`Run it: slideway run <folder> --model ${added[0]?.name}@${added[0]?.version}`);
    }
    return EXIT.succeeded;
  } finally {
    await deployment.close();
  }
}

async function addOne(
  path: string,
  { s3, outputs }: Deployment,
  screen: Screen,
  signal: AbortSignal,
): Promise<Registered> {
  const { size } = await stat(path);
  return screen.task(`Registering ${path} (${bytes(size)})`, (at) =>
    registerModel(s3, outputs.ModelsBucket, path, {
      signal,
      onProgress: (sent) => at(`${bytes(sent)} of ${bytes(size)}`),
    }),
  );
}

export const list = (name: string | undefined, options: RegisterOptions, streams: Streams): Promise<number> =>
  reading(options, streams, async (deployment) => {
    const { answer, width } = streams;
    const models = deployment ? await listModels(deployment.s3, deployment.outputs.ModelsBucket, name) : [];
    if (options.json) answer.print(JSON.stringify(models, null, 2));
    else if (models.length === 0) {
      answer.print(
        name === undefined
          ? 'No model is registered. Register a package with: slideway model add model.tar.gz'
          : `No version of ${name} is registered. \`slideway model list\` shows what is.`,
      );
    } else {
      const columns = ['model', 'version', 'task', 'mode', 'format', 'size', 'registered', 'licence'];
      const rows = models.map((model) => ({
        cells: [
          model.name,
          model.version,
          model.task ?? '–',
          model.mode ?? '–',
          model.format ?? '–',
          bytes(model.bytes),
          day(model.addedAt),
          model.license ?? '–',
        ],
      }));
      const titles = columns.map((title) => ({
        title,
        ...(title === 'size' && { align: 'right' as const }),
      }));
      for (const line of table(titles, rows, answer.paint, width)) answer.print(line);
    }
    return EXIT.succeeded;
  });

const day = (date: Date) => date.toISOString().slice(0, 16).replace('T', ' ');

/** Runs that are looked into for who used a model: a plan each. */
const RUNS_LOOKED_INTO = 100;

export const show = (wanted: string, options: RegisterOptions, streams: Streams): Promise<number> =>
  reading(options, streams, async (deployment) => {
    const { answer } = streams;
    const found = deployment && (await findModel(deployment.s3, deployment.outputs.ModelsBucket, wanted));
    if (!deployment || !found) {
      throw usageError(`No model ${wanted} is registered. \`slideway model list\` shows what is.`);
    }
    const { model, ...about } = found;
    const usedBy = await runsWith(deployment, about);
    if (options.json) {
      answer.print(JSON.stringify({ ...about, usedBy, model }, null, 2));
      return EXIT.succeeded;
    }
    const { paint } = answer;
    const names = outputNames(model);
    const says =
      names.length > 12 ? `${names.slice(0, 3).join(', ')}, … (${names.length})` : names.join(', ');
    const row = (title: string, text: string | undefined) =>
      answer.print(`${title.padEnd(12)}${text ?? '–'}`);
    answer.print(paint('bold', `${about.name} ${about.version}`));
    if (model.description) answer.print(model.description);
    row('Licence', about.license);
    row('Digest', about.digest);
    row('Package', `${about.format ?? ''} ${bytes(about.bytes)}`.trim());
    row('Registered', `${day(about.addedAt)} UTC`);
    row('Task', `${model.task}: ${says}`);
    if (model.head) row('Head', `${model.head.task}: ${model.head.outputs.join(', ')}`);
    row('Mode', model.mode);
    row('Tiles', `${model.tile.px} px at ${model.tile.mpp} µm`);
    row('Used by', usedBy.length > 0 ? usedBy.slice(0, 10).join(', ') : 'no run of late');
    if (usedBy.length > 10) row('', `and ${usedBy.length - 10} more`);
    answer.print();
    answer.print(JSON.stringify(model, null, 2));
    return EXIT.succeeded;
  });

/** The latest runs that planned with this version. */
async function runsWith(
  deployment: Deployment,
  { name, version }: { name: string; version: string },
): Promise<string[]> {
  const runs = (await listRuns(deployment)).slice(0, RUNS_LOOKED_INTO);
  const users = new Set<string>();
  await forEachConcurrently(runs, 8, async ({ runId }) => {
    const plan = await readPlan(deployment, runId);
    if (plan?.models.some((model) => model.name === name && model.version === version)) users.add(runId);
  });
  return runs.map(({ runId }) => runId).filter((runId) => users.has(runId));
}
