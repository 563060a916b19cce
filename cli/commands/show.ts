/** `slideway runs` and `slideway show`: what has run, and what became of each slide. */
import type { JobItem, RunItem, RunSummary, SlideState } from '../../core/contracts.ts';
import { runJsonKey } from '../../core/keys.ts';
import { IN_WORDS } from '../../core/notification.ts';
import { readJson } from '../../core/store.ts';
import { type Deployment, openForReading, type Place, placeOf } from '../deployment.ts';
import { readAnswers, resultsTable } from '../results.ts';
import { table } from '../table.ts';
import { duration, EXIT, type Paint, plural, usageError } from '../terminal.ts';
import { listRuns } from '../watch.ts';
import type { Streams } from './run.ts';

export interface ShowOptions extends Place {
  json?: boolean;
}

/** Opens what the state folder holds, for looking only; `work` gets nothing where nothing has run yet. */
export async function reading<T>(
  options: ShowOptions,
  { screen }: Streams,
  work: (deployment: Deployment | undefined) => Promise<T>,
): Promise<T> {
  const deployment = await openForReading(screen, placeOf(options));
  try {
    return await work(deployment);
  } finally {
    await deployment?.close();
  }
}

export const showRuns = (options: ShowOptions, streams: Streams): Promise<number> =>
  reading(options, streams, async (deployment) => {
    const { answer, width } = streams;
    const runs = deployment ? await listRuns(deployment) : [];
    if (options.json) answer.print(JSON.stringify(runs.map(publicRun), null, 2));
    else if (runs.length === 0) answer.print('Nothing has run yet. Try: slideway demo');
    else {
      const rows = runs.map((run) => ({
        cells: [
          run.runId,
          painted(run, answer.paint),
          localTime(run.startedAt),
          took(run),
          countsInWords(run.counts) || (run.reason?.message ?? ''),
        ],
      }));
      const columns = ['run', 'state', 'started', 'took', 'slides'].map((title) => ({ title }));
      for (const line of table(columns, rows, answer.paint, width)) answer.print(line);
    }
    return EXIT.succeeded;
  });

export const showRun = (id: string, options: ShowOptions, streams: Streams): Promise<number> =>
  reading(options, streams, async (deployment) => {
    const { answer } = streams;
    const run = pick(deployment ? await listRuns(deployment) : [], id);
    if (!deployment) return EXIT.failed;
    const summary = (await readJson(deployment.s3, {
      bucket: deployment.outputs.SilverBucket,
      key: runJsonKey(run.runId),
    })) as RunSummary | undefined;
    const answers = await readAnswers(deployment, run);
    const jobs: JobItem[] = [];
    for await (const job of deployment.state.jobs(run.runId)) jobs.push(job);
    if (options.json) {
      answer.print(JSON.stringify(summary ?? { ...publicRun(run), slides: answers.rows, jobs }, null, 2));
      return EXIT.succeeded;
    }
    for (const line of describe(run, summary, jobs, answer.paint)) answer.print(line);
    if (answers.rows.length > 0) {
      answer.print();
      for (const line of resultsTable(answers, answer.paint, streams.width)) answer.print(line);
    }
    const states = new Set(answers.rows.map(({ state }) => state));
    const advised = [...states].filter((state) => IN_WORDS[state].advice !== '');
    if (advised.length > 0) {
      answer.print();
      answer.print(answer.paint('bold', 'What to do'));
      for (const state of advised) answer.print(`  ${IN_WORDS[state].title}: ${IN_WORDS[state].advice}`);
    }
    return EXIT.succeeded;
  });

/** The run that an id, or the beginning of one, means. */
export function pick(runs: RunItem[], id: string): RunItem {
  const exact = runs.find(({ runId }) => runId === id);
  if (exact) return exact;
  const found = runs.filter(({ runId }) => runId.startsWith(id));
  if (found[0] && found.length === 1) return found[0];
  throw usageError(
    found.length === 0
      ? `There is no run ${id}. \`slideway runs\` lists them.`
      : `${id} may be any of ${found.map(({ runId }) => runId).join(', ')}.`,
  );
}

/** The head of a run's page. */
export function describe(
  run: RunItem,
  summary: RunSummary | undefined,
  jobs: JobItem[],
  paint: Paint,
): string[] {
  const { manifest } = run;
  const lines = [
    `${paint('bold', run.runId)}  ${painted(run, paint)}`,
    ...(run.reason ? [`Reason    ${run.reason.message} (${run.reason.error})`] : []),
    `Manifest  s3://${manifest.bucket}/${manifest.key}${manifest.versionId ? ` (version ${manifest.versionId})` : ''}`,
    `Started   ${localTime(run.startedAt)}${run.endedAt ? `, took ${took(run)}` : ''}`,
    `Slides    ${countsInWords(run.counts) || 'not planned'}`,
  ];
  for (const model of summary?.models ?? []) {
    lines.push(`Model     ${model.name} ${model.version}  ${paint('dim', model.digest.slice(0, 19))}`);
  }
  for (const job of jobs) {
    const machine = `${job.instanceCount} × ${job.instanceType}, ${duration(job.instanceSeconds)}`;
    const why = job.reason ? `: ${job.reason.message}` : '';
    lines.push(`Job       ${job.jobName}  ${job.state}${why}  ${paint('dim', machine)}`);
  }
  if (summary) {
    const { estimatedUsd, transitions, prices } = summary.cost;
    const requests = Object.values(summary.cost.requests).reduce((sum, count) => sum + count, 0);
    lines.push(
      `Cost      about $${estimatedUsd.toFixed(4)} on AWS at the prices of ${prices} ` +
        paint('dim', `(${plural(requests, 'request')}, ${plural(transitions, 'transition')})`),
    );
  }
  return lines;
}

const publicRun = ({ runId, study, state, reason, startedAt, endedAt, counts, manifest }: RunItem) => ({
  runId,
  study,
  state,
  reason: reason ?? null,
  startedAt,
  endedAt: endedAt ?? null,
  counts: counts ?? {},
  manifest,
});

function painted({ state }: RunItem, paint: Paint): string {
  const styles = { SUCCEEDED: 'green', PARTIAL: 'yellow', FAILED: 'red', RUNNING: 'cyan' } as const;
  return paint(styles[state], state);
}

const localTime = (iso: string): string => {
  const time = new Date(iso);
  const two = (value: number) => String(value).padStart(2, '0');
  return `${time.getFullYear()}-${two(time.getMonth() + 1)}-${two(time.getDate())} ${two(time.getHours())}:${two(time.getMinutes())}`;
};

const took = ({ startedAt, endedAt }: RunItem): string =>
  endedAt ? duration((Date.parse(endedAt) - Date.parse(startedAt)) / 1000) : '';

const countsInWords = (counts: RunItem['counts'] = {}): string =>
  (Object.entries(counts) as [SlideState, number][])
    .filter(([, count]) => count > 0)
    .map(([state, count]) => `${count} ${IN_WORDS[state].title.toLowerCase()}`)
    .join(', ');
