/** What must hold when a schedule has settled, whatever went wrong on the way. Each breach is a sentence. */
import { createHash } from 'node:crypto';
import { GetObjectCommand, ListMultipartUploadsCommand } from '@aws-sdk/client-s3';
import { paginateScan } from '@aws-sdk/lib-dynamodb';
import { parse } from 'csv-parse/sync';
import { runIdOf } from '../../core/claim.ts';
import type { PlannedSlide, RunItem, RunSlide, RunSummary, SlideItem } from '../../core/contracts.ts';
import { messageKey, resultsCsvKey, runJsonKey, slidesKey } from '../../core/keys.ts';
import type { LineageItem } from '../../core/lineage.ts';
import { slideIdOf } from '../../core/plan.ts';
import { LineageReader } from '../../core/record.ts';
import { StateTable } from '../../core/state.ts';
import { readBytes, readJson, readLines, sha256 } from '../../core/store.ts';
import { verify } from '../../core/verify.ts';
import { CLAIM_CONFIG } from './functions.ts';
import { versionsOf } from './objects.ts';
import type { Row, SceneSlide } from './scene.ts';
import type { Schedule } from './schedule.ts';

/** Ends that come of AWS failing for longer than it is waited for. */
const OF_THE_WEATHER = new Set([
  'Throttled',
  'ServiceUnavailable',
  'Sandbox.Timedout',
  'Runtime.ExitError',
  'Runtime.OutOfMemory',
  'Lambda.TooManyRequestsException',
  'Lambda.ServiceException',
  'JobFailed',
  'Unfinished',
]);

/** One run as it ended, by all that tells of it. */
interface Ended {
  runId: string;
  item: RunItem;
  summary: RunSummary | undefined;
  lines: PlannedSlide[];
  slides: Map<string, SlideItem>;
  /** Events of its slides, by slide. */
  events: Map<string, LineageItem[]>;
}

export async function breaches(schedule: Schedule): Promise<string[]> {
  const check = new Check(schedule);
  await check.all();
  return check.found;
}

class Check {
  readonly found: string[] = [];
  readonly #schedule: Schedule;
  readonly #state: StateTable;
  readonly #record: LineageReader;

  constructor(schedule: Schedule) {
    this.#schedule = schedule;
    const { documents } = schedule.world;
    this.#state = new StateTable(documents, schedule.place.stateTable);
    this.#record = new LineageReader(documents, schedule.place.lineageTable);
  }

  async all(): Promise<void> {
    const { manifests, scene, place, executions } = this.#schedule;
    for (const [name, status] of executions)
      if (status === 'RUNNING') this.#breach(`the execution ${name} did not end`);
    const claimed = new Set(await this.#runIds());
    for (const versionId of manifests) {
      const bytes = this.#schedule.put.find((put) => put.versionId === versionId)?.bytes ?? Buffer.alloc(0);
      const key = `${scene.study}/repo.csv`;
      const manifest = { bucket: place.landing, key, versionId, etag: md5(bytes) };
      const runId = runIdOf(scene.study, manifest, CLAIM_CONFIG);
      this.#expect(claimed.has(runId), `there is no run ${runId}, although its event was delivered`);
    }
    const runs: Ended[] = [];
    for (const runId of claimed) runs.push(await this.#ended(runId));
    for (const run of runs) await this.#run(run);
    this.#lost(runs);
    await this.#lineage();
    await this.#bronze();
  }

  #breach(message: string): void {
    this.found.push(message);
  }

  #expect(holds: boolean, message: string): void {
    if (!holds) this.#breach(message);
  }

  // --- a run ------------------------------------------------------------------------------------------------------

