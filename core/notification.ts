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
    advice:
      'Copy the file into the study’s folder: it is then done by itself. Where its name is wrong, correct that in the manifest and drop it again.',
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

const CORRECT_MPP = 'Give mpp, the size of a pixel in µm, in the manifest, and drop it again.';
const SCAN_AGAIN = 'Scan or copy the slide again, then drop the manifest again.';
const OWN_ID = 'Give each slide a slide_id of its own in the manifest, and drop it again.';
const ASK_FOR_MODEL =
  'Ask whoever runs Slideway in your lab to put the model right, and to replay the run then.';
const ASK_FOR_REPLAY =
  'Nothing is known to be wrong with the slide. Ask whoever runs Slideway in your lab to replay the run.';

/** What to do about a reason, where that is more certain than what its state says. */
const ADVICE: Record<string, string> = {
  MppMissing: CORRECT_MPP,
  MppImplausible: CORRECT_MPP,
  MppInvalid: CORRECT_MPP,
  MppNotSquare: CORRECT_MPP,
  SlideEmpty: SCAN_AGAIN,
  SlideUnopenable: SCAN_AGAIN,
  SlideUnreadable: SCAN_AGAIN,
  SlideTooManyFiles: 'Convert the slide to one file, or leave out of its folder what is not the slide.',
  SlideIncomplete: 'Copy the slide’s folder beside its file, then drop the manifest again.',
  SlideChanged: 'Drop the manifest again when the slide has been copied completely.',
  SlideIdAmbiguous: OWN_ID,
  NameTaken: OWN_ID,
  ModelNotFound: ASK_FOR_MODEL,
  ModelPackageInvalid: ASK_FOR_MODEL,
  ModelFormatNotSupported: ASK_FOR_MODEL,
  ModelVersionConflict: 'Use one version of each model in the manifest, and drop it again.',
  ModelError: ASK_FOR_MODEL,
  ModelCreationFailed: ASK_FOR_MODEL,
  ModelDigestMismatch: ASK_FOR_MODEL,
  JobFailed: ASK_FOR_REPLAY,
  TilingFailed: ASK_FOR_REPLAY,
  TransformFailed: ASK_FOR_REPLAY,
  JoinFailed: ASK_FOR_REPLAY,
  PackFailed: ASK_FOR_REPLAY,
  TilesetMissing: ASK_FOR_REPLAY,
  JobQuota: ASK_FOR_REPLAY,
  JobCapacity: ASK_FOR_REPLAY,
  JobTimedOut: ASK_FOR_REPLAY,
  Throttled: ASK_FOR_REPLAY,
  ServiceUnavailable: ASK_FOR_REPLAY,
};

/** Names that AWS gives to how a step was ended; what it says with them is for engineers. */
const OF_A_STEP = /^(States|Lambda|Sandbox|Runtime|Function)\.|^(InternalError|Error)$/;

/** What to do about a slide that ended for `reason`. */
export function adviceFor(state: SlideState, reason: Reason | null): string {
  if (reason && OF_A_STEP.test(reason.error)) return ASK_FOR_REPLAY;
  return (reason && ADVICE[reason.error]) ?? IN_WORDS[state].advice;
}

/** A reason as a researcher reads it; its name stays, for whoever is asked. */
function reasonInWords(reason: Reason | null): string {
  if (!reason) return 'no reason was given';
  const message = OF_A_STEP.test(reason.error)
    ? 'a step of the pipeline was ended before it was done with the slide'
    : reason.message;
  return `${message} (${reason.error})`;
}

export const RUN_IN_WORDS = {
  RUNNING: 'is running',
  SUCCEEDED: 'is done',
  PARTIAL: 'is done, but not for every slide',
  FAILED: 'has failed',
} as const;

/** As many problem slides as a message names. */
export const MAX_PROBLEMS = 100;
const MAX_REASON = 300;

/** A slide that needs a person, as a message may name it. */
export type Problem = Pick<SlideRow, 'slideId' | 'line' | 'state'> & { reason: Reason | null };

/**
 * Takes out of a problem what may name a patient: file names and the manifest's own columns where its reason quotes
 * them, and of an id that was made of the file's name (`made`) all but the checksum at its end.
 */
export function withoutPatientData(
  {
    slideId: id,
    line,
    state,
    reason,
    slide,
  }: Pick<SlideRow, 'slideId' | 'line' | 'state' | 'reason' | 'slide'>,
  metadata: Record<string, string>,
  made = false,
): Problem {
  const { patient_id: patient = '' } = metadata;
  const named = patient.trim() === '' ? id : id.replaceAll(patient, '…');
  const slideId = made ? `…${id.slice(id.lastIndexOf('-'))}` : named;
  if (!reason) return { slideId, line, state, reason };
  const base = slide.split('/').at(-1) ?? slide;
  const stem = base.replace(/\.[^.]+$/, '');
  const quoted = [slide, base, stem, ...(made ? [id] : []), ...Object.values(metadata)]
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

/** Where an object is found: `template` with `{bucket}` and `{key}` filled in, as a part of an address where it is one. */
export function linkTo(template: string, bucket: string, key: string): string {
  const part = template.startsWith('http') ? encodeURIComponent : (text: string) => text;
  return template.replace('{bucket}', () => part(bucket)).replace('{key}', () => part(key));
}

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
    ...(run.followUp ? [FOLLOWS[run.followUp.kind](run.followUp.of)] : []),
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
    const advised = new Map<string, Problem[]>();
    for (const problem of here) {
      const advice = adviceFor(state, problem.reason);
      advised.set(advice, [...(advised.get(advice) ?? []), problem]);
    }
    for (const [advice, slides] of advised) {
      for (const { slideId, line, reason } of slides) {
        lines.push(`  ${slideId} (line ${line}): ${reasonInWords(reason)}`);
      }
      lines.push(`  What to do: ${advice}`);
    }
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

const FOLLOWS = {
  late: (of: string) => `Follows    ${of}, for slides of it that came late`,
  replay: (of: string) => `Replays    ${of}`,
};

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
