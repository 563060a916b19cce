/**
 * `slideway run`: a folder of slides through the whole pipeline, as a lab does it: files to Landing, the manifest last,
 * then waiting for the run that it starts, and its results on this machine's disk.
 */
import { existsSync } from 'node:fs';
import { readFile, stat } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import type { RunItem, RunState } from '../../core/contracts.ts';
import { ManifestInvalid } from '../../core/errors.ts';
import { messageKey, runJsonKey } from '../../core/keys.ts';
import { readJson } from '../../core/store.ts';
import { attachLocalAws } from '../../local/engine.ts';
import { type Deployment, openDeployment, type Place, placeOf } from '../deployment.ts';
import { findSlides, makeManifest, withModel } from '../manifest.ts';
import { ModelVersionTaken, modelFor, registerModel } from '../models.ts';
import { shortPath } from '../paths.ts';
import { block, Teller } from '../progress.ts';
import { download, readAnswers, resultsTable } from '../results.ts';
import { bytes, duration, EXIT, plural, type Screen, UserError, usageError } from '../terminal.ts';
import {
  changed,
  filesOf,
  type LocalFile,
  landedFiles,
  landedManifest,
  listFiles,
  uploadFiles,
  uploadManifest,
} from '../upload.ts';
import { listRuns, RunWatch } from '../watch.ts';

export interface RunOptions extends Place {
  model?: string;
  out?: string;
  study?: string;
  new?: boolean;
  json?: boolean;
}

export interface Streams {
  /** Progress and remarks. */
  screen: Screen;
  /** The answer: a line each. */
  answer: Screen;
  width: number;
}

/** A folder with its manifest. */
interface Study {
  name: string;
  folder: string;
  manifest: Uint8Array;
  files: LocalFile[];
  /** The manifest was made here. */
  made: boolean;
}

const START_TIMEOUT_MS = 120_000;
const LOOK_EVERY_MS = 700;

/** Runs the study in `given`; answers the exit code. */
export async function run(
  given: string,
  options: RunOptions,
  streams: Streams,
  signal: AbortSignal,
): Promise<number> {
  const { screen } = streams;
  const study = await readStudy(given, options.study);
  if (study.made) {
    screen.print(
      `${study.folder} has no repo.csv: one is made that lists ${plural(findSlides(study.files.map(({ path }) => path)).length, 'slide')}. ` +
        'To give µm per pixel (mpp), stain, ids or models, put your own repo.csv there.',
    );
  }
  const place = placeOf(options);
  let again = options;
  for (;;) {
    const deployment = await openDeployment(screen, place);
    if (typeof deployment.at === 'object') {
      screen.print(screen.paint('dim', `Using the local AWS that process ${deployment.at.pid} runs.`));
    }
    let runId: string | undefined;
    try {
      await registerReference(deployment, screen);
      const found = await start(study, again, deployment, screen, signal);
      runId = found.runId;
      const ended = await follow(deployment, runId, screen, signal);
      return await finish(deployment, ended, found.state === 'RUNNING', options, streams, signal);
    } catch (error) {
      screen.clear();
      if (signal.aborted) {
        screen.print(farewell(deployment, runId));
        return EXIT.interrupted;
      }
      if (!hasGone(deployment, place.folder)) throw error;
      screen.print('The process that ran the local AWS has ended; going on here.');
      // What was begun is gone on with, not begun once more.
      if (runId !== undefined) again = { ...options, new: false };
    } finally {
      await deployment.close();
    }
  }
}

/** Whether the local AWS of another process is no longer there. */
const hasGone = ({ at }: Deployment, folder: string): boolean =>
  typeof at === 'object' && attachLocalAws(folder)?.pid !== at.pid;

export const farewell = ({ at }: Deployment, runId: string | undefined): string =>
  at === 'here'
    ? `Stopped${runId ? ` in run ${runId}` : ''}. The same command goes on from here.`
    : `${at === 'aws' ? 'AWS' : `Process ${at.pid}`} goes on with the run; the same command shows it again.`;

/** Puts the reference model into the register, once. */
async function registerReference({ s3, outputs, model }: Deployment, screen: Screen): Promise<void> {
  if (model === undefined) return;
  try {
    const { name, version, added } = await registerModel(s3, outputs.ModelsBucket, model);
    if (added) screen.print(`Registered the model ${name} ${version}.`);
  } catch (error) {
    if (!(error instanceof ModelVersionTaken)) throw error;
    // Its bytes depend on PyTorch's version; what is registered stays what it was.
    screen.print(
      screen.paint('dim', 'The reference model registered here was built with another PyTorch; it is kept.'),
    );
  }
}

