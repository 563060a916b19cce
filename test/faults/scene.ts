/**
 * What a seed makes of a study: its slides and rows, when files arrive or change, how often events are delivered,
 * and what goes wrong with requests, functions and jobs.
 */
import { type Model, modelSchema } from '../../core/contracts.ts';
import type { JobFate, SlideFate } from './container.ts';
import { Dice, type Key } from './dice.ts';
import { COPY_OBJECT_LIMIT } from './functions.ts';
import type { Fault, Op } from './wire.ts';

const base = {
  version: '1.0.0',
  license: 'Apache-2.0',
  tile: { px: 256, mpp: 0.5 },
  input: { mean: [0, 0, 0], std: [1, 1, 1] },
  mode: 'processing',
};
export const MODELS: Model[] = [
  modelSchema.parse({ ...base, name: 'area', task: 'regression', outputs: ['stained'] }),
  modelSchema.parse({ ...base, name: 'tissues', task: 'classification', outputs: ['stroma', 'fat'] }),
  modelSchema.parse({ ...base, name: 'features', task: 'embedding', outputs: ['f0', 'f1'] }),
];

/** A moment in the work of a function, at which somebody else does something: before its n-th request. */
export interface Moment {
  functionName: string;
  /** As {@link subjectOf} gives it. */
  subject: string;
  request: number;
}

/** A file that is put into Landing: before the manifest, at a moment, once all runs have ended, or never. */
export interface Upload {
  key: string;
  bytes: Buffer;
  when: 'before' | Moment | 'after' | 'never';
}

export interface SceneSlide {
  /** As the manifest names it. */
  path: string;
  kind: 'file' | 'dicom' | 'mrxs';
  slideId: string;
  /** As the row asks; empty for the stage's default. */
  models: string;
  uploads: Upload[];
  /** Its files come or change once a run may have begun. */
  unsteady: boolean;
  /** Another slide has the same content. */
  copyOf?: string;
}

export interface Row {
  slide: string;
  slideId: string;
  model: string;
}

export interface Scene {
  study: string;
  slides: SceneSlide[];
  rows: Row[];
  /** When the manifest is put, first and perhaps again, and how often each of its events comes, how late. */
  manifests: { when: 'before' | Moment | 'after'; deliveries: ('at once' | Moment | 'after')[] }[];
  duplicates: 'skip' | 'replace' | 'error';
}

/** Kinds of bad days. `bounded` faults are such as the flow promises to survive without a trace. */
export type Weather = 'fair' | 'bounded' | 'storm' | 'kills' | 'lost' | 'outage';
const WEATHERS: readonly Weather[] = [
  'fair',
  'bounded',
  'bounded',
  'bounded',
  'storm',
  'kills',
  'lost',
  'outage',
];

export const weatherOf = (seed: number): Weather => new Dice(seed, 'weather').pick(WEATHERS);

export function sceneOf(seed: number): Scene {
  const dice = new Dice(seed, 'scene');
  const study = `seed-${seed}`;
  const slides: SceneSlide[] = [];
  const count = dice.between(1, 4, 'slides');
  for (let i = 0; i < count; i++) slides.push(slideOf(dice, study, i, slides));

  const rows: Row[] = slides.map(({ path, slideId, models }) => ({ slide: path, slideId, model: models }));
  const [first] = rows;
  if (first && dice.chance(0.1, 'repeated')) rows.push(first);
  if (dice.chance(0.06, 'bad row')) rows.push({ slide: '../elsewhere.svs', slideId: '', model: '' });
  if (dice.chance(0.06, 'ambiguous') && slides.length > 1 && first) {
    const last = rows[slides.length - 1];
    if (last) rows[slides.length - 1] = { ...last, slideId: first.slideId };
  }

  const manifests: Scene['manifests'] = [{ when: 'before', deliveries: deliveriesOf(dice, slides, 1) }];
  if (dice.chance(0.25, 'again')) {
    const when = dice.chance(0.5, 'again', 'when') ? 'after' : momentOf(dice, slides, 'again');
    manifests.push({ when, deliveries: deliveriesOf(dice, slides, 2) });
  }
  const duplicates = dice.pick(['skip', 'skip', 'skip', 'replace', 'error'] as const, 'policy');
  return { study, slides, rows, manifests, duplicates };
}

