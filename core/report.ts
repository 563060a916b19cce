/**
 * The run's report for people: plain pages that need nothing beside the run's folder, opened from a disk or a bucket.
 * What went wrong stands first; every heatmap lies exactly over its slide's thumbnail. All text is escaped.
 */
import { createHash } from 'node:crypto';

import { inOrder, splitColumn } from './aggregate.ts';
import { COLORMAPS, toHex } from './colormaps.ts';
import {
  type Aggregate,
  type HeatmapGeometry,
  type JobItem,
  type JobKind,
  type ResultSummary,
  type RunState,
  SLIDE_STATES,
  type SlideState,
} from './contracts.ts';
import { IN_WORDS, RUN_IN_WORDS } from './notification.ts';
import { REPORT_SCRIPT, REPORT_STYLE } from './report-assets.ts';
import { isProblem, type RunHead, type SlideRow } from './results.ts';

export interface ReportPage {
  /** `index.html`, then `page-2.html`, … */
  name: string;
  html: string;
}

export const SLIDES_PER_PAGE = 200;
/** Outputs that a card lists; the rest (of an embedding, say) is in result.json. */
const OUTPUTS_PER_CARD = 12;

/** The pages of a run, one after the other; `rows` gives the lines with problems first. */
export async function* reportPages(run: RunHead, rows: AsyncIterable<SlideRow>): AsyncGenerator<ReportPage> {
  const total = Object.values(run.counts).reduce((sum, count) => sum + count, 0);
  const pages = Math.max(1, Math.ceil(total / SLIDES_PER_PAGE));
  let number = 0;
  let page: SlideRow[] = [];
  for await (const row of rows) {
    page.push(row);
    if (page.length < SLIDES_PER_PAGE) continue;
    number += 1;
    yield { name: pageName(number), html: renderPage(run, page, number, pages) };
    page = [];
  }
  if (page.length > 0 || number === 0) {
    yield { name: pageName(number + 1), html: renderPage(run, page, number + 1, pages) };
  }
}

const pageName = (number: number) => (number === 1 ? 'index.html' : `page-${number}.html`);

