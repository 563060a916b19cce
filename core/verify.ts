/**
 * Verification by somebody who distrusts the system: every hash of a chain is computed again, every object that the
 * chain speaks of is read again and summed, and the record is held against the newest anchor. Of each chain the
 * first broken link is named, with what was expected and what was found.
 */
import { createHash } from 'node:crypto';
import type { Readable } from 'node:stream';
import { Crc64Nvme } from '@aws-sdk/checksums/crc';
import {
  GetObjectCommand,
  HeadObjectCommand,
  type HeadObjectCommandOutput,
  type S3Client,
} from '@aws-sdk/client-s3';
import { AnchorBroken, anchoredHeads, listAnchors, type PlacedAnchor, readAnchor } from './anchor.ts';
import { forEachConcurrently } from './concurrency.ts';
import type { ObjectRef } from './contracts.ts';
import { isNotFound } from './errors.ts';
import { FIRST_HASH, hashEvent, type LineageItem, type LineageObject } from './lineage.ts';
import type { Chain, ChainHead, LineageReader } from './record.ts';

export type FindingKind =
  | 'event-altered'
  | 'event-removed'
  | 'event-out-of-place'
  | 'object-changed'
  | 'object-missing'
  | 'object-unreadable'
  | 'anchored-event-altered'
  | 'anchored-event-removed'
  | 'anchor-broken';

/** A broken link. */
export interface Finding {
  kind: FindingKind;
  /** `SLIDE#…`, `RUN#…`, or the key of an anchor. */
  chain: string;
  /** Sequence number and action of the event where it shows. */
  event?: { sk: string; action: string };
  object?: ObjectRef;
  /** One sentence. */
  message: string;
  expected: string;
  found: string;
}

export interface Progress {
  chains: number;
  events: number;
  objects: number;
  bytes: number;
}

export interface Verification extends Progress {
  findings: Finding[];
  /** Objects of Landing that are not there any more: Landing is no archive, so that is no broken link. */
  gone: number;
  /** The anchor that the record was held against. */
  anchor: { date: string; key: string; root: string; heads: number } | null;
}

export interface VerifyDependencies {
  s3: S3Client;
  record: LineageReader;
  landingBucket: string;
  /** Absent where the deployment takes no anchors. */
  anchorsBucket?: string | undefined;
  /** Told after each object and chain. */
  onProgress?(progress: Progress): void;
  signal?: AbortSignal | undefined;
}

export interface Scope {
  /** Keys of the chains; absent: all of them. */
  chains?: Iterable<string> | AsyncIterable<string>;
  /** Date of the anchor to hold the record against; the newest when absent. */
  anchor?: string | undefined;
}

const CHAINS_AT_ONCE = 4;
const OBJECTS_AT_ONCE = 4;
const READ_ATTEMPTS = 3;
/** An anchor is written on its day; S3's clock is not the function's. */
const ANCHOR_CLOCK_MS = 36 * 3600 * 1000;

export async function verify(scope: Scope, dependencies: VerifyDependencies): Promise<Verification> {
  const { s3, record } = dependencies;
  const run = new Run(dependencies);
  const wanted = new Set<string>();
  async function* chains(): AsyncGenerator<Chain> {
    if (!scope.chains) return yield* record.chains();
    for await (const pk of scope.chains) {
      if (wanted.has(pk)) continue;
      wanted.add(pk);
      yield await record.chain(pk);
    }
  }
  // The client must not refuse bytes that do not fit S3's own checksum: what is found is to be told.
  const asBefore = s3.config.responseChecksumValidation;
  s3.config.responseChecksumValidation = async () => 'WHEN_REQUIRED';
  try {
    await forEachConcurrently(chains(), CHAINS_AT_ONCE, (chain) => run.chain(chain));
    await run.anchors(scope.anchor, scope.chains ? wanted : undefined);
  } finally {
    s3.config.responseChecksumValidation = asBefore;
  }
  return run.result;
}

/** Whether an event is what was written, and stands where it was put. */
function checkEvent(pk: string, item: LineageItem, number: number, previous: string): Finding | undefined {
  const { hash, ...rest } = item;
  const at = { chain: pk, event: { sk: item.sk, action: item.action } };
  const computed = hashEvent(rest);
  if (computed !== hash) {
    return {
      kind: 'event-altered',
      ...at,
      message: 'The event is not what was written: its content does not give its hash.',
      expected: hash,
      found: computed,
    };
  }
  const sk = String(number).padStart(12, '0');
  if (item.sk !== sk) {
    const gap = item.sk > sk;
    return {
      kind: gap ? 'event-removed' : 'event-out-of-place',
      ...at,
      message: gap
        ? `Event ${number} is not there any more.`
        : 'An event stands where the chain has no place for one.',
      expected: `event ${sk}`,
      found: `event ${item.sk}`,
    };
  }
  if (item.prevHash !== previous) {
    return {
      kind: 'event-out-of-place',
      ...at,
      message: 'The event does not follow the one before it: one of them was inserted, replaced or moved.',
      expected: `previous hash ${previous}`,
      found: `previous hash ${item.prevHash}`,
    };
  }
  return undefined;
}

