/**
 * The run's results as documents: a row per line of the manifest, `results.csv` and `run.json`. Both are made as text
 * streams, because a run may have a hundred thousand slides.
 */
import type {
  Plan,
  PlannedSlide,
  Reason,
  ResultSummary,
  RunSlide,
  RunState,
  RunSummary,
  SlideItem,
  SlideState,
} from './contracts.ts';
import { isFinal } from './state.ts';

/** What became of one line of the manifest. */
export interface SlideRow {
  slideId: string;
  slide: string;
  line: number;
  state: SlideState;
  reason: Reason | null;
  checksum: string | null;
  /** Models that the line asked for. */
  models: string[];
  results: ResultSummary[];
}

/** The part of a slide's item that results speak of. */
export interface SlideEnd extends Pick<SlideItem, 'state' | 'reason' | 'results'> {
  checksum?: string;
}

/** The state of a slide when its run is published: a slide under way when the run ended has failed. */
export function slideRow(planned: PlannedSlide, item: SlideEnd | undefined): SlideRow {
  const { slideId, slide, line, models } = planned;
  // A line that the plan decided has no item of its own: one under its id belongs to another line.
  const current = planned.state === 'EXPECTED' ? item : undefined;
  const state = current?.state ?? planned.state;
  const ended = isFinal(state) || state === 'MISSING';
  return {
    slideId,
    slide,
    line,
    state: ended ? state : 'FAILED',
    reason: ended ? ((current ? current.reason : planned.reason) ?? null) : unfinished(state),
    checksum: current?.checksum ?? null,
    models,
    results: current?.results ?? [],
  };
}

/** The reason of a slide that was under way when its run ended. */
export const UNFINISHED = 'Unfinished';

const unfinished = (state: SlideState): Reason => ({
  error: UNFINISHED,
  message: `The run ended while the slide was ${state}. Drop the manifest again to have it done.`,
});

/** A line of a plan that was broken off before it stood: nothing takes the slide in by itself when it comes. */
export const withoutWaiting = (line: PlannedSlide): PlannedSlide =>
  line.state === 'MISSING'
    ? {
        ...line,
        state: 'FAILED',
        reason: {
          error: UNFINISHED,
          message: `${line.reason?.message ?? 'It is not in Landing.'} The run failed before it could wait for it: drop the manifest again.`,
        },
      }
    : line;

/** A line that somebody has to look at; a repeated line has its result elsewhere. */
export const isProblem = ({ state }: Pick<SlideRow, 'state'>): boolean =>
  state !== 'AGGREGATED' && state !== 'DUPLICATE';

/** SUCCEEDED when every slide has its results, FAILED when none has, repeated lines aside. */
export function runStateOf(counts: Partial<Record<SlideState, number>>): Exclude<RunState, 'RUNNING'> {
  const slides = Object.entries(counts).reduce((sum, [state, n]) => sum + (state === 'DUPLICATE' ? 0 : n), 0);
  const done = counts.AGGREGATED ?? 0;
  if (done === 0) return 'FAILED';
  return done === slides ? 'SUCCEEDED' : 'PARTIAL';
}

// --- results.csv ------------------------------------------------------------------------------------------------

const COLUMNS = [
  'slide_id',
  'slide',
  'state',
  'reason',
  'model',
  'model_version',
  'tiles_ok',
  'tiles_unreadable',
  'tissue_mm2',
];

/**
 * The columns that the run's models fill: `<aggregate>_<output>`, then the predicted class, then what heads say. The
 * thousands of numbers of an embedding are no columns.
 */
export function outputColumns(models: Plan['models']): string[] {
  const columns = models.flatMap(({ model }) =>
    model.task === 'embedding'
      ? []
      : model.aggregate.flatMap((aggregate) => model.outputs.map((output) => `${aggregate}_${output}`)),
  );
  if (models.some(({ model }) => model.task === 'classification')) {
    columns.push('predicted_mean', 'predicted_vote');
  }
  const heads = models.flatMap(({ model }) => model.head ?? []);
  columns.push(...heads.flatMap(({ outputs }) => outputs.map((output) => `head_${output}`)));
  if (heads.some(({ task }) => task === 'classification')) columns.push('predicted_head');
  return [...new Set(columns)];
}

/** RFC 4180: a line per slide and model; a slide without a result has its line too. */
export async function* resultsCsv(
  rows: AsyncIterable<SlideRow>,
  models: Plan['models'],
): AsyncGenerator<string> {
  const outputs = outputColumns(models);
  const versions = new Map(models.map(({ name, version }) => [name, version]));
  yield csvLine([...COLUMNS, ...outputs]);
  for await (const row of rows) {
    const reason = row.reason ? `${row.reason.error}: ${row.reason.message}` : '';
    const head = [row.slideId, row.slide, row.state, reason];
    const names = new Set([...row.models, ...row.results.map(({ model }) => model)]);
    for (const name of names.size > 0 ? names : ['']) {
      const result = row.results.find(({ model }) => model === name);
      yield csvLine([
        ...head,
        name,
        result?.version ?? versions.get(name) ?? '',
        result?.tiles.ok,
        result?.tiles.unreadable,
        result?.tissueMm2,
        ...outputs.map((column) => result?.outputs[column]),
      ]);
    }
  }
}

const csvLine = (cells: (string | number | null | undefined)[]) => `${cells.map(csvCell).join(',')}\r\n`;

/** Text that a spreadsheet would take for a formula gets an apostrophe before it. */
function csvCell(value: string | number | null | undefined): string {
  if (value === null || value === undefined) return '';
  if (typeof value === 'number') return String(value);
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

// --- run.json ---------------------------------------------------------------------------------------------------

/** All of run.json but the slides. */
export type RunHead = Omit<RunSummary, 'slides'>;

/** The text of run.json, slide after slide; the slides are its last member. */
export async function* runJson(head: RunHead, rows: AsyncIterable<SlideRow>): AsyncGenerator<string> {
  yield `${JSON.stringify(head, null, 2).slice(0, -2)},\n  "slides": [`;
  let separator = '\n';
  for await (const row of rows) {
    yield `${separator}    ${JSON.stringify(runSlide(row))}`;
    separator = ',\n';
  }
  yield `${separator === '\n' ? '' : '\n  '}]\n}\n`;
}

const runSlide = ({ models: _, results, ...row }: SlideRow): RunSlide => ({
  ...row,
  results: results.map(({ model, version, key, outputs }) => ({ model, version, key, outputs })),
});
