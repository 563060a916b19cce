/** One schedule from its beginning to the end, when everything has settled: what a seed does to a study. */
import { PutObjectCommand } from '@aws-sdk/client-s3';
import { paginateScan } from '@aws-sdk/lib-dynamodb';
import type { ObjectCreated } from '../../local/s3/service.ts';
import type { Message } from '../../local/sns.ts';
import { call, MARK_ARRIVAL, type Place, START_FOLLOW_UP } from './functions.ts';
import { versionsOf } from './objects.ts';
import {
  type Invocation,
  type Moment,
  type Scene,
  sceneOf,
  subjectOf,
  Troubles,
  type Upload,
} from './scene.ts';
import { type Op, Wire } from './wire.ts';
import type { Director, World } from './world.ts';

/** What an invocation of publish-run did about its message. */
interface Telling {
  runId: string;
  sent: number;
  answersLost: number;
  recorded: boolean;
}

interface Manifest {
  key: string;
  versionId?: string;
}

type Deed = () => Promise<unknown>;

export class Schedule implements Director {
  readonly seed: number;
  readonly world: World;
  readonly scene: Scene;
  place!: Place;
  readonly troubles: Troubles;
  /** What happened to requests and functions, by kind. */
  readonly faults = new Map<string, number>();
  /** One line a fault or deed, for who looks into a failed seed. */
  readonly story: string[] = [];
  readonly messages: Message[] = [];
  readonly tellings: Telling[] = [];
  /** Everything that was put into Landing, as it was put. */
  readonly put: { key: string; versionId: string; bytes: Buffer }[] = [];
  /** Status by name of execution. */
  readonly executions = new Map<string, string>();
  /** Uploads to Bronze that may lie about: their function was killed, or its requests failed. */
  uploadsExcused = 0;
  #calm = false;
  readonly #deeds = new Map<string, Deed[]>();
  readonly #attempts = new Map<string, number>();
  readonly #running = new Set<Promise<unknown>>();
  /** Inputs of the state machine, as the events of S3 gave them, by version of the manifest. */
  readonly #events = new Map<string, unknown>();
  /** Objects of Landing that are no manifests, as S3 tells of them. */
  readonly #arrivals: unknown[] = [];

  constructor(seed: number, world: World) {
    this.seed = seed;
    this.world = world;
    this.scene = sceneOf(seed);
    this.troubles = new Troubles(seed);
  }

  /** The versions of the manifest, in the order in which they were put. */
  get manifests(): string[] {
    return this.put.filter(({ key }) => key.endsWith('/repo.csv')).map(({ versionId }) => versionId);
  }

