/** How a run that goes on is shown: a block that is redrawn, or lines that tell what has changed. */
import { IN_WORDS } from '../core/notification.ts';
import { bytes, duration, type Paint, plural } from './terminal.ts';
import type { RunView, SlideView, Stage, Tiles } from './watch.ts';

export const STAGE_IN_WORDS: Record<Stage, string> = {
  plan: 'Reading the manifest',
  copy: 'Copying slides to Bronze',
  analyse: 'Analysing slides',
  aggregate: 'Aggregating results',
  publish: 'Writing the report',
};

const BAR = 20;
const NAME = 36;

const COPIED = new Set(['INGESTED', 'INFERRING', 'INFERRED', 'AGGREGATED']);
const TROUBLE = new Set(['MISSING', 'QUARANTINED', 'FAILED']);

const isCopied = (slide: SlideView) => COPIED.has(slide.state);
const isDone = (slide: SlideView) => slide.state === 'AGGREGATED';
const isAnalysed = (slide: SlideView) => slide.analysed || slide.state === 'INFERRED' || isDone(slide);
const inTrouble = (slide: SlideView) => TROUBLE.has(slide.state);

/** `███████░░░`, `share` from 0 to 1. */
export function bar(share: number, width: number, paint: Paint): string {
  const full = Math.round(Math.min(Math.max(share, 0), 1) * width);
  return paint('cyan', '█'.repeat(full)) + paint('dim', '░'.repeat(width - full));
}

const count = (value: number) => Math.round(value).toLocaleString('en');

function tilesInWords({ done, total, perSecond }: Tiles): string {
  const speed = perSecond > 0 ? `  ${count(perSecond)} tiles/s` : '';
  return `${count(done)}/${count(total)} tiles${speed}`;
}

function sumOf(slides: SlideView[]): Tiles {
  const sum = { done: 0, total: 0, perSecond: 0 };
  for (const { tiles } of slides) {
    sum.done += tiles?.done ?? 0;
    sum.total += tiles?.total ?? 0;
    sum.perSecond += tiles?.perSecond ?? 0;
  }
  return sum;
}

/** The block: the run, how far each stage is, and the slides that are being worked on. */
export function block(view: RunView, paint: Paint, seconds: number): string[] {
  const { run, stage, slides } = view;
  const lines = [`${paint('bold', run.runId)}  ${STAGE_IN_WORDS[stage]}  ${paint('dim', duration(seconds))}`];
  const working = slides.filter((slide) => slide.state !== 'DUPLICATE' && !inTrouble(slide));
  const troubled = slides.filter(inTrouble);
  if (slides.length > 0) {
    const row = (title: string, done: number, detail = '') => {
      const share = working.length === 0 ? 0 : done / working.length;
      const text = `  ${title.padEnd(11)} ${bar(share, BAR, paint)} ${count(done)}/${count(working.length)}`;
      return detail ? `${text}  ${paint('dim', detail)}` : text;
    };
    const tiles = sumOf(slides);
    lines.push(
      row('Copied', working.filter(isCopied).length),
      row('Analysed', working.filter(isAnalysed).length, tiles.total > 0 ? tilesInWords(tiles) : ''),
      row('Aggregated', working.filter(isDone).length),
    );
  }
  if (troubled.length > 0) {
    lines.push(paint('yellow', `  ${plural(troubled.length, 'slide')} set aside`));
  }
  for (const slide of working) {
    const name = slide.slide.length > NAME ? `…${slide.slide.slice(1 - NAME)}` : slide.slide.padEnd(NAME);
    if (slide.state === 'COPYING') lines.push(`  ${name}  copying ${bytes(slide.bytes ?? 0)}`);
    else if (slide.tiles && !isAnalysed(slide)) {
      const { done, total } = slide.tiles;
      lines.push(`  ${name}  ${bar(total > 0 ? done / total : 0, BAR, paint)} ${tilesInWords(slide.tiles)}`);
    }
  }
  return lines;
}

/** What of a slide has been told. */
type Told = Map<string, { text: string; percent: number }>;

/** Tells a run line by line: stages as they begin, slides as they get on, tiles now and then. */
export class Teller {
  readonly #told: Told = new Map();
  #stage: Stage | undefined;
  #planned = false;

  /** Lines for what has changed since the last view. */
  tell({ stage, slides }: RunView): string[] {
    const lines: string[] = [];
    if (slides.length > 0 && !this.#planned) {
      this.#planned = true;
      lines.push(`The manifest lists ${plural(slides.length, 'slide')}.`);
    }
    if (stage !== this.#stage) {
      this.#stage = stage;
      lines.push(`${STAGE_IN_WORDS[stage]} …`);
    }
    for (const [index, slide] of slides.entries()) {
      const key = `${index}`;
      const before = this.#told.get(key) ?? { text: '', percent: 0 };
      const { text, percent } = stepOf(slide);
      if (text === '' || (text === before.text && percent < before.percent + 25)) continue;
      this.#told.set(key, { text, percent });
      const tiles = text === 'analysing' && slide.tiles ? ` ${tilesInWords(slide.tiles)}` : '';
      const reason = inTrouble(slide) && slide.reason ? `: ${slide.reason.message}` : '';
      lines.push(`  ${slide.slide}: ${text}${tiles}${reason}`);
    }
    return lines;
  }
}

/** A word for where a slide is, empty while there is nothing to tell; tiles in percent, while it is analysed. */
function stepOf(slide: SlideView): { text: string; percent: number } {
  const { state, tiles } = slide;
  if (inTrouble(slide) || isDone(slide) || state === 'DUPLICATE') {
    return { text: IN_WORDS[state].title.toLowerCase(), percent: 0 };
  }
  if (isAnalysed(slide)) return { text: 'analysed', percent: 0 };
  if (tiles && tiles.total > 0 && tiles.done > 0) {
    return { text: 'analysing', percent: (100 * tiles.done) / tiles.total };
  }
  if (isCopied(slide)) {
    return { text: slide.bytes === undefined ? 'copied' : `copied (${bytes(slide.bytes)})`, percent: 0 };
  }
  return { text: '', percent: 0 };
}