function slideOf(dice: Dice, study: string, i: number, others: readonly SceneSlide[]): SceneSlide {
  const on = (...key: Key[]) => ['slide', i, ...key];
  const kind = dice.pick(['file', 'file', 'file', 'file', 'dicom', 'mrxs'] as const, ...on('kind'));
  const name = `${dice.pick(['scans', 'late', 'Ärzte'], ...on('folder'))}/s${i}`;
  const path = kind === 'file' ? `${name}.svs` : kind === 'mrxs' ? `${name}.mrxs` : name;
  const inside =
    kind === 'file'
      ? [path]
      : kind === 'mrxs'
        ? [path, `${name}/Slidedat.ini`, `${name}/Data0000.dat`]
        : Array.from({ length: dice.between(1, 4, ...on('files')) }, (_, f) => `${path}/${f}.dcm`);

  const twin = others.find((other) => other.kind === kind && kind === 'file');
  const copies = twin !== undefined && dice.chance(0.12, ...on('twin'));
  const bytesOf = (file: number, version: number) => {
    if (copies && version === 0) return twin.uploads[0]?.bytes ?? Buffer.alloc(1);
    const large = dice.chance(0.01, ...on('large'));
    const size = large ? 5 * 2 ** 20 + 1000 : dice.between(16, 2 * COPY_OBJECT_LIMIT, ...on('size', file));
    return dice.bytes(size, ...on('bytes', file, version));
  };

  const fate = dice.roll(...on('arrival'));
  const moment = (what: string) => momentOf(dice, [{ path }], `${what} ${i}`);
  const arrival = fate < 0.06 ? 'never' : fate < 0.12 ? 'after' : fate < 0.2 ? moment('arrives') : 'before';
  // Of a slide of several files, each may come by itself.
  const trickles = inside.length > 1 && dice.chance(0.15, ...on('trickles'));
  const uploads: Upload[] = inside.map((file, f) => ({
    key: `${study}/${file}`,
    bytes: bytesOf(f, 0),
    when: trickles && f > 0 && arrival === 'before' ? moment(`file ${f}`) : arrival,
  }));
  const changed = inside[dice.between(0, inside.length - 1, ...on('changed file'))] ?? path;
  const what = dice.roll(...on('disturbed'));
  const at = inside.indexOf(changed);
  if (arrival === 'before' && what < 0.08) {
    uploads.push({ key: `${study}/${changed}`, bytes: bytesOf(at, 0), when: moment('again') });
  }
  const changes = arrival === 'before' && what > 0.9;
  if (changes) uploads.push({ key: `${study}/${changed}`, bytes: bytesOf(at, 1), when: moment('changes') });

  const models = dice.pick(
    ['', '', '', 'tissues', 'features', 'area|features', 'area|features', 'unheard-of'],
    ...on('models'),
  );
  return {
    path,
    kind,
    // Some rows leave the id to Slideway.
    slideId: dice.chance(0.3, ...on('id')) ? '' : `S${i}-of-${study}`,
    models,
    uploads,
    unsteady: trickles || changes || (arrival !== 'before' && arrival !== 'never'),
    ...(copies && { copyOf: twin.path }),
  };
}

function deliveriesOf(
  dice: Dice,
  slides: SceneSlide[],
  manifest: number,
): Scene['manifests'][number]['deliveries'] {
  const times = dice.pick([1, 1, 2, 3], 'deliveries', manifest);
  return Array.from({ length: times }, (_, n) => {
    const how = dice.roll('delivery', manifest, n);
    if (how < 0.5) return 'at once';
    return how < 0.8 && n > 0 ? momentOf(dice, slides, `delivery ${manifest} ${n}`) : 'after';
  });
}