function renderPage(run: RunHead, rows: SlideRow[], number: number, pages: number): string {
  const problems = rows.filter(isProblem);
  const others = rows.filter((row) => !isProblem(row));
  const scriptHash = createHash('sha256').update(REPORT_SCRIPT).digest('base64');
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'; script-src 'sha256-${scriptHash}'">
<title>${text(run.study)} · Slideway</title>
<style>${REPORT_STYLE}</style>
</head>
<body>
<a class="skip" href="#slides">Skip to the slides</a>
${header(run)}
<main id="slides">
${
  rows.length === 0
    ? '<p class="empty">There is no slide in this run.</p>'
    : `${toolbar(rows, number, pages)}
${section('Needs attention', 'problems', problems, whatToDo(problems))}
${section(problems.length > 0 || number > 1 ? 'Results' : 'Slides', 'results', others)}
<p class="empty" id="none" hidden>No slide on this page matches.</p>
${pager(number, pages)}`
}
</main>
<footer>Slideway ${text(run.codeVersion)} · run ${text(run.runId)} · <a href="../run.json">run.json</a> · <a href="../results.csv">results.csv</a></footer>
<script>${REPORT_SCRIPT}</script>
</body>
</html>
`;
}

// --- the run ------------------------------------------------------------------------------------------------------

const RUN_TONE: Record<RunState, Tone> = {
  RUNNING: 'plain',
  SUCCEEDED: 'good',
  PARTIAL: 'look',
  FAILED: 'bad',
};
type Tone = 'good' | 'look' | 'bad' | 'plain';

function header(run: RunHead): string {
  const counts = SLIDE_STATES.filter((state) => (run.counts[state] ?? 0) > 0);
  return `<header class="run">
<div class="title"><h1>${text(run.study)}</h1>${chip(capitalise(RUN_IN_WORDS[run.state]), RUN_TONE[run.state])}</div>
<p class="soft">Run <code>${text(run.runId)}</code> · ${when(run.startedAt)} · ${duration(run.startedAt, run.endedAt)}</p>
${run.reason ? `<div class="notice" role="note"><strong>${text(run.reason.error)}</strong><p>${text(run.reason.message)}</p></div>` : ''}
${
  counts.length > 0
    ? `<ul class="counts">${counts
        .map(
          (state) =>
            `<li class="${toneOf(state)}"><b>${count(run.counts[state] ?? 0)}</b> ${IN_WORDS[state].title.toLowerCase()}</li>`,
        )
        .join('')}</ul>`
    : ''
}
<details>
<summary>About this run</summary>
<div class="scroll">
${
  run.models.length > 0
    ? `<table><thead><tr><th>Model</th><th>Version</th><th>Digest of the package</th><th>Licence</th></tr></thead><tbody>
${run.models
  .map(
    ({ name, version, digest, license }) =>
      `<tr><td>${text(name)}</td><td>${text(version)}</td><td><code>${text(digest)}</code></td><td>${text(license)}</td></tr>`,
  )
  .join('\n')}
</tbody></table>`
    : ''
}
${
  run.jobs.length > 0
    ? `<table><thead><tr><th>Job</th><th>What it did</th><th>Ended</th><th>Machines</th><th>Instance time</th></tr></thead><tbody>
${run.jobs.map(jobRow).join('\n')}
</tbody></table>`
    : ''
}
</div>
<dl class="facts">
${fact('Manifest', `<code>s3://${text(run.manifest.bucket)}/${text(run.manifest.key)}</code>`)}
${run.manifest.versionId ? fact('Its version', `<code>${text(run.manifest.versionId)}</code>`) : ''}
${fact('Started', when(run.startedAt))}
${fact('Ended', when(run.endedAt))}
${Object.entries(run.parameters ?? {})
  .map(([name, value]) => fact(text(name), String(value)))
  .join('\n')}
${fact('Code version', text(run.codeVersion))}
${fact('Instance time', seconds(run.cost.instanceSeconds))}
${fact('Estimated cost', `${run.cost.estimatedUsd.toFixed(2)} USD (prices of ${text(run.cost.prices)})`)}
</dl>
</details>
</header>`;
}

const KIND_IN_WORDS: Record<JobKind, string> = {
  process: 'slides to predictions',
  tile: 'slides to tiles',
  transform: 'tiles to predictions',
  join: 'predictions to slides',
};

function jobRow(job: JobItem): string {
  const { jobName, kind = 'process', state, reason, instanceCount, instanceType, instanceSeconds } = job;
  const ended = reason ? `${state}: ${reason.error}` : state;
  return `<tr><td><code>${text(jobName)}</code></td><td>${KIND_IN_WORDS[kind]}</td><td>${text(ended)}</td><td>${instanceCount} × ${text(instanceType)}</td><td>${seconds(instanceSeconds)}</td></tr>`;
}

const fact = (name: string, html: string) => `<div><dt>${name}</dt><dd>${html}</dd></div>`;

// --- finding ------------------------------------------------------------------------------------------------------

function toolbar(rows: SlideRow[], number: number, pages: number): string {
  const states = SLIDE_STATES.filter((state) => rows.some((row) => row.state === state));
  const outputs = new Set(
    rows.flatMap(({ results }) =>
      results.flatMap((result) =>
        Object.entries(result.outputs)
          .filter(([, value]) => typeof value === 'number')
          .map(([name]) => name),
      ),
    ),
  );
  return `<form class="toolbar" role="search">
<label class="grow"><span>Find</span><input type="search" id="find" placeholder="slide, reason, model" autocomplete="off"></label>
<label><span>Show</span><select id="state"><option value="">all</option>${states
    .map((state) => `<option value="${state}">${IN_WORDS[state].title.toLowerCase()}</option>`)
    .join('')}</select></label>
<label><span>Sort by</span><select id="sort"><option value="line">line of the manifest</option><option value="id">slide</option><option value="tissue">tissue area</option><option value="tiles">tiles</option>${[
    ...outputs,
  ]
    .slice(0, 100)
    .map((name) => `<option value="output:${text(name)}">${text(name)}</option>`)
    .join('')}</select></label>
<label><span>Heatmaps</span><input type="range" id="heat" min="0" max="100" value="60"></label>
<output id="shown" aria-live="polite">${rows.length} slides${pages > 1 ? ' on this page' : ''}</output>
</form>
${pager(number, pages)}`;
}

/** First, last, and the pages around this one. */
function pager(number: number, pages: number): string {
  if (pages === 1) return '';
  const shown = [...new Set([1, number - 1, number, number + 1, pages])].filter((n) => n >= 1 && n <= pages);
  const links = shown.map((n, i) => {
    const gap = i > 0 && n - (shown[i - 1] ?? n) > 1 ? '<span>…</span>' : '';
    return `${gap}<a href="${pageName(n)}"${n === number ? ' aria-current="page"' : ''}>${n}</a>`;
  });
  return `<nav class="pager" aria-label="Pages">${
    number > 1 ? `<a href="${pageName(number - 1)}" rel="prev">Previous</a>` : ''
  }${links.join('')}${number < pages ? `<a href="${pageName(number + 1)}" rel="next">Next</a>` : ''}</nav>`;
}

/** Once for each state that is there, not at every slide. */
function whatToDo(rows: SlideRow[]): string {
  const states = SLIDE_STATES.filter((state) => rows.some((row) => row.state === state));
  return `<dl class="advice">${states
    .map((state) => `<div><dt>${IN_WORDS[state].title}</dt><dd>${text(IN_WORDS[state].advice)}</dd></div>`)
    .join('')}</dl>`;
}

function section(title: string, id: string, rows: SlideRow[], introduction = ''): string {
  if (rows.length === 0) return '';
  return `<section id="${id}"><h2>${title}</h2>
${introduction}
<div class="cards">
${rows.map(card).join('\n')}
</div></section>`;
}

// --- a slide ------------------------------------------------------------------------------------------------------

const toneOf = (state: SlideState): Tone =>
  state === 'AGGREGATED'
    ? 'good'
    : state === 'FAILED'
      ? 'bad'
      : state === 'QUARANTINED' || state === 'MISSING'
        ? 'look'
        : 'plain';

function card(row: SlideRow): string {
  const values: Record<string, number> = {};
  for (const { outputs } of row.results) {
    for (const [name, value] of Object.entries(outputs)) if (typeof value === 'number') values[name] = value;
  }
  const sum = (of: (result: ResultSummary) => number) => Math.max(0, ...row.results.map(of));
  return `<article class="card${row.results.length > 1 ? ' wide' : ''}" data-id="${text(row.slideId)}" data-state="${row.state}" data-line="${row.line}" data-tissue="${sum((r) => r.tissueMm2)}" data-tiles="${sum((r) => r.tiles.ok)}" data-values="${text(JSON.stringify(values))}">
<div class="title"><h3>${text(row.slideId)}</h3>${chip(IN_WORDS[row.state].title, toneOf(row.state))}</div>
<p class="soft">${text(row.slide)} · line ${row.line}</p>
${
  row.reason
    ? `<div class="reason ${toneOf(row.state)}"><p>${text(row.reason.message)}</p><p class="soft"><code>${text(row.reason.error)}</code></p></div>`
    : ''
}
${row.results.length > 0 ? `<div class="answers">${row.results.map((result) => answer(row, result)).join('\n')}</div>` : ''}
</article>`;
}

/** One model's answer: the picture, the numbers, and where the rest is. */
function answer(row: SlideRow, result: ResultSummary): string {
  const folder = `../slides/${segment(row.slideId)}/${segment(result.model)}/`;
  return `<div class="answer">
${picture(row, result, folder)}
${result.note ? `<p class="note">${text(result.note)}</p>` : ''}
<dl class="facts"><div><dt>Model</dt><dd>${text(result.model)} ${text(result.version)}</dd></div><div><dt>Tiles</dt><dd>${count(result.tiles.ok)}</dd></div><div><dt>Tissue</dt><dd>${measure(result.tissueMm2)} mm²</dd></div>${predicted(result)}</dl>
${head(result)}
${numbers(result)}
<p class="links"><a href="${folder}result.json">result.json</a>${result.heatmap ? `<a href="${folder}heatmap.png">heatmap.png</a>` : ''}<a href="${folder}tissue.geojson">tissue.geojson</a></p>
</div>`;
}

/** The thumbnail with the heatmap's slide area laid over it; its legend hangs over the edge and is cut off. */
function picture(row: SlideRow, { size, heatmap }: ResultSummary, folder: string): string {
  if (!size) return '';
  const share = (pixels: number, whole: number) =>
    `${(((pixels * (heatmap?.level0PerPixel ?? 1)) / whole) * 100).toFixed(4)}%`;
  const overlay = heatmap
    ? `<img class="heat" loading="lazy" src="${folder}heatmap.png" alt="Heatmap of ${text(heatmap.output)} over ${text(row.slideId)}" style="width:${share(heatmap.picture.width, size.width)};height:${share(heatmap.picture.height, size.height)}">`
    : '';
  return `<figure>
<div class="view" style="--ratio:${(size.width / size.height).toFixed(5)}"><img loading="lazy" src="${folder}thumbnail.jpg" alt="Thumbnail of ${text(row.slideId)}">${overlay}</div>
${heatmap ? legend(row, heatmap) : ''}
</figure>`;
}

function legend(row: SlideRow, { range, colormap, output }: HeatmapGeometry): string {
  const colours = COLORMAPS[colormap].filter((_, i) => i % 4 === 0).map(toHex);
  const percentile = range.of === 'p1-p99' ? ' <span class="soft">1st to 99th percentile</span>' : '';
  return `<figcaption><span class="name">${text(output)}${percentile}</span><input type="range" class="own" min="0" max="100" value="60" aria-label="Heatmap over ${text(row.slideId)}">
<span class="bar" style="background:linear-gradient(90deg,${colours.join(',')})"></span><span class="ends"><span>${measure(range.min)}</span><span>${measure((range.min + range.max) / 2)}</span><span>${measure(range.max)}</span></span></figcaption>`;
}

const predicted = ({ outputs: { predicted_mean: mean, predicted_vote: vote } }: ResultSummary) =>
  mean === undefined
    ? ''
    : `<div><dt>Predicted</dt><dd>${text(String(mean ?? '–'))}${
        vote === mean ? '' : ` <span class="soft">(most tiles: ${text(String(vote ?? '–'))})</span>`
      }</dd></div>`;

/** What the package's own head says of the whole slide. */
function head({ outputs }: ResultSummary): string {
  const said = Object.entries(outputs).flatMap(([key, value]) =>
    key.startsWith('head_') && typeof value !== 'string' ? [{ name: key.slice('head_'.length), value }] : [],
  );
  if (said.length === 0) return '';
  const answer = outputs.predicted_head;
  const more = said.length - OUTPUTS_PER_CARD;
  return `<div class="scroll"><table class="numbers"><thead><tr><th>Whole slide</th><th>${text(String(answer ?? ''))}</th></tr></thead><tbody>
${said
  .slice(0, OUTPUTS_PER_CARD)
  .map(
    ({ name, value }) =>
      `<tr><th scope="row">${text(name)}</th><td>${typeof value === 'number' ? measure(value) : '–'}</td></tr>`,
  )
  .join('\n')}
</tbody></table>${more > 0 ? `<p class="soft">and ${count(more)} more in result.json</p>` : ''}</div>`;
}

/** Aggregates across; each output's name over its numbers, because names are long and cards are narrow. */
function numbers({ outputs }: ResultSummary): string {
  const rows = new Map<string, Map<string, number | null>>();
  const used = new Set<Aggregate>();
  for (const [key, value] of Object.entries(outputs)) {
    const column = splitColumn(key);
    if (!column || typeof value === 'string') continue;
    const { aggregate, output } = column;
    rows.set(output, (rows.get(output) ?? new Map()).set(aggregate, value));
    used.add(aggregate);
  }
  if (rows.size === 0) return '';
  const columns = inOrder(used);
  const more = rows.size - OUTPUTS_PER_CARD;
  return `<div class="scroll"><table class="numbers"><thead><tr>${columns
    .map((aggregate) => `<th>${aggregate.replace('top_k_mean', 'top-k')}</th>`)
    .join('')}</tr></thead><tbody>
${[...rows]
  .slice(0, OUTPUTS_PER_CARD)
  .map(
    ([output, row]) =>
      `<tr><th colspan="${columns.length}" scope="rowgroup">${text(output)}</th></tr><tr>${columns
        .map((aggregate) => {
          const value = row.get(aggregate);
          return `<td>${typeof value === 'number' ? measure(value) : '–'}</td>`;
        })
        .join('')}</tr>`,
  )
  .join('\n')}
</tbody></table>${more > 0 ? `<p class="soft">and ${count(more)} more in result.json</p>` : ''}</div>`;
}

// --- words and numbers --------------------------------------------------------------------------------------------

const chip = (label: string, tone: Tone) => `<span class="chip ${tone}">${text(label)}</span>`;

const text = (value: string) => value.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);

const segment = (name: string) => text(encodeURIComponent(name));

const capitalise = (words: string) => {
  const state = words.replace(/^(is|has) /, '');
  return state.charAt(0).toUpperCase() + state.slice(1);
};

const count = (value: number) => value.toLocaleString('en-GB');

/** Four significant digits, without trailing zeros; very small numbers with an exponent, so that they stay short. */
const measure = (value: number) => {
  const small = value !== 0 && Math.abs(value) < 0.001;
  return (small ? value.toExponential(1) : String(Number(value.toPrecision(4)))).replaceAll('-', '−');
};

const when = (iso: string) =>
  `<time datetime="${text(iso)}">${text(iso.slice(0, 16).replace('T', ' '))} UTC</time>`;

const duration = (from: string, to: string) => seconds((Date.parse(to) - Date.parse(from)) / 1000);

function seconds(value: number): string {
  if (value < 100) return `${Math.round(value)} s`;
  const minutes = Math.round(value / 60);
  return minutes < 100 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
