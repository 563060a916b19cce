/**
 * EventBridge: the rules of the default bus, what they match, and delivery that survives a crash. An event is on
 * disk for each target before S3's answer to it counts, and stays there until the target has accepted it.
 */
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { z } from 'zod';
import { compilePattern, type Pattern, readPath } from './patterns.ts';
import { bucketArn, type Resource, ruleArn } from './resources.ts';
import type { ObjectCreated } from './s3/service.ts';
import { LOCAL_ACCOUNT, LOCAL_REGION, UnsupportedLocally } from './types.ts';

type RuleProperties = Extract<Resource, { type: 'AWS::Events::Rule' }>['properties'];
type TargetProperties = RuleProperties['Targets'][number];

/** Hands an event to a target; resolves once the target has it for good. `id` is the same for a redelivery. */
export type Deliver = (delivery: {
  id: string;
  targetArn: string;
  roleArn: string | undefined;
  ruleArn: string;
  /** JSON text. */
  input: string;
}) => Promise<void>;

interface Rule {
  name: string;
  pattern: Pattern;
  targets: TargetProperties[];
}

const deliverySchema = z.object({
  id: z.string(),
  rule: z.string(),
  targetArn: z.string(),
  roleArn: z.string().optional(),
  input: z.string(),
  lastError: z.string().optional(),
});
type Delivery = z.infer<typeof deliverySchema>;

const FIRST_RETRY_MS = 200;
const LAST_RETRY_MS = 30_000;

export class Events {
  readonly #folder: string;
  readonly #deliver: Deliver;
  readonly #rules = new Map<string, Rule>();
  readonly #running = new Set<Promise<void>>();
  readonly #timers = new Set<NodeJS.Timeout>();
  #closed = false;