function momentOf(dice: Dice, slides: Pick<SceneSlide, 'path'>[], about: string): Moment {
  const functionName = dice.pick(
    ['plan-run', 'ingest-slide', 'ingest-slide', 'ingest-slide', 'plan-inference', 'publish-run'],
    about,
    'function',
  );
  const subject = functionName === 'ingest-slide' ? dice.pick(slides, about, 'slide').path : '';
  return { functionName, subject, request: dice.between(0, 12, about, 'request') };
}

/** What an invocation is about, the same in every replay. */
export function subjectOf(payload: unknown): string {
  const { slide, job, detail } = payload as {
    slide?: { slide?: string } | string;
    job?: { model: string };
    detail?: { object: { key: string } };
  };
  if (job) return job.model;
  if (detail) return detail.object.key;
  return (typeof slide === 'object' ? slide.slide : slide) ?? '';
}

// --- what goes wrong ------------------------------------------------------------------------------------------------

/** One invocation of a function. */
export interface Invocation {
  functionName: string;
  subject: string;
  /** What the run came of: which manifest. */
  origin: string;
  /** How often this function was called for this before. */
  attempt: number;
}

export type InvocationFault = 'not-taken' | 'answer-lost';

const S3_REFUSALS = [
  { status: 503, code: 'SlowDown' },
  { status: 500, code: 'InternalError' },
  { status: 503, code: 'ServiceUnavailable' },
];
const DYNAMODB_REFUSALS = [
  { status: 400, code: 'ProvisionedThroughputExceededException' },
  { status: 400, code: 'ThrottlingException' },
  { status: 500, code: 'InternalServerError' },
];
const REFUSALS = {
  s3: S3_REFUSALS,
  dynamodb: DYNAMODB_REFUSALS,
  sns: [
    { status: 400, code: 'Throttling' },
    { status: 500, code: 'InternalError' },
  ],
  states: [
    { status: 400, code: 'ThrottlingException' },
    { status: 500, code: 'InternalFailure' },
  ],
};

export class Troubles {
  readonly #dice: Dice;
  readonly weather: Weather;

  constructor(seed: number) {
    this.#dice = new Dice(seed, 'troubles');
    this.weather = weatherOf(seed);
  }