  async #runIds(): Promise<string[]> {
    const { world, place } = this.#schedule;
    const scan = {
      TableName: place.stateTable,
      FilterExpression: 'sk = :run',
      ExpressionAttributeValues: { ':run': 'RUN' },
    };
    const runIds: string[] = [];
    for await (const page of paginateScan({ client: world.documents }, scan))
      for (const item of page.Items ?? []) runIds.push(String(item.runId));
    return runIds;
  }

  /** Every slide that came is decided by some run. */
  #lost(runs: Ended[]): void {
    const { scene } = this.#schedule;
    for (const { path, uploads } of scene.slides) {
      const came = uploads.some(({ when }) => when !== 'never');
      const abandoned = runs.some(
        ({ item, lines }) => !item.publishedAt && lines.some(({ slide }) => slide === path),
      );
      const ends = runs.flatMap(({ summary }) => summary?.slides ?? []).filter(({ slide }) => slide === path);
      // Its execution failed before there was a run: the alarm tells, and there is a message.
      const neverBegun = [...this.#schedule.executions].some(
        ([name, status]) => name.includes('-late-') && status === 'FAILED',
      );
      const excused = abandoned || (neverBegun && !this.#promised);
      if (!came || ends.length === 0 || excused) continue;
      this.#expect(
        ends.some(({ state }) => state !== 'MISSING'),
        `${path} came, and is still MISSING in every run`,
      );
    }
  }

  async #ended(runId: string): Promise<Ended> {
    const { world, place } = this.#schedule;
    const item = await this.#state.run(runId);
    if (!item) throw new Error(`the run ${runId} vanished`);
    const silver = { bucket: place.silver };
    const lines: PlannedSlide[] = [];
    for await (const line of readLines<PlannedSlide>(world.s3, { ...silver, key: slidesKey(runId) }))
      lines.push(line);
    const slides = new Map<string, SlideItem>();
    for await (const slide of this.#state.slides(runId)) slides.set(slide.slideId, slide);
    const events = new Map<string, LineageItem[]>();
    for (const slideId of new Set(lines.map((line) => line.slideId))) {
      const chain = await this.#record.chain(`SLIDE#${slideId}`);
      events.set(
        slideId,
        chain.events.filter((event) => event.runId === runId),
      );
    }
    const summary = (await readJson(world.s3, { ...silver, key: runJsonKey(runId) })) as
      | RunSummary
      | undefined;
    return { runId, item, summary, lines, slides, events };
  }

  async #run(run: Ended): Promise<void> {
    const { runId, item, summary, lines } = run;
    const { scene } = this.#schedule;
    if (!item.publishedAt) {
      this.#abandoned(item);
      return;
    }
    if (!summary) {
      this.#breach(`${runId} has no run.json`);
      return;
    }
    this.#expect(
      summary.state === item.state,
      `run.json says ${summary.state}, the state table ${item.state}`,
    );
    this.#expect(
      summary.endedAt === item.endedAt,
      'run.json and the state table end the run at different times',
    );
    const planned = summary.slides.length > 0;
    if (planned || lines.length > 0) {
      const rows = item.followUp ? lines.length : scene.rows.length;
      this.#expect(summary.slides.length === rows, `${rows} rows, but ${summary.slides.length} in run.json`);
    } else this.#excusable(summary.reason?.error, `${runId} has no slides`);
    this.#expect(
      new Set(summary.slides.map(({ line }) => line)).size === summary.slides.length,
      'a line of the manifest is twice in run.json',
    );
    const counts: Record<string, number> = {};
    for (const { state } of summary.slides) counts[state] = (counts[state] ?? 0) + 1;
    this.#expect(same(counts, summary.counts), `run.json counts ${text(summary.counts)} of ${text(counts)}`);
    this.#expect(same(counts, item.counts), `the state table counts ${text(item.counts)} of ${text(counts)}`);
    await this.#csv(run, summary);
    for (const slide of summary.slides) {
      this.#slide(run, slide);
      this.#outcome(slide, item.followUp !== undefined);
    }
    this.#twins(summary);
    await this.#runRecord(run);
    await this.#told(item);
  }

  /** Its end could not be published whole: the execution has failed, by which sweep and alarm find the run. */
  #abandoned({ runId, executionArn }: RunItem): void {
    this.#excusable('ServiceUnavailable', `${runId} was not published`);
    const status = this.#schedule.executions.get(executionArn.split(':').at(-1) ?? '');
    this.#expect(status === 'FAILED', `${runId} was not published, and its execution is ${status}`);
  }

  async #csv({ runId }: Ended, summary: RunSummary): Promise<void> {
    const { world, place } = this.#schedule;
    const bytes = await readBytes(world.s3, { bucket: place.silver, key: resultsCsvKey(runId) });
    if (!bytes) {
      this.#breach('there is no results.csv');
      return;
    }
    const rows = parse(Buffer.from(bytes), { columns: true }) as Record<string, string>[];
    const expected = summary.slides.map(({ slideId, state }) => `${slideId} ${state}`);
    const found = rows.map(({ slide_id, state }) => `${slide_id} ${state}`);
    this.#expect(
      same([...new Set(expected)].sort(), [...new Set(found)].sort()),
      `results.csv says ${found.join(', ')}; run.json ${expected.join(', ')}`,
    );
    const results = summary.slides.reduce((sum, slide) => sum + slide.results.length, 0);
    this.#expect(
      rows.filter((row) => row.tiles_ok !== '').length === results,
      'results.csv and run.json have different numbers of results',
    );
  }

  /** One slide's end: the same in the state table, in run.json and on record. */
  #slide({ item, lines, slides, events }: Ended, slide: RunSlide): void {
    const { slideId, state, line } = slide;
    const who = `${slideId} (line ${line})`;
    const planned = lines.find((other) => other.line === line);
    if (planned?.state === 'MISSING' && !item.plannedAt) {
      this.#excusable(slide.reason?.error, `${who}: ${state}`);
      return;
    }
    if (planned?.state !== 'EXPECTED') {
      this.#expect(planned?.state === state, `${who}: planned ${planned?.state}, ended ${state}`);
      return;
    }
    const slideItem = slides.get(slideId);
    this.#expect(
      slideItem?.state === state,
      `${who}: ${state} in run.json (${slide.reason?.error}), ${slideItem?.state ?? 'nothing'} in the state table`,
    );
    this.#expect(
      slideItem?.reason?.error === slide.reason?.error,
      `${who}: ${slide.reason?.error} in run.json, ${slideItem?.reason?.error} in the state table`,
    );
    const own = events.get(slideId) ?? [];
    const ids = own.map(({ id }) => id);
    this.#expect(new Set(ids).size === ids.length, `${who}: an event is twice on record: ${ids.join(', ')}`);
    const last = own.at(-1)?.action;
    this.#expect(last === `SLIDE_${state}`, `${who}: ${state}, but the record ends with ${last}`);
    const ends = own.filter(({ action }) => /_(AGGREGATED|DUPLICATE|QUARANTINED)$/.test(action));
    this.#expect(ends.length <= 1, `${who}: ended ${ends.length} times on record`);
    if (state !== 'AGGREGATED') return;
    this.#expect(
      slide.results.length === planned.models.length,
      `${who}: AGGREGATED without all its results`,
    );
    for (const action of ['SLIDE_INGESTED', 'SLIDE_INFERRED'])
      this.#expect(
        own.some((event) => event.action === action),
        `${who}: AGGREGATED, but there is no ${action} on record`,
      );
  }

  // --- was it right -------------------------------------------------------------------------------------------------

  /** Whether nothing went wrong but what the flow promises to survive. */
  get #promised(): boolean {
    return ['fair', 'bounded'].includes(this.#schedule.troubles.weather);
  }

  #excusable(error: string | undefined, what: string): void {
    if (this.#promised)
      this.#breach(`${what}: ${error}, although AWS failed no longer than it is waited for`);
    else this.#expect(OF_THE_WEATHER.has(error ?? ''), `${what}: ${error}, which nothing accounts for`);
  }

  /** The slide ended as it must, or as what happened to it explains. */
  #outcome({ line, state, reason, slideId, slide: path }: RunSlide, follows: boolean): void {
    const { scene, troubles } = this.#schedule;
    const position = follows ? scene.rows.findIndex((row) => row.slide === path) : line - 2;
    const row = scene.rows[position];
    if (!row) {
      this.#breach(`there is no line ${line}`);
      return;
    }
    const slide = scene.slides.find(({ path }) => path === row.slide);
    const expected = this.#expected(row, slide, position);
    const ended = reason ? `${state} ${reason.error}` : state;
    const models = (row.model || CLAIM_CONFIG.defaultModel).split('|');
    const fates = models.map((model) => troubles.slide(slideId, model));
    const fate =
      fates.find((each) => each.state === 'FAILED') ?? fates.find((each) => each.state !== 'INFERRED');
    const allowed = expected.flatMap((each) =>
      each === 'AGGREGATED' && fate ? [`${fate.state} ${fate.error}`] : [each],
    );
    if (allowed.includes(ended)) return;
    if (state === 'FAILED') this.#excusable(reason?.error, `line ${line}, ${row.slide}`);
    else
      this.#breach(
        `line ${line}, ${row.slide}: ${ended} (${reason?.message}), expected ${allowed.join(' or ')}`,
      );
  }

  #expected(row: Row, slide: SceneSlide | undefined, position: number): string[] {
    const { scene } = this.#schedule;
    if (!slide) return ['QUARANTINED PathOutsideStudy'];
    if (scene.rows.findIndex((other) => other.slide === row.slide) < position)
      return ['DUPLICATE SlideDuplicate'];
    const idOf = (other: Row) =>
      slideIdOf(scene.study, { slide: other.slide, ...(other.slideId && { slideId: other.slideId }) });
    const claims = new Set(
      scene.rows.filter((other) => idOf(other) === idOf(row)).map((other) => other.slide),
    );
    if (claims.size > 1) return ['QUARANTINED SlideIdAmbiguous'];
    const ends: string[] = [];
    const there = slide.uploads.some(({ when }) => when !== 'never');
    const done = row.model === 'unheard-of' ? 'FAILED ModelNotFound' : 'AGGREGATED';
    if (!there) return ['MISSING SlideMissing'];
    ends.push(done);
    if (slide.unsteady) {
      ends.push('MISSING SlideMissing', 'MISSING SlideIncomplete', 'QUARANTINED SlideChanged');
      // Bronze may hold it as an earlier run saw it.
      ends.push('QUARANTINED NameTaken');
    }
    const twins = scene.slides.filter(({ path, copyOf }) => copyOf === slide.path || path === slide.copyOf);
    if (twins.length > 0) {
      ends.push('DUPLICATE SlideDuplicate');
      if (scene.duplicates === 'error') ends.push('QUARANTINED ContentSeen');
    }
    return ends;
  }

  /** Of slides with one content, one at least is done. */
  #twins({ slides }: RunSummary): void {
    const { scene, troubles } = this.#schedule;
    for (const { path, copyOf, unsteady } of scene.slides) {
      const other = scene.slides.find((slide) => slide.path === copyOf);
      if (!other || unsteady || other.unsteady || troubles.weather === 'storm') continue;
      const both = slides.filter(({ slide }) => slide === path || slide === other.path);
      const set = both.filter(
        ({ state, reason }) => state === 'DUPLICATE' || reason?.error === 'ContentSeen',
      );
      this.#expect(
        both.length === 0 || set.length < both.length,
        `${path} and ${other.path} have one content, and neither is done`,
      );
    }
  }

  // --- the record -----------------------------------------------------------------------------------------------------

  async #runRecord({ runId, item }: Ended): Promise<void> {
    const { events } = await this.#record.chain(`RUN#${runId}`);
    const actions = events.map(({ action }) => action);
    const ids = events.map(({ id }) => id);
    this.#expect(
      new Set(ids).size === ids.length,
      `${runId}: an event is twice on record: ${ids.join(', ')}`,
    );
    const count = (pattern: RegExp) => actions.filter((action) => pattern.test(action)).length;
    // Where the record could not be written to, the claim is what failed.
    const fewest = item.reason?.message.startsWith('ClaimManifest') ? 0 : 1;
    this.#expect(
      [1, fewest].includes(count(/^RUN_CLAIMED$/)),
      `${runId} was claimed ${count(/^RUN_CLAIMED$/)} times on record`,
    );
    const ends = /^RUN_(SUCCEEDED|PARTIAL|FAILED)$/;
    this.#expect(
      count(ends) === 1 && actions.includes(`RUN_${item.state}`),
      `${runId} is ${item.state}; on record: ${actions.join(', ')}`,
    );
  }

  async #lineage(): Promise<void> {
    const { world, place } = this.#schedule;
    const result = await verify({}, { s3: world.s3, record: this.#record, landingBucket: place.landing });
    for (const { message, chain, event, object, expected, found } of result.findings)
      this.#breach(
        `${chain} ${event?.sk} ${event?.action}: ${message} ${object?.key ?? ''} ${expected} / ${found}`,
      );
  }

  async #told({ runId }: RunItem): Promise<void> {
    const { messages, tellings, world, place } = this.#schedule;
    const sent = messages.filter(({ attributes }) => attributes.runId === runId).length;
    this.#expect(sent > 0, `${runId}: nobody was told of its end`);
    const record = await readBytes(world.s3, { bucket: place.silver, key: messageKey(runId) });
    this.#expect(record !== undefined, `${runId}: the message is not on record`);
    let excused = 0;
    for (const telling of tellings.filter((each) => each.runId === runId))
      excused += telling.answersLost + (telling.sent > 0 && !telling.recorded ? 1 : 0);
    this.#expect(sent <= 1 + excused, `${runId}: ${sent} messages, of which ${excused} may be repeated`);
  }

  // --- Bronze -----------------------------------------------------------------------------------------------------

  async #bronze(): Promise<void> {
    const { world, place, scene, uploadsExcused } = this.#schedule;
    const prefix = `slides/${scene.study}/`;
    const digests = new Map<string, string[]>();
    for (const { key, versionId, deleted } of await versionsOf(world.s3, place.bronze, prefix)) {
      this.#expect(!deleted, `${key} was deleted from Bronze`);
      const digest = sha256(await this.#bytes(place.bronze, key, versionId));
      digests.set(key, [...(digests.get(key) ?? []), digest]);
    }
    const keyOf = new Map<string, string>();
    for (const [key, versions] of digests) {
      this.#expect(
        new Set(versions).size === versions.length,
        `${key} was taken in ${versions.length} times`,
      );
      if (scene.duplicates !== 'replace')
        this.#expect(
          versions.length === 1,
          `${key} has ${versions.length} versions, although nothing is replaced`,
        );
    }
    for await (const chain of this.#record.chains()) {
      for (const event of chain.events) {
        if (event.action !== 'SLIDE_INGESTED') continue;
        await this.#identical(event);
        const [only, ...more] = event.outputs ?? [];
        if (!only || more.length > 0) continue;
        const other = keyOf.get(only.checksum ?? '') ?? only.key;
        if (other !== only.key) this.#breach(`the same content was taken in as ${other} and as ${only.key}`);
        keyOf.set(only.checksum ?? '', only.key);
      }
    }
    const where = { Bucket: place.bronze, Prefix: prefix };
    const { Uploads = [] } = await world.s3.send(new ListMultipartUploadsCommand(where));
    const uploads = Uploads.length;
    this.#expect(uploads <= uploadsExcused, `${uploads} uploads are left, ${uploadsExcused} of them excused`);
  }

  /** What was taken in has the bytes of what lay in Landing, file by file. */
  async #identical({ pk, inputs = [], outputs = [] }: LineageItem): Promise<void> {
    this.#expect(
      inputs.length === outputs.length && outputs.length > 0,
      `${pk}: ${inputs.length} files became ${outputs.length}`,
    );
    for (const [index, output] of outputs.entries()) {
      const input = inputs[index];
      if (!input) return;
      const [was, is] = [
        await this.#bytes(input.bucket, input.key, input.versionId),
        await this.#bytes(output.bucket, output.key, output.versionId),
      ];
      this.#expect(was.equals(is), `${pk}: ${output.key} has not the bytes of ${input.key}`);
    }
  }

  async #bytes(bucket: string, key: string, versionId: string | undefined): Promise<Buffer> {
    const { Body } = await this.#schedule.world.s3.send(
      new GetObjectCommand({ Bucket: bucket, Key: key, VersionId: versionId }),
    );
    return Buffer.from((await Body?.transformToByteArray()) ?? []);
  }
}

const text = (value: unknown) => JSON.stringify(value);

/** Equal as JSON, whatever the order of members. */
function same(a: unknown, b: unknown): boolean {
  const sorted = (value: unknown) =>
    JSON.stringify(value, (_, inner: unknown) =>
      inner !== null && typeof inner === 'object' && !Array.isArray(inner)
        ? Object.fromEntries(Object.entries(inner).sort(([x], [y]) => (x < y ? -1 : 1)))
        : inner,
    );
  return sorted(a) === sorted(b);
}

const md5 = (bytes: Buffer) => createHash('md5').update(bytes).digest('hex');