  /** Plays the schedule until nothing is under way any more and every event was delivered once without faults. */
  async play(): Promise<void> {
    const { scene, world } = this;
    this.place = await world.begin(scene.study, this);
    const after: Deed[] = [];
    const at = async (when: 'before' | 'after' | 'never' | Moment, deed: Deed) => {
      if (when === 'before') await deed();
      else if (when === 'after') after.push(deed);
      else if (when !== 'never') this.#at(when, deed);
    };
    for (const { uploads } of scene.slides)
      for (const upload of uploads) await at(upload.when, () => this.#upload(upload));
    for (const { when } of scene.manifests) await at(when, () => this.#dropManifest());
    await this.#quiet();
    await this.#doDeeds([...this.#deeds.values()].flat());
    await this.#doDeeds(after);
    await this.#doDeeds(this.#afterDeliveries);
    this.#calm = true;
    await this.redeliver();
  }

  /** Delivers every event once more, without faults, and waits for what comes of it. */
  async redeliver(): Promise<void> {
    for (const event of this.#events.values()) this.#start(event);
    for (const arrival of this.#arrivals) await this.#untilTaken(MARK_ARRIVAL, arrival);
    await this.#quiet();
  }

  /** All of the study's state, record, objects and messages, to compare. */
  async snapshot(): Promise<Record<string, string>> {
    const { world, scene } = this;
    const all: Record<string, string> = { messages: String(this.messages.length) };
    for (const [table, name] of [
      [this.place.stateTable, 'state'],
      [this.place.lineageTable, 'lineage'],
    ] as const) {
      for await (const page of paginateScan({ client: world.documents }, { TableName: table })) {
        for (const item of page.Items ?? []) {
          all[`${name} ${item.pk} ${item.sk}`] = JSON.stringify(item);
        }
      }
    }
    for (const [bucket, prefix] of [
      [this.place.bronze, `slides/${scene.study}/`],
      [this.place.silver, `runs/${scene.study}-`],
    ] as const) {
      for (const { key, versionId, etag } of await versionsOf(world.s3, bucket, prefix))
        all[`${bucket} ${key} ${versionId}`] = etag;
    }
    return all;
  }

  // --- what the world tells ---------------------------------------------------------------------------------------

  arrived({ bucket, key, size, etag, versionId = '', sequencer }: ObjectCreated): void {
    const event = {
      source: 'aws.s3',
      'detail-type': 'Object Created',
      detail: { bucket: { name: bucket }, object: { key, size, etag, 'version-id': versionId, sequencer } },
    };
    if (!key.endsWith('/repo.csv')) {
      this.#arrivals.push(event);
      this.#while(this.#untilTaken(MARK_ARRIVAL, event));
      return;
    }
    this.#events.set(versionId, event);
    const nth = this.#events.size - 1;
    for (const when of this.scene.manifests[nth]?.deliveries ?? []) {
      if (when === 'at once') this.#start(event);
      else if (when === 'after') this.#afterDeliveries.push(async () => this.#start(event));
      else this.#at(when, async () => this.#start(event));
    }
  }
  readonly #afterDeliveries: Deed[] = [];

  sent(message: Message): void {
    this.messages.push(message);
  }

  fates() {
    const { troubles } = this;
    return {
      job: (_: string, model: string, attempt: number) =>
        this.#calm ? ('completes' as const) : troubles.job(model, attempt),
      slide: (_: string, slideId: string, model: string) => troubles.slide(slideId, model),
    };
  }

  async invoke(functionName: string, payload: unknown): Promise<unknown> {
    const invocation = this.#invocation(functionName, payload);
    const trouble = this.#calm ? undefined : this.troubles.invocation(invocation);
    if (trouble === 'not-taken') {
      this.#fault('not-taken', invocation);
      throw named('Lambda.TooManyRequestsException', 'Rate exceeded');
    }
    const telling: Telling = {
      runId: (payload as { run?: { runId: string } }).run?.runId ?? '',
      sent: 0,
      answersLost: 0,
      recorded: false,
    };
    if (functionName === 'publish-run') this.tellings.push(telling);
    const wire = new Wire({
      endpoint: this.world.endpoint,
      real: this.world.s3.config.requestHandler,
      fault: (op) => (this.#calm ? undefined : this.troubles.request(invocation, op)),
      meanwhile: (op) => this.#meanwhile(invocation, op),
      onFault: (kind, op) => {
        this.#fault(kind, invocation, op);
        this.#excuse(kind, invocation, op, telling);
      },
      onEffect: (op, status) => {
        if (status >= 400) this.#count(`genuine ${status} of ${op.service}`);
        if (op.service === 'sns' && status < 300) telling.sent += 1;
        if (op.resource.endsWith('/message.json') && op.name === 'PUT' && status < 300)
          telling.recorded = true;
      },
      killedAs: () => this.troubles.killedAs(invocation),
    });
    const hurried = !this.#calm && this.troubles.hasLittleTime(invocation);
    if (hurried) this.#fault('little-time', invocation);
    const work = call(functionName, payload, wire.clients(), this.place, {
      duplicates: this.scene.duplicates,
      timeLeft: hurried ? 0 : Number.POSITIVE_INFINITY,
    });
    const answer = await wire.run(work).catch((error: Error) => {
      this.#tell(error.name, invocation, ` of itself: ${error.message}`);
      throw error;
    });
    if (trouble === 'answer-lost') {
      this.#fault('function-answer-lost', invocation);
      throw named('Lambda.ServiceException', 'Service error');
    }
    return answer;
  }

  // --- deeds --------------------------------------------------------------------------------------------------------

  async #upload({ key, bytes }: Pick<Upload, 'key' | 'bytes'>): Promise<void> {
    const { s3 } = this.world;
    const put = await s3.send(new PutObjectCommand({ Bucket: this.place.landing, Key: key, Body: bytes }));
    this.put.push({ key, versionId: put.VersionId ?? '', bytes });
    this.story.push(`put ${key}, ${bytes.length} bytes`);
  }

  async #dropManifest(): Promise<void> {
    const { study, rows } = this.scene;
    const lines = rows.map(({ slide, slideId, model }) => `${slide},${slideId},${model}\n`);
    const bytes = Buffer.from(`slide,slide_id,model\n${lines.join('')}`);
    await this.#upload({ key: `${study}/repo.csv`, bytes });
    const version = this.manifests.at(-1) ?? '';
    // S3 tells of an object some time after its answer.
    for (let waited = 0; !this.#events.has(version); waited++) {
      if (waited > 1000) throw new Error('S3 never told of the manifest');
      await new Promise((resolve) => setTimeout(resolve, 2));
    }
  }

  #at({ functionName, subject, request }: Moment, deed: Deed): void {
    const key = `${functionName}|${subject}|${request}`;
    this.#deeds.set(key, [...(this.#deeds.get(key) ?? []), deed]);
  }

  async #meanwhile({ functionName, subject }: Invocation, op: Op): Promise<void> {
    const key = `${functionName}|${subject}|${op.index}`;
    const deeds = this.#deeds.get(key);
    if (!deeds) return;
    this.#deeds.delete(key);
    this.story.push(`at request ${op.index} of ${functionName} ${subject}:`);
    for (const deed of deeds) await deed();
  }

  async #doDeeds(deeds: Deed[]): Promise<void> {
    this.#deeds.clear();
    for (const deed of deeds.splice(0)) await deed();
    await this.#quiet();
  }