  /** What goes wrong with one request of an invocation. */
  request(invocation: Invocation, op: Op): Fault | undefined {
    const killed = this.#kill(invocation);
    if (killed && killed.request === op.index) return { kind: killed.kind };
    const about = [...keyOf(invocation), op.service, op.name, op.resource];
    const { weather } = this;
    switch (weather) {
      case 'fair':
        return undefined;
      case 'bounded': {
        // So rarely to the same request that the SDK's own retries suffice.
        const often = this.#dice.between(1, 3, 'often', ...about);
        if (op.nth >= often || !this.#dice.chance(0.1, 'hit', ...about)) return undefined;
        return this.#kindOf(op, invocation.attempt < 2, [...about, op.nth]);
      }
      case 'kills':
        return undefined;
      case 'lost':
        return this.#dice.chance(0.3, 'lost', ...about, op.nth) ? { kind: 'answer-lost' } : undefined;
      case 'storm':
        return this.#dice.chance(0.25, 'storm', ...about, op.nth)
          ? this.#kindOf(op, true, [...about, op.nth])
          : undefined;
      case 'outage': {
        // A service is away for one piece of work, for longer than it is waited for or not.
        const { functionName, subject, origin, attempt } = invocation;
        const work = [functionName, subject, origin];
        const service = this.#dice.pick(['s3', 's3', 'dynamodb', 'sns'], 'outage of', ...work);
        const lasts = this.#dice.between(1, 14, 'outage lasts', ...work);
        const from = this.#dice.between(0, 10, 'outage from', ...work);
        if (!this.#dice.chance(0.25, 'outage', ...work) || attempt >= lasts) return undefined;
        if (op.service !== service || op.index < from) return undefined;
        return this.#kindOf(op, false, about);
      }
    }
  }

  /** What goes wrong between the state machine and an invocation. */
  invocation(invocation: Invocation): InvocationFault | undefined {
    const rate = { fair: 0, bounded: 0.04, kills: 0.05, lost: 0.1, storm: 0.05, outage: 0 }[this.weather];
    if (this.weather === 'bounded' && invocation.attempt > 1) return undefined;
    if (!this.#dice.chance(rate, 'invocation', ...keyOf(invocation))) return undefined;
    return this.#dice.pick(['not-taken', 'answer-lost'], 'invocation how', ...keyOf(invocation));
  }

  killedAs(invocation: Invocation): string {
    return this.#dice.pick(
      ['Sandbox.Timedout', 'Runtime.ExitError', 'Runtime.OutOfMemory'],
      'as',
      ...keyOf(invocation),
    );
  }

  /** Whether an invocation of ingest-slide has so little time that it must hand over; it soon has enough. */
  hasLittleTime({ functionName, attempt, ...invocation }: Invocation): boolean {
    if (functionName !== 'ingest-slide' || attempt > 2) return false;
    return this.#dice.chance(0.08, 'time', invocation.subject, invocation.origin);
  }

  job(model: string, attempt: number): JobFate {
    const dice = this.#dice;
    const after = dice.between(0, 3, 'job after', model, attempt);
    if (this.weather === 'fair') return 'completes';
    if (attempt <= 3 && dice.chance(0.12, 'job passing', model, attempt)) {
      return dice.pick<JobFate>(
        [
          { refused: 'ThrottlingException' },
          { fails: 'CapacityError: Unable to provision requested ML compute capacity.', after: 0 },
          { fails: 'CapacityError: no capacity', after },
        ],
        'job passing kind',
        model,
        attempt,
      );
    }
    if (this.weather !== 'bounded' && dice.chance(0.1, 'job', model, attempt)) {
      return dice.pick<JobFate>(
        [
          { fails: 'AlgorithmError: exit code 1', after },
          { answerLost: true },
          { refused: 'ValidationException' },
        ],
        'job kind',
        model,
        attempt,
      );
    }
    return 'completes';
  }

  slide(slideId: string, model: string): SlideFate {
    const roll = this.#dice.roll('fate', slideId, model);
    if (roll < 0.03) return { state: 'QUARANTINED', error: 'NoPixelSize', message: 'no pixel size' };
    if (roll < 0.06) return { state: 'FAILED', error: 'SlideUnreadable', message: 'it cannot be read' };
    return { state: 'INFERRED' };
  }

  #kill(invocation: Invocation): { request: number; kind: 'killed-before' | 'killed-after' } | undefined {
    const key = keyOf(invocation);
    const rate = { fair: 0, bounded: 0.15, kills: 0.35, lost: 0.02, storm: 0.05, outage: 0 }[this.weather];
    // The state machine calls once more after a kill.
    if (this.weather === 'bounded' && invocation.attempt > 0) return undefined;
    if (!this.#dice.chance(rate, 'kill', ...key)) return undefined;
    return {
      request: this.#dice.between(0, 14, 'kill at', ...key),
      kind: this.#dice.pick(['killed-before', 'killed-after'], 'kill when', ...key),
    };
  }

  #kindOf(op: Op, conflicts: boolean, key: Key[]): Fault {
    const { service, name } = op;
    const kinds: Fault[] = REFUSALS[service].map((refusal) => ({ kind: 'refused', ...refusal }));
    kinds.push({ kind: 'unsent' }, { kind: 'answer-lost' }, { kind: 'answer-lost' });
    if (service === 's3' && name.startsWith('GET')) kinds.push({ kind: 'cut-off' }, { kind: 'cut-off' });
    if (service === 's3' && (name === 'PUT copy' || name === 'POST ?uploadId')) {
      kinds.push({ kind: 'refused-late', code: 'InternalError' });
      // Somebody else is writing under the same key.
      if (conflicts) kinds.push({ kind: 'refused', status: 409, code: 'ConditionalRequestConflict' });
    }
    return this.#dice.pick(kinds, 'kind', ...key);
  }
}

const keyOf = ({ functionName, subject, origin, attempt }: Invocation): Key[] => [
  functionName,
  subject,
  origin,
  attempt,
];
