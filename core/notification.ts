/**
 * The message that goes out when a run has ended. It speaks to the researcher, and goes by mail: slide ids and line
 * numbers only, nothing of what the manifest says about patients.
 */
import type { Reason, SlideState } from './contracts.ts';
import type { RunHead, SlideRow } from './results.ts';

/** How the states are called before people, and what a person can do about a slide in them. */
export const IN_WORDS: Record<SlideState, { title: string; advice: string }> = {
  AGGREGATED: { title: 'Result ready', advice: '' },
  DUPLICATE: {
    title: 'Listed twice',
    advice: 'Nothing to do: the slide is done once, under its first line.',
  },
  MISSING: {
    title: 'Not found',
    advice: 'Copy the file into the study’s folder, or correct its name, and drop the manifest again.',
  },
  QUARANTINED: {
    title: 'Needs a look',
    advice: 'Correct what the reason names, in the manifest or the file, and drop the manifest again.',
  },
  FAILED: {
    title: 'Failed',
    advice:
      'Drop the manifest again; if it fails again, give the run’s id to whoever runs Slideway in your lab.',
  },
  EXPECTED: { title: 'Waiting', advice: '' },
  COPYING: { title: 'Being copied', advice: '' },
  INGESTED: { title: 'Copied', advice: '' },
  INFERRING: { title: 'Being analysed', advice: '' },
  INFERRED: { title: 'Analysed', advice: '' },
};

export const RUN_IN_WORDS = {
  RUNNING: 'is running',
  SUCCEEDED: 'is done',
  PARTIAL: 'is done, but not for every slide',
  FAILED: 'has failed',
} as const;

/** As many problem slides as a message names. */
export const MAX_PROBLEMS = 50;
const MAX_REASON = 300;

/** A slide that needs a person, as a message may name it. */
export type Problem = Pick<SlideRow, 'slideId' | 'line' | 'state'> & { reason: Reason | null };

/**
 * Takes out of a problem what may name a patient: file names and the manifest's own columns are replaced by the
 * slide's id where its reason quotes them.
 */
export function withoutPatientData(
  { slideId, line, state, reason, slide }: Pick<SlideRow, 'slideId' | 'line' | 'state' | 'reason' | 'slide'>,
  metadata: Record<string, string>,
): Problem {
  if (!reason) return { slideId, line, state, reason };
  const base = slide.split('/').at(-1) ?? slide;
  const stem = base.replace(/\.[^.]+$/, '');
  const quoted = [slide, base, stem, ...Object.values(metadata)]
    .filter((text) => text.trim().length > 1)
    .sort((a, b) => b.length - a.length);
  let message = reason.message;
  for (const text of quoted) {
    const whole = new RegExp(`(?<![\\p{L}\\p{N}])${literally(text)}(?![\\p{L}\\p{N}])`, 'gu');
    message = message.replace(whole, '…');
  }
  return { slideId, line, state, reason: { error: reason.error, message: shorten(message, MAX_REASON) } };
}

/** `text` as a pattern that matches itself. */
const literally = (text: string) => text.replace(/[\^$\\.*+?()[\]{}|/]/g, '\\$&');

export const shorten = (text: string, length: number) =>
  text.length <= length ? text : `${text.slice(0, length - 1)}…`;

export interface Places {
  report: string;
  results: string;
  summary: string;
}

/** Subject (ASCII, at most 100 characters, as SNS asks) and text of the message. */
export function runMessage(
  run: RunHead,
  problems: Problem[],
  places: Places,
): { subject: string; text: string } {
  const { AGGREGATED: done = 0, DUPLICATE: twice = 0 } = run.counts;
  const total = Object.values(run.counts).reduce((sum, count) => sum + count, 0) - twice;
  const troubled = total - done;

  const lines = [
    `The run ${run.runId} ${RUN_IN_WORDS[run.state]}.`,
    ...(run.reason ? ['', `Reason: ${run.reason.message} (${run.reason.error})`] : []),
    '',
    `Manifest   s3://${run.manifest.bucket}/${run.manifest.key}`,
    `Started    ${run.startedAt}`,
    `Ended      ${run.endedAt}`,
    `Slides     ${total}${total > 0 ? `: ${countsInWords(run.counts)}` : ''}`,
    '',
    `Report     ${places.report}`,
    `Table      ${places.results}`,
    `Summary    ${places.summary}`,
  ];
  for (const state of ['FAILED', 'QUARANTINED', 'MISSING'] as const) {
    const here = problems.filter((problem) => problem.state === state);
    if (here.length === 0) continue;
    lines.push('', `${IN_WORDS[state].title}: ${run.counts[state] ?? here.length}`);
    for (const { slideId, line, reason } of here) {
      lines.push(
        `  ${slideId} (line ${line}): ${reason ? `${reason.message} (${reason.error})` : 'no reason'}`,
      );
    }
    lines.push(`  What to do: ${IN_WORDS[state].advice}`);
  }
  if (troubled > problems.length) {
    lines.push('', `${troubled - problems.length} more slides are named in the report and the table.`);
  }
  const outcome = total > 0 ? `, ${done} of ${total} slides` : '';
  return {
    subject: `Slideway: ${toAscii(run.study).slice(0, 30)} ${RUN_IN_WORDS[run.state]}${outcome}`,
    text: `${lines.join('\n')}\n`,
  };
}

const countsInWords = (counts: RunHead['counts']) =>
  (Object.entries(counts) as [SlideState, number][])
    .filter(([, count]) => count > 0)
    .map(([state, count]) => `${count} ${IN_WORDS[state].title.toLowerCase()}`)
    .join(', ');

/** SNS takes printable ASCII in a subject. */
const toAscii = (text: string) =>
  text
    .normalize('NFKD')
    .replace(/\p{M}/gu, '')
    .replace(/[^\x20-\x7e]/g, '?');

/** The message of a run that failed before it was known which run it is. */
export function claimMessage(manifest: string, reason: Reason): { subject: string; text: string } {
  return {
    subject: 'Slideway: a manifest could not be taken up',
    text: `The manifest ${manifest} could not be taken up, and nothing was done.

Reason: ${reason.message} (${reason.error})

What to do: ${IN_WORDS.FAILED.advice}
`,
  };
}