/** @throws {UserError} when there is nothing to run. */
export async function readStudy(given: string, name?: string): Promise<Study> {
  const path = resolve(given);
  const about = await stat(path).catch((error: unknown) => {
    throw usageError(`${given} cannot be read: ${(error as NodeJS.ErrnoException).code ?? error}.`, {
      cause: error,
    });
  });
  const folder = about.isDirectory() ? path : dirname(path);
  const own = about.isDirectory() ? join(folder, 'repo.csv') : path;
  const files = await listFiles(folder).catch((error: unknown) => {
    throw usageError(`${folder} cannot be read: ${(error as Error).message}`, { cause: error });
  });
  const study = { name: studyName(name ?? basename(folder)), folder, files };
  if (!about.isDirectory() || existsSync(own)) {
    const manifest = await readFile(own).catch((error: unknown) => {
      throw usageError(`${own} cannot be read: ${(error as Error).message}`, { cause: error });
    });
    return { ...study, manifest, made: false };
  }
  const slides = findSlides(files.map((file) => file.path));
  if (slides.length === 0) {
    throw usageError(
      `${folder} holds neither a repo.csv nor anything that looks like a slide (svs, tiff, ndpi, mrxs, scn, bif, svslide, vms, vsi, DICOM).`,
    );
  }
  return { ...study, manifest: Buffer.from(makeManifest(slides)), made: true };
}

// biome-ignore lint/suspicious/noControlCharactersInRegex: control characters are what is looked for
const NO_NAME = /[\u0000-\u001f\u007f\\]|\/\//;

/** The folder in Landing that the study goes to. */
export function studyName(text: string): string {
  const name = text.trim().replace(/^\/+|\/+$/g, '');
  if (name === '' || NO_NAME.test(name) || name.split('/').includes('..')) {
    throw usageError(
      `\`${text}\` cannot name a study. Give a name with --study, such as --study breast-2026.`,
    );
  }
  return name;
}

/** Brings what is new to Landing, and answers the run: a new one, or that of the unchanged manifest. */
async function start(
  study: Study,
  options: RunOptions,
  deployment: Deployment,
  screen: Screen,
  signal: AbortSignal,
): Promise<RunItem> {
  const { s3, outputs } = deployment;
  const landing = { s3, bucket: outputs.LandingBucket, study: study.name };
  const manifest = await manifestWith(study, options.model, deployment, screen);
  const named = filesNamed(manifest, study);
  const fresh = changed(named, await landedFiles(landing, named));
  const before = await landedManifest(landing);
  const same = before !== undefined && Buffer.from(before.bytes).equals(manifest);

  if (same && fresh.length === 0 && !options.new) {
    const known = await findRun(deployment, study.name, before.versionId);
    if (known?.state === 'RUNNING') screen.print(`Going on with the run ${known.runId}.`);
    if (known && known.state !== 'RUNNING') {
      screen.print(
        `Nothing has changed since the run ${known.runId} (${known.state}); these are its results. Run it again with --new.`,
      );
    }
    return known ?? (await started(deployment, study.name, before.versionId, signal));
  }

  const total = fresh.reduce((sum, { size }) => sum + size, 0);
  if (fresh.length > 0) {
    const title = `Uploading ${plural(fresh.length, 'file')} (${bytes(total)}) to Landing/${study.name}`;
    await screen.task(title, (at) =>
      uploadFiles(landing, study.folder, fresh, {
        signal,
        onProgress: (progress) =>
          at(`${progress.files}/${fresh.length} files, ${bytes(progress.bytes)}, ${progress.path}`),
      }),
    );
  } else if (named.length > 0) {
    screen.print(`${plural(named.length, 'file')} in Landing/${study.name} are up to date.`);
  }
  signal.throwIfAborted();
  return started(deployment, study.name, await uploadManifest(landing, manifest), signal);
}

/** The manifest with the models that `--model` names. */
async function manifestWith(
  study: Study,
  model: string | undefined,
  { s3, outputs }: Deployment,
  screen: Screen,
): Promise<Uint8Array> {
  if (model === undefined) return study.manifest;
  const wanted = await screen.task(`Looking up the model ${model}`, (at) =>
    modelFor(s3, outputs.ModelsBucket, model, { onProgress: (sent) => at(`${bytes(sent)} registered`) }),
  );
  try {
    filesOf(study.manifest, []);
  } catch (error) {
    // The run itself says what is wrong with the manifest.
    if (error instanceof ManifestInvalid) return study.manifest;
    throw error;
  }
  const { bytes: manifest, set, kept } = withModel(study.manifest, wanted);
  if (kept > 0) {
    screen.print(
      `${wanted} is for ${plural(set, 'row')}; ${plural(kept, 'row')} of the manifest name a model of their own and keep it.`,
    );
  }
  return manifest;
}

/** The study's files that its manifest names; none for what is not a manifest. */
function filesNamed(manifest: Uint8Array, study: Study): LocalFile[] {
  try {
    return filesOf(manifest, study.files);
  } catch (error) {
    if (error instanceof ManifestInvalid) return [];
    throw error;
  }
}