/** One verification under way. */
class Run {
  readonly result: Verification = {
    chains: 0,
    events: 0,
    objects: 0,
    bytes: 0,
    findings: [],
    gone: 0,
    anchor: null,
  };
  readonly #dependencies: VerifyDependencies;
  /** Objects that many chains speak of, such as model packages: read once. */
  readonly #shared = new Map<string, Promise<Finding | undefined>>();

  constructor(dependencies: VerifyDependencies) {
    this.#dependencies = dependencies;
  }

  async chain(chain: Chain): Promise<void> {
    const { signal } = this.#dependencies;
    const seen = new Set<string>();
    /** What each key held last, as far as this chain has put it there. */
    const current = new Map<string, { object: LineageObject; event: LineageItem }>();
    let previous = FIRST_HASH;
    for (const [index, event] of chain.events.entries()) {
      signal?.throwIfAborted();
      const broken =
        checkEvent(chain.pk, event, index + 1, previous) ?? (await this.#objects(chain.pk, event, seen));
      this.result.events += 1;
      if (broken) return this.#end(broken);
      for (const object of writtenBy(event)) current.set(`${object.bucket}/${object.key}`, { object, event });
      previous = event.hash;
    }
    let broken: Finding | undefined;
    await forEachConcurrently(current.values(), OBJECTS_AT_ONCE, async ({ object, event }) => {
      const finding = await this.#current(chain.pk, event, object);
      broken ??= finding;
    });
    this.#end(broken);
  }

  /** Holds the record against an anchor, and the anchors against each other where the whole record is looked at. */
  async anchors(date: string | undefined, chains: ReadonlySet<string> | undefined): Promise<void> {
    const { s3, record, anchorsBucket: bucket, signal } = this.#dependencies;
    if (!bucket) return;
    const placed = await listAnchors(s3, bucket);
    const chosen = date === undefined ? placed.at(-1) : placed.find((anchor) => anchor.date === date);
    if (!chosen) return;
    try {
      const anchor = await readAnchor(s3, chosen);
      const { heads, root, broken } = anchor;
      this.result.anchor = { date: chosen.date, key: chosen.key, root, heads: heads.count };
      for (const head of broken.first) {
        if (!chains || chains.has(head.pk)) this.#add(lostBefore(head, chosen));
      }
      const wanted = async function* () {
        for await (const head of anchoredHeads(s3, bucket, anchor)) {
          signal?.throwIfAborted();
          if (!chains || chains.has(head.pk)) yield head;
        }
      };
      for await (const { head, found } of record.changed(wanted())) this.#add(lost(head, found, chosen));
    } catch (error) {
      if (!(error instanceof AnchorBroken)) throw error;
      this.#add(anchorBroken(chosen, error.message));
    }
    for (const anchor of chains ? [chosen] : placed) this.#anchorPlace(anchor);
    if (!chains) await this.#anchorChain(placed);
  }

  #anchorPlace(anchor: PlacedAnchor): void {
    if (anchor.later > 0) {
      this.#add(
        anchorBroken(anchor, `${anchor.later} later versions were put over it; the first is the anchor`),
      );
    }
    const off = Math.abs(anchor.written.getTime() - Date.parse(`${anchor.date}T12:00:00Z`));
    if (off > ANCHOR_CLOCK_MS) {
      this.#add(anchorBroken(anchor, `it was written on ${anchor.written.toISOString()}, not on its day`));
    }
  }

  async #anchorChain(placed: PlacedAnchor[]): Promise<void> {
    let before: { key: string; root: string } | undefined;
    for (const place of placed) {
      try {
        const { previous, root } = await readAnchor(this.#dependencies.s3, place);
        if (previous?.root !== before?.root || previous?.key !== before?.key) {
          this.#add(
            anchorBroken(
              place,
              'it does not follow the anchor before it',
              before ? `${before.key} with root ${before.root}` : 'no anchor before it',
              previous ? `${previous.key} with root ${previous.root}` : 'none',
            ),
          );
        }
        before = { key: place.key, root };
      } catch (error) {
        if (!(error instanceof AnchorBroken)) throw error;
        const known = this.result.findings.some(({ chain }) => chain === place.key);
        if (!known) this.#add(anchorBroken(place, error.message));
        before = undefined;
      }
    }
  }

  #end(finding: Finding | undefined): void {
    if (finding) this.#add(finding);
    this.result.chains += 1;
    this.#tell();
  }

  #add(finding: Finding): void {
    this.result.findings.push(finding);
  }

  #tell(): void {
    const { chains, events, objects, bytes } = this.result;
    this.#dependencies.onProgress?.({ chains, events, objects, bytes });
  }

  // --- objects ----------------------------------------------------------------------------------------------------

  /** Every object that an event speaks of, at the version it names. */
  async #objects(chain: string, event: LineageItem, seen: Set<string>): Promise<Finding | undefined> {
    const fresh = [...(event.inputs ?? []), ...(event.outputs ?? [])].filter((object) => {
      const name = nameOf(object);
      if (!object.checksum || seen.has(name)) return false;
      seen.add(name);
      return true;
    });
    const findings = new Map<LineageObject, Finding>();
    await forEachConcurrently(fresh, OBJECTS_AT_ONCE, async (object) => {
      const finding = await this.#object(chain, event, object);
      if (finding) findings.set(object, finding);
    });
    const first = fresh.find((object) => findings.has(object));
    return first && findings.get(first);
  }

  async #object(chain: string, event: LineageItem, object: LineageObject): Promise<Finding | undefined> {
    const { landingBucket } = this.#dependencies;
    if (object.bucket === landingBucket || object.checksum?.startsWith('etag:')) {
      return this.#listed(chain, event, object, object.bucket === landingBucket);
    }
    if (!(event.inputs ?? []).includes(object) || !object.key.startsWith('models/')) {
      return this.#sum(chain, event, object);
    }
    const name = nameOf(object);
    const shared = this.#shared.get(name) ?? this.#sum(chain, event, object);
    this.#shared.set(name, shared);
    const finding = await shared;
    return finding && { ...finding, chain, event: { sk: event.sk, action: event.action } };
  }

  /** Reads an object to its end and compares its checksum. */
  async #sum(chain: string, event: LineageItem, object: LineageObject): Promise<Finding | undefined> {
    const { bucket, key, versionId, checksum = '' } = object;
    const at = {
      chain,
      event: { sk: event.sk, action: event.action },
      object: { bucket, key, ...(versionId && { versionId }) },
    };
    for (let attempt = 1; ; attempt++) {
      try {
        const body = await this.#open(object);
        if (!body) {
          return {
            kind: 'object-missing',
            ...at,
            message: `${key} is on record, but not in ${bucket} any more.`,
            expected: checksum,
            found: versionId ? `no version ${versionId}` : 'no such object',
          };
        }
        const found = await this.#digest(body, checksum);
        this.result.objects += 1;
        this.#tell();
        if (found === checksum) return undefined;
        return {
          kind: 'object-changed',
          ...at,
          message: `${key} does not hold the bytes that are on record.`,
          expected: checksum,
          found,
        };
      } catch (error) {
        this.#dependencies.signal?.throwIfAborted();
        if (attempt < READ_ATTEMPTS) continue;
        // S3 not answering at all, or not to us, says nothing of the object: this throws where it is that.
        await this.#head(object);
        return {
          kind: 'object-unreadable',
          ...at,
          message: `${key} cannot be read to its end.`,
          expected: checksum,
          found: error instanceof Error ? `${error.name}: ${error.message}` : String(error),
        };
      }
    }
  }

  async #open({ bucket, key, versionId }: LineageObject): Promise<Readable | undefined> {
    try {
      const { Body } = await this.#dependencies.s3.send(
        new GetObjectCommand({ Bucket: bucket, Key: key, VersionId: versionId }),
      );
      return Body as Readable;
    } catch (error) {
      if (isGone(error)) return undefined;
      throw error;
    }
  }

  /** The checksum of a stream, in the way that `like` is written. */
  async #digest(body: Readable, like: string): Promise<string> {
    const count = (bytes: Uint8Array) => {
      this.result.bytes += bytes.length;
      this.#dependencies.signal?.throwIfAborted();
    };
    const [kind = ''] = like.split(':');
    if (kind === 'crc64nvme') {
      const crc = new Crc64Nvme();
      for await (const bytes of body) {
        count(bytes);
        crc.update(bytes);
      }
      return `crc64nvme:${Buffer.from(await crc.digest()).toString('base64')}`;
    }
    const hash = createHash('sha256');
    for await (const bytes of body) {
      count(bytes);
      hash.update(bytes);
    }
    return `sha256:${hash.digest('hex')}`;
  }

  /** What the key holds now must be what the chain last put there; the version itself has been read. */
  async #current(chain: string, event: LineageItem, object: LineageObject): Promise<Finding | undefined> {
    const now = await this.#head({ bucket: object.bucket, key: object.key });
    if (now && (object.versionId === undefined || now.VersionId === object.versionId)) return undefined;
    const { bucket, key } = object;
    if (!now) {
      return {
        kind: 'object-missing',
        chain,
        event: { sk: event.sk, action: event.action },
        object: { bucket, key },
        message: `${key} was deleted; the version on record is kept and can be put back.`,
        expected: `version ${object.versionId}`,
        found: 'a delete marker',
      };
    }
    const finding = await this.#sum(chain, event, { ...object, versionId: now.VersionId });
    return finding && { ...finding, message: `${key} was overwritten; the version on record is kept.` };
  }

  /**
   * By what S3 itself says of the object, without reading it: files in Landing, and what only its ETag is known of.
   * Landing is where files come and go: none that is missing there is a broken link.
   */
  async #listed(
    chain: string,
    event: LineageItem,
    object: LineageObject,
    inLanding: boolean,
  ): Promise<Finding | undefined> {
    const { bucket, key, versionId, checksum = '' } = object;
    const at = {
      chain,
      event: { sk: event.sk, action: event.action },
      object: { bucket, key, ...(versionId && { versionId }) },
      expected: checksum,
    };
    const head = await this.#head(object);
    if (!head && inLanding) {
      this.result.gone += 1;
      return undefined;
    }
    if (!head) {
      return {
        kind: 'object-missing',
        ...at,
        message: `${key} is on record, but not in ${bucket} any more.`,
        found: 'no such object',
      };
    }
    // Without versions a key of Landing may hold a later file by now.
    if (inLanding && versionId === undefined) return undefined;
    if (checksum.startsWith('sha256:')) return this.#sum(chain, event, object);
    const bare = (etag: string | undefined) => etag?.replaceAll('"', '');
    const found = checksum.startsWith('crc64nvme:')
      ? head.ChecksumCRC64NVME && `crc64nvme:${head.ChecksumCRC64NVME}`
      : `etag:${bare(head.ETag)}`;
    this.result.objects += 1;
    if (found === undefined || found === bare(checksum)) return undefined;
    return { kind: 'object-changed', ...at, message: `${key} is not the object that is on record.`, found };
  }

  async #head({ bucket, key, versionId }: LineageObject): Promise<HeadObjectCommandOutput | undefined> {
    try {
      return await this.#dependencies.s3.send(
        new HeadObjectCommand({ Bucket: bucket, Key: key, VersionId: versionId, ChecksumMode: 'ENABLED' }),
      );
    } catch (error) {
      if (isGone(error)) return undefined;
      throw error;
    }
  }
}

