/** The results of a run on this machine's disk and as a table. */
import { createWriteStream } from 'node:fs';
import { mkdir, readFile, rename, rm, stat, utimes } from 'node:fs/promises';
import { dirname, join, resolve, sep } from 'node:path';
import type { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { GetObjectCommand, paginateListObjectsV2 } from '@aws-sdk/client-s3';
import { splitColumn } from '../core/aggregate.ts';
import { forEachConcurrently } from '../core/concurrency.ts';
import type { Aggregate, Plan, RunItem, SlideItem } from '../core/contracts.ts';
import { reportPrefix, resultsCsvKey, runJsonKey, runPrefix, slidesPrefix } from '../core/keys.ts';
import { IN_WORDS } from '../core/notification.ts';
import { isProblem, outputColumns, type SlideRow, slideRow, withoutWaiting } from '../core/results.ts';
import type { Deployment } from './deployment.ts';
import { type Column, type Row, table, tableWidth } from './table.ts';
import { type Paint, UserError } from './terminal.ts';
import { readPlan, readPlanned } from './watch.ts';

export interface Downloaded {
  /** Files that were new or had changed, and their bytes. */
  files: number;
  bytes: number;
}

/** Downloads a run's results into `folder`, laid out as in Silver; files that are there already are left. */
export async function download(
  { s3, outputs }: Deployment,
  runId: string,
  folder: string,
  signal: AbortSignal,
): Promise<Downloaded> {
  const bucket = outputs.SilverBucket;
  const root = runPrefix(runId);
  const wanted = [reportPrefix(runId), slidesPrefix(runId)];
  const single = new Set([runJsonKey(runId), resultsCsvKey(runId)]);
  const done: Downloaded = { files: 0, bytes: 0 };
  await clearOtherRun(folder, runId);

  async function* objects() {
    for await (const page of paginateListObjectsV2({ client: s3 }, { Bucket: bucket, Prefix: root })) {
      for (const { Key = '', Size = 0, LastModified = new Date(0) } of page.Contents ?? []) {
        if (single.has(Key) || wanted.some((prefix) => Key.startsWith(prefix))) {
          yield { key: Key, size: Size, modified: LastModified };
        }
      }
    }
  }

  await forEachConcurrently(objects(), 8, async ({ key, size, modified }) => {
    signal.throwIfAborted();
    const path = resolve(folder, key.slice(root.length));
    if (!path.startsWith(`${resolve(folder)}${sep}`)) throw new UserError(`${key} leads out of ${folder}.`);
    const there = await stat(path).catch(() => undefined);
    if (there?.size === size && Math.abs(there.mtimeMs - modified.getTime()) < 1000) return;
    await mkdir(dirname(path), { recursive: true });
    const { Body } = await s3.send(new GetObjectCommand({ Bucket: bucket, Key: key }));
    const temporary = `${path}.${process.pid}.part`;
    try {
      await pipeline(Body as Readable, createWriteStream(temporary), { signal });
      await utimes(temporary, modified, modified);
      await rename(temporary, path);
    } finally {
      await rm(temporary, { force: true });
    }
    done.files += 1;
    done.bytes += size;
  });
  return done;
}

/** Removes the results of another run, so that two are never mixed; a folder without a run.json is left as it is. */
async function clearOtherRun(folder: string, runId: string): Promise<void> {
  const there = await readFile(join(folder, 'run.json'), 'utf8').catch(() => undefined);
  if (there === undefined || there.includes(`"runId": "${runId}"`)) return;
  for (const name of ['run.json', 'results.csv', 'report', 'slides']) {
    await rm(join(folder, name), { recursive: true, force: true });
  }
}

export interface Answers {
  rows: SlideRow[];
  models: Plan['models'];
}

/** What became of each line of the manifest so far. */
export async function readAnswers(deployment: Deployment, run: RunItem): Promise<Answers> {
  const plan = await readPlan(deployment, run.runId);
  const items = new Map<string, SlideItem>();
  for await (const item of deployment.state.slides(run.runId)) items.set(item.slideId, item);
  const broken = run.state !== 'RUNNING' && run.plannedAt === undefined;
  const rows = (await readPlanned(deployment, run.runId)).map((line) => {
    const planned = broken ? withoutWaiting(line) : line;
    const item = items.get(planned.slideId);
    const row = slideRow(planned, item);
    // A slide that is under way is unfinished only once the run has ended.
    const current = planned.state === 'EXPECTED' && item ? item : planned;
    return run.state === 'RUNNING' ? { ...row, state: current.state, reason: current.reason ?? null } : row;
  });
  return { rows, models: plan?.models ?? [] };
}

/** Aggregates in the order in which they tell most; other percentiles come last. */
const MAIN: readonly Aggregate[] = ['mean', 'p90', 'max', 'median', 'top_k_mean', 'p10'];

/** Columns of outputs, the main ones first: what heads and classes say, then means, and so on. */
function mainOutputs(models: Plan['models']): string[] {
  const rank = (column: string) => {
    const aggregate = splitColumn(column)?.aggregate;
    if (aggregate === undefined) return column.startsWith('predicted_') ? -2 : -1;
    const place = MAIN.indexOf(aggregate);
    return place === -1 ? MAIN.length : place;
  };
  return outputColumns(models).sort((a, b) => rank(a) - rank(b));
}

/**
 * The answers as a table: a row per slide and model, with as many outputs as find room, and below a slide without
 * a result the reason.
 */
export function resultsTable({ rows, models }: Answers, paint: Paint, width: number): string[] {
  const several = models.length > 1;
  const columns: Column[] = [
    { title: 'slide' },
    { title: 'state' },
    ...(several ? [{ title: 'model' }] : []),
    { title: 'tiles', align: 'right' },
    { title: 'tissue mm²', align: 'right' },
  ];
  const withOutputs = (outputs: string[]): Row[] =>
    rows.flatMap((row) => {
      const style = row.state === 'AGGREGATED' ? 'green' : isProblem(row) ? 'yellow' : 'dim';
      const head = [row.slide, paint(style, IN_WORDS[row.state].title)];
      if (row.results.length === 0) return [{ cells: head, note: row.reason?.message }];
      return row.results.map(({ model, tiles, tissueMm2, outputs: values }, index) => ({
        cells: [
          ...head,
          ...(several ? [model] : []),
          tiles.ok.toLocaleString('en') + (tiles.unreadable > 0 ? ` (+${tiles.unreadable} unreadable)` : ''),
          tissueMm2.toFixed(2),
          ...outputs.map((column) => cell(values[column])),
        ],
        note: index === row.results.length - 1 ? row.reason?.message : undefined,
      }));
    });
  const outputs: string[] = [];
  const right = (title: string): Column => ({ title, align: 'right' });
  const answered = rows.some(({ results }) => results.length > 0);
  for (const output of answered ? mainOutputs(models) : []) {
    const more = [...outputs, output];
    if (tableWidth([...columns, ...more.map(right)], withOutputs(more)) > width) break;
    outputs.push(output);
  }
  return table([...columns, ...outputs.map(right)], withOutputs(outputs), paint, width);
}

function cell(value: number | string | null | undefined): string {
  if (value === null || value === undefined) return '–';
  return typeof value === 'number' ? Number(value.toPrecision(4)).toString() : value;
}