/** The run of one version of a study's manifest. */
async function findRun(
  deployment: Deployment,
  study: string,
  versionId: string | undefined,
): Promise<RunItem | undefined> {
  const runs = await listRuns(deployment);
  const found = runs.find((item) => item.study === study && item.manifest.versionId === versionId);
  // The index may be ahead of the table: a run that was being claimed when the machine stopped is claimed again.
  return found && (await deployment.state.run(found.runId));
}

/** Waits for the run that a manifest's event starts. */
const started = (
  deployment: Deployment,
  study: string,
  versionId: string | undefined,
  signal: AbortSignal,
): Promise<RunItem> =>
  whenStarted(deployment, (item) => item.study === study && item.manifest.versionId === versionId, signal);

/** Waits for the run that `is` tells from all others. */
export async function whenStarted(
  deployment: Deployment,
  is: (item: RunItem) => boolean,
  signal: AbortSignal,
): Promise<RunItem> {
  const deadline = Date.now() + START_TIMEOUT_MS;
  for (;;) {
    const found = (await listRuns(deployment)).find(is);
    if (found) return found;
    if (Date.now() > deadline) {
      throw new UserError(
        `The manifest is there, but no run has started within ${duration(START_TIMEOUT_MS / 1000)}. ` +
          'Look into the logs of claim-manifest in the state folder (logs/).',
      );
    }
    await wait(200, undefined, { signal });
  }
}

/** Shows the run until it has ended. */
export async function follow(
  deployment: Deployment,
  runId: string,
  screen: Screen,
  signal: AbortSignal,
): Promise<RunItem> {
  const watch = new RunWatch(deployment, runId);
  const teller = new Teller();
  const begun = Date.now();
  for (;;) {
    signal.throwIfAborted();
    const looked = Date.now();
    const view = await watch.look();
    if (!view) throw new UserError(`The run ${runId} is no longer in the state table.`);
    if (view.ended && view.run.state !== 'RUNNING') {
      screen.clear();
      return view.run;
    }
    if (view.ended) {
      throw new UserError(
        `The run ${runId} was stopped before it could be published. Run it again with --new.`,
      );
    }
    const started = Date.parse(view.run.startedAt);
    if (screen.live) screen.show(block(view, screen.paint, (Date.now() - (started || begun)) / 1000));
    else for (const line of teller.tell(view)) screen.print(line);
    // Looking at a run of very many slides takes a while; it shall not be all that is done.
    await wait(Math.max(LOOK_EVERY_MS, 3 * (Date.now() - looked)), undefined, { signal });
  }
}

/** Downloads and shows the results; answers the exit code. */
export async function finish(
  deployment: Deployment,
  ended: RunItem,
  /** The run has ended just now. */
  now: boolean,
  options: RunOptions,
  { screen, answer, width }: Streams,
  signal: AbortSignal,
): Promise<number> {
  const { runId } = ended;
  const folder = resolve(options.out ?? join('slideway-results', runId));
  await download(deployment, runId, folder, signal);
  const report = join(folder, 'report', 'index.html');
  const summary = await readJson(deployment.s3, {
    bucket: deployment.outputs.SilverBucket,
    key: runJsonKey(runId),
  });
  if (options.json) {
    answer.print(JSON.stringify({ out: folder, report, run: summary ?? ended }, null, 2));
    return exitCodeOf(ended.state);
  }
  if (now) await showMessage(deployment, runId, screen);
  answer.print();
  for (const line of resultsTable(await readAnswers(deployment, ended), answer.paint, width))
    answer.print(line);
  answer.print();
  answer.print(`${verdict(ended, answer)}  ${runId}`);
  if (ended.reason) answer.print(`Reason   ${ended.reason.message} (${ended.reason.error})`);
  if (existsSync(report)) answer.print(`Report   ${shortPath(report)}`);
  answer.print(`Results  ${shortPath(folder)}`);
  return exitCodeOf(ended.state);
}

/** The message that AWS would mail to who is subscribed. */
async function showMessage(deployment: Deployment, runId: string, screen: Screen): Promise<void> {
  const message = (await readJson(deployment.s3, {
    bucket: deployment.outputs.SilverBucket,
    key: messageKey(runId),
  })) as { subject?: string } | undefined;
  if (message?.subject) screen.print(screen.paint('dim', `Message sent: ${message.subject}`));
}

export const exitCodeOf = (state: RunState): number =>
  ({ SUCCEEDED: EXIT.succeeded, PARTIAL: EXIT.partial, FAILED: EXIT.failed, RUNNING: EXIT.failed })[state];

const verdict = ({ state }: RunItem, { paint }: Screen): string =>
  paint(state === 'SUCCEEDED' ? 'green' : state === 'PARTIAL' ? 'yellow' : 'red', state);
