/** `slideway verify`: whether the record, and what it points at, is as it was written. */
import type { PlannedSlide } from '../../core/contracts.ts';
import { slidesKey } from '../../core/keys.ts';
import { lineagePk } from '../../core/lineage.ts';
import { readLines } from '../../core/store.ts';
import { chainsOf, type Target } from '../../core/trace.ts';
import { type Finding, type Verification, verify } from '../../core/verify.ts';
import type { Deployment } from '../deployment.ts';
import { bytes, EXIT, type Paint, plural, UserError, usageError } from '../terminal.ts';
import type { Streams } from './run.ts';
import { reading, type ShowOptions } from './show.ts';
import { readerOf, targetOf } from './trace.ts';

export interface VerifyOptions extends ShowOptions {
  all?: boolean;
  anchor?: string;
}

export const verifyCommand = (
  text: string | undefined,
  options: VerifyOptions,
  streams: Streams,
  signal: AbortSignal,
): Promise<number> =>
  reading(options, streams, async (deployment) => {
    if (text !== undefined && options.all) throw usageError('Give a slide, run or key, or --all, not both.');
    if (!deployment) throw new UserError('Nothing has run yet, so nothing is on record.');
    const { s3, outputs } = deployment;
    const target = text === undefined ? undefined : await targetOf(text, deployment);
    const { screen, answer } = streams;
    const result = await screen.task(`Verifying ${text ?? 'the whole record'}`, (at) =>
      verify(
        { ...(target && { chains: chainsFor(target, deployment) }), anchor: options.anchor },
        {
          s3,
          record: readerOf(deployment),
          landingBucket: outputs.LandingBucket,
          anchorsBucket: outputs.AnchorsBucket,
          signal,
          onProgress: (done) =>
            at(
              `${plural(done.chains, 'chain')}, ${plural(done.objects, 'object')}, ${bytes(done.bytes)} read`,
            ),
        },
      ),
    );
    if (options.anchor !== undefined && !result.anchor && result.findings.length === 0) {
      throw usageError(`There is no anchor of ${options.anchor}.`);
    }
    if (options.json)
      answer.print(JSON.stringify({ whole: result.findings.length === 0, ...result }, null, 2));
    else for (const line of describeVerification(result, answer.paint)) answer.print(line);
    return result.findings.length === 0 ? EXIT.succeeded : EXIT.failed;
  });

/** The chains of what is asked for; of a run those of all its slides too. */
async function* chainsFor(target: Target, deployment: Deployment): AsyncGenerator<string> {
  yield* await chainsOf(target, readerOf(deployment));
  if (target.kind !== 'run') return;
  const key = slidesKey(target.runId);
  const lines = readLines<PlannedSlide>(deployment.s3, { bucket: deployment.outputs.SilverBucket, key });
  for await (const { slideId } of lines) yield lineagePk({ slideId });
}

export function describeVerification(result: Verification, paint: Paint): string[] {
  const { chains, events, objects, bytes: read, gone, anchor, findings } = result;
  const seen = `${plural(chains, 'chain')}, ${plural(events, 'event')}, ${plural(objects, 'object')}, ${bytes(read)} read`;
  return [
    ...(findings.length === 0
      ? [paint('green', `Whole: ${seen}.`)]
      : [
          paint('red', `Broken: ${plural(findings.length, 'finding')} in ${seen}.`),
          ...findings.flatMap((finding) => ['', ...describeFinding(finding, paint)]),
          '',
        ]),
    anchor
      ? `Held against the anchor of ${anchor.date} (${plural(anchor.heads, 'chain')}, root ${anchor.root}).`
      : paint('yellow', 'There is no anchor yet, so the end of a chain could have been taken away unseen.'),
    ...(gone > 0
      ? [`${plural(gone, 'file')} on record no longer in Landing, where files need not stay.`]
      : []),
  ];
}

function describeFinding(
  { kind, chain, event, object, message, expected, found }: Finding,
  paint: Paint,
): string[] {
  const line = (label: string, text: string) => `  ${paint('dim', label.padEnd(9))} ${text}`;
  return [
    `${paint('red', kind)}  ${message}`,
    line('where', [chain, event?.sk, event?.action].filter(Boolean).join(' ')),
    ...(object
      ? [
          line(
            'object',
            `s3://${object.bucket}/${object.key}${object.versionId ? ` version ${object.versionId}` : ''}`,
          ),
        ]
      : []),
    line('expected', expected),
    line('found', found),
  ];
}