  #start(event: unknown): void {
    const name = `${this.scene.study}-e${this.executions.size + 1}`;
    this.executions.set(name, 'RUNNING');
    this.story.push(`start ${name}`);
    this.#while(this.world.start(name, event).then((arn) => this.#watch(name, arn)));
  }

  started(executionArn: string): void {
    const name = executionArn.split(':').at(-1) ?? '';
    if (this.executions.has(name)) return;
    this.executions.set(name, 'RUNNING');
    this.story.push(`start ${name}`);
    this.#while(this.#watch(name, executionArn));
  }

  async #watch(name: string, executionArn: string): Promise<void> {
    this.executions.set(name, await this.world.ended(executionArn));
  }

  /** As EventBridge's calls are: what fails is tried twice more. */
  async #untilTaken(functionName: string, payload: unknown): Promise<void> {
    for (let times = 0; times < 3; times++) {
      try {
        await this.invoke(functionName, payload);
        return;
      } catch (error) {
        if (this.#calm) throw error;
      }
    }
  }

  #while(work: Promise<void>): void {
    const running = work.finally(() => this.#running.delete(running));
    this.#running.add(running);
  }

  /** Waits until nothing runs, nothing has been started by what ran, and no late slide waits to be started. */
  async #quiet(): Promise<void> {
    for (let rounds = 0; rounds < 2; rounds++) {
      while (this.#running.size > 0) await Promise.all(this.#running);
      await this.world.container.idle();
      await this.#untilTaken(START_FOLLOW_UP, { study: this.scene.study });
      if (this.#running.size > 0) rounds = 0;
    }
  }

  // --- telling invocations apart --------------------------------------------------------------------------------------

  #invocation(functionName: string, payload: unknown): Invocation {
    const { run, event, executionArn } = payload as {
      run?: { manifest: Manifest };
      event?: { detail?: { object: { 'version-id': string } }; followUp?: { manifest: Manifest } };
      executionArn?: string;
    };
    const { key = '', versionId } = run?.manifest ?? event?.followUp?.manifest ?? {};
    const version = versionId ?? event?.detail?.object['version-id'] ?? '';
    // By the order of their events: an event may be here before the answer to what caused it.
    const nth = [...this.#events.keys()].indexOf(version);
    const followUp = /\/follow-ups\/([^/]+)\//.exec(key)?.[1] ?? '';
    const execution = event?.detail ? (/-e\d+$/.exec(executionArn ?? '')?.[0] ?? '') : '';
    const origin = nth < 0 ? followUp : `manifest ${nth + 1}${execution}`;
    const subject = subjectOf(payload);
    const work = `${functionName}|${subject}|${origin}`;
    const attempt = this.#attempts.get(work) ?? 0;
    this.#attempts.set(work, attempt + 1);
    return { functionName, subject, origin, attempt };
  }

  #fault(kind: string, invocation: Invocation, op?: Op): void {
    this.#count(kind);
    this.#tell(kind, invocation, op && ` at request ${op.index}, ${op.service} ${op.name} ${op.resource}`);
  }

  #tell(what: string, { functionName, subject, origin, attempt }: Invocation, where = ''): void {
    this.story.push(`${what}: ${functionName} ${subject} (${origin}, attempt ${attempt + 1})${where}`);
  }

  #excuse(kind: string, { functionName }: Invocation, op: Op, telling: Telling): void {
    if (kind === 'answer-lost' && op.service === 'sns') telling.answersLost += 1;
    if (functionName !== 'ingest-slide') return;
    const uploading = op.name === 'POST ?uploads' || op.name === 'DELETE ?uploadId';
    if (kind.startsWith('killed') || uploading) this.uploadsExcused += 1;
  }

  #count(kind: string): void {
    this.faults.set(kind, (this.faults.get(kind) ?? 0) + 1);
  }
}

const named = (name: string, message: string) => Object.assign(new Error(message), { name });