/** What an event put under its keys itself, and did not find there: bytes that were in Bronze already are another's. */
function writtenBy({ inputs = [], outputs = [], parameters }: LineageItem): LineageObject[] {
  if (parameters?.duplicateOf !== undefined) return [];
  return outputs.filter(
    (output) =>
      output.checksum && !inputs.some(({ bucket, key }) => bucket === output.bucket && key === output.key),
  );
}

const nameOf = ({ bucket, key, versionId, checksum }: LineageObject) =>
  [bucket, key, versionId, checksum].join('\0');

/** S3 answers a request for a delete marker with MethodNotAllowed, and a HEAD without a name. */
function isGone(error: unknown): boolean {
  const { name, $metadata } = error as { name?: string; $metadata?: { httpStatusCode?: number } };
  return (
    isNotFound(error) || name === 'MethodNotAllowed' || [404, 405].includes($metadata?.httpStatusCode ?? 0)
  );
}

function lost(head: ChainHead, found: ChainHead | undefined, { date }: PlacedAnchor): Finding {
  return {
    kind: found ? 'anchored-event-altered' : 'anchored-event-removed',
    chain: head.pk,
    event: { sk: head.sk, action: '' },
    message: found
      ? `The anchor of ${date} holds another event ${head.sk} than the record does.`
      : `Event ${head.sk} was there when the anchor of ${date} was taken and is not any more.`,
    expected: `hash ${head.hash}`,
    found: found ? `hash ${found.hash}` : 'no such event',
  };
}

const lostBefore = (head: ChainHead, { date }: PlacedAnchor): Finding => ({
  kind: 'anchored-event-removed',
  chain: head.pk,
  event: { sk: head.sk, action: '' },
  message: `When the anchor of ${date} was taken, event ${head.sk} of the anchor before was no longer as it had been.`,
  expected: `hash ${head.hash}`,
  found: 'another event, or none',
});

const anchorBroken = (
  { key }: PlacedAnchor,
  what: string,
  expected = 'the anchor as it was written',
  found = what,
): Finding => ({
  kind: 'anchor-broken',
  chain: key,
  message: `The anchor ${key}: ${what}.`,
  expected,
  found,
});
