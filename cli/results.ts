/** The results of a run on this machine's disk and as a table. */
import { createWriteStream } from 'node:fs';
import { mkdir, rename, rm, stat, utimes } from 'node:fs/promises';
import { dirname, resolve, sep } from 'node:path';
import type { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { GetObjectCommand, paginateListObjectsV2 } from '@aws-sdk/client-s3';
import { forEachConcurrently } from '../core/concurrency.ts';
import type { Plan, RunItem, SlideItem } from '../core/contracts.ts';
import { reportPrefix, resultsCsvKey, runJsonKey, runPrefix, slidesPrefix } from '../core/keys.ts';
import { IN_WORDS } from '../core/notification.ts';
import { isProblem, outputColumns, type SlideRow, slideRow } from '../core/results.ts';
import type { Deployment } from './deployment.ts';
import { type Column, table } from './table.ts';
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

export interface Answers {
  rows: SlideRow[];
  models: Plan['models'];
}

/** What became of each line of the manifest so far. */
export async function readAnswers(deployment: Deployment, run: RunItem): Promise<Answers> {
  const plan = await readPlan(deployment, run.runId);
  const items = new Map<string, SlideItem>();
  for await (const item of deployment.state.slides(run.runId)) items.set(item.slideId, item);
  const rows = (await readPlanned(deployment, run.runId)).map((planned) => {
    const item = items.get(planned.slideId);
    const row = slideRow(planned, item);
    // A slide that is under way is unfinished only once the run has ended.
    const current = planned.state === 'EXPECTED' && item ? item : planned;
    return run.state === 'RUNNING' ? { ...row, state: current.state, reason: current.reason ?? null } : row;
  });
  return { rows, models: plan?.models ?? [] };
}

/** Columns of numbers that a table shows beside tiles and tissue. */
const OUTPUTS_SHOWN = 3;

/** The answers as a table: a line per slide and model, with numbers or with the reason why there are none. */
export function resultsTable({ rows, models }: Answers, paint: Paint, width: number): string[] {
  const shown = outputColumns(models).slice(0, OUTPUTS_SHOWN);
  const several = models.length > 1;
  const troubled = rows.some((row) => row.reason !== null);
  const columns: Column[] = [
    { title: 'slide' },
    { title: 'state' },
    ...(several ? [{ title: 'model' }] : []),
    { title: 'tiles', align: 'right' },
    { title: 'tissue mm²', align: 'right' },
    ...shown.map((title): Column => ({ title, align: 'right' })),
    ...(troubled ? [{ title: 'reason' }] : []),
  ];
  const cells = rows.flatMap((row) => {
    const style = row.state === 'AGGREGATED' ? 'green' : isProblem(row) ? 'yellow' : 'dim';
    const head = [row.slide, paint(style, IN_WORDS[row.state].title)];
    const reason = troubled ? [row.reason?.message ?? ''] : [];
    if (row.results.length === 0) {
      return [[...head, ...Array<string>(columns.length - head.length - reason.length).fill(''), ...reason]];
    }
    return row.results.map((result) => [
      ...head,
      ...(several ? [result.model] : []),
      result.tiles.ok.toLocaleString('en') +
        (result.tiles.unreadable > 0 ? ` (+${result.tiles.unreadable} unreadable)` : ''),
      result.tissueMm2.toFixed(2),
      ...shown.map((column) => cell(result.outputs[column])),
      ...reason,
    ]);
  });
  return table(columns, cells, paint, width);
}

function cell(value: number | string | null | undefined): string {
  if (value === null || value === undefined) return '–';
  return typeof value === 'number' ? Number(value.toPrecision(4)).toString() : value;
}