  constructor(options: { folder: string; deliver: Deliver }) {
    this.#folder = options.folder;
    this.#deliver = options.deliver;
    mkdirSync(this.#folder, { recursive: true });
  }

  /** Throws {@link UnsupportedLocally} for what cannot be matched or delivered here. */
  putRule(name: string, rule: RuleProperties): void {
    const where = `rule ${name}`;
    if (rule.ScheduleExpression !== undefined) throw new UnsupportedLocally('ScheduleExpression', where);
    if (rule.EventPattern === undefined) throw new UnsupportedLocally('a rule without EventPattern', where);
    const source = rule.EventPattern.source;
    if (!Array.isArray(source) || source.some((each) => each !== 'aws.s3')) {
      throw new UnsupportedLocally(
        `events of source ${JSON.stringify(source)}; only aws.s3 has events here`,
        where,
      );
    }
    const types = rule.EventPattern['detail-type'];
    if (!Array.isArray(types) || types.some((each) => each !== 'Object Created')) {
      throw new UnsupportedLocally(
        `detail-type ${JSON.stringify(types)}; S3 only says Object Created here`,
        where,
      );
    }
    for (const target of rule.Targets) checkTarget(target, where);
    const pattern = compilePattern(rule.EventPattern, where);
    if (rule.State === 'DISABLED') this.#rules.delete(name);
    else this.#rules.set(name, { name, pattern, targets: rule.Targets });
  }

  /** Takes an event in: on return it is on disk for every target of every rule that matches. */
  async objectCreated(created: ObjectCreated): Promise<void> {
    const event = objectCreatedEvent(created);
    for (const rule of this.#rules.values()) {
      if (!rule.pattern(event)) continue;
      for (const target of rule.targets) {
        const delivery: Delivery = {
          id: uuid(`${event.id}/${rule.name}/${target.Id}`),
          rule: rule.name,
          targetArn: target.Arn,
          input: transform(target, event),
          ...(target.RoleArn === undefined ? {} : { roleArn: target.RoleArn }),
        };
        if (existsSync(this.#path(delivery))) continue;
        this.#write(delivery);
        this.#attempt(delivery, FIRST_RETRY_MS);
      }
    }
  }

  /** Takes up what was not delivered before the last stop. */
  recover(): void {
    for (const delivery of this.pending()) this.#attempt(delivery, FIRST_RETRY_MS);
  }

  /** What waits to be accepted, with the last error if there was one. */
  pending(): Delivery[] {
    return readdirSync(this.#folder)
      .filter((name) => name.endsWith('.json'))
      .sort()
      .map((name) => deliverySchema.parse(JSON.parse(readFileSync(join(this.#folder, name), 'utf8'))));
  }

  /** Stops delivering; what is pending stays on disk. */
  async close(): Promise<void> {
    this.#closed = true;
    for (const timer of this.#timers) clearTimeout(timer);
    await Promise.all(this.#running);
  }

  #attempt(delivery: Delivery, retryMs: number): void {
    const run = this.#try(delivery, retryMs).finally(() => this.#running.delete(run));
    this.#running.add(run);
  }

  async #try(delivery: Delivery, retryMs: number): Promise<void> {
    if (this.#closed) return;
    try {
      const { id, targetArn, roleArn, input } = delivery;
      await this.#deliver({ id, targetArn, roleArn, ruleArn: ruleArn(delivery.rule), input });
      rmSync(this.#path(delivery), { force: true });
    } catch (error) {
      const lastError = error instanceof Error ? `${error.name}: ${error.message}` : String(error);
      const failed = { ...delivery, lastError };
      this.#write(failed);
      const timer = setTimeout(() => {
        this.#timers.delete(timer);
        this.#attempt(failed, Math.min(retryMs * 2, LAST_RETRY_MS));
      }, retryMs);
      this.#timers.add(timer);
      if (this.#closed) clearTimeout(timer);
    }
  }

  #path(delivery: Delivery): string {
    return join(this.#folder, `${delivery.id}.json`);
  }

  #write(delivery: Delivery): void {
    const path = this.#path(delivery);
    writeFileSync(`${path}.new`, JSON.stringify(delivery));
    renameSync(`${path}.new`, path);
  }
}

/** The event in the shape that EventBridge gives it; the same object version gives the same id. */
export function objectCreatedEvent(created: ObjectCreated) {
  const { bucket, key, size, etag, versionId, sequencer, reason, requester } = created;
  const id = uuid(`${bucket}/${key}/${versionId ?? ''}/${etag}/${sequencer}`);
  return {
    version: '0',
    id,
    'detail-type': 'Object Created',
    source: 'aws.s3',
    account: LOCAL_ACCOUNT,
    time: `${new Date().toISOString().slice(0, 19)}Z`,
    region: LOCAL_REGION,
    resources: [bucketArn(bucket)],
    detail: {
      version: '0',
      bucket: { name: bucket },
      object: {
        key,
        size,
        etag: etag.replaceAll('"', ''),
        ...(versionId === undefined ? {} : { 'version-id': versionId }),
        sequencer,
      },
      'request-id': id.replaceAll('-', '').slice(0, 16).toUpperCase(),
      // An account, as S3 has it; the ARN would tell more.
      requester: requester.split(':')[4] ?? requester,
      'source-ip-address': '127.0.0.1',
      reason,
    },
  };
}

function uuid(of: string): string {
  const hex = createHash('sha256').update(of).digest('hex');
  return [
    hex.slice(0, 8),
    hex.slice(8, 12),
    `8${hex.slice(13, 16)}`,
    `a${hex.slice(17, 20)}`,
    hex.slice(20, 32),
  ].join('-');
}

// --- what a target gets ------------------------------------------------------------------------------------------

function checkTarget(target: TargetProperties, where: string): void {
  const service = target.Arn.split(':')[2];
  if (service !== 'states' && service !== 'sns') throw new UnsupportedLocally(`target ${target.Arn}`, where);
  if (service === 'states' && target.RoleArn === undefined) {
    throw new UnsupportedLocally(`target ${target.Id} without a RoleArn`, where);
  }
  const given = [target.Input, target.InputPath, target.InputTransformer].filter((way) => way !== undefined);
  if (given.length > 1) {
    throw new UnsupportedLocally('more than one of Input, InputPath and InputTransformer', where);
  }
  const paths = Object.values(target.InputTransformer?.InputPathsMap ?? {});
  for (const path of target.InputPath === undefined ? paths : [target.InputPath]) readPath({}, path, where);
}

function transform(target: TargetProperties, event: unknown): string {
  if (target.Input !== undefined) return target.Input;
  if (target.InputPath !== undefined) return JSON.stringify(readPath(event, target.InputPath, '') ?? null);
  if (target.InputTransformer === undefined) return JSON.stringify(event);
  const { InputPathsMap, InputTemplate } = target.InputTransformer;
  const values: Record<string, unknown> = {
    'aws.events.event.json': event,
    'aws.events.event': event,
  };
  for (const [name, path] of Object.entries(InputPathsMap)) values[name] = readPath(event, path, '');
  // Within quotes a value is put in as text, elsewhere as JSON.
  let quoted = false;
  return InputTemplate.replace(/\\.|"|<([A-Za-z0-9_.-]+)>/g, (found, name: string | undefined) => {
    if (found === '"') quoted = !quoted;
    if (name === undefined || !(name in values)) return found;
    const value = values[name];
    if (!quoted) return JSON.stringify(value ?? null);
    const text = typeof value === 'string' ? value : value === undefined ? '' : JSON.stringify(value);
    return JSON.stringify(text).slice(1, -1);
  });
}
