/**
 * EventBridge: the rules of the default bus, what they match or when they are due, and delivery that survives a
 * crash. An event is on disk for each target before S3's answer to it counts, and stays there until the target has
 * accepted it.
 */
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { z } from 'zod';
import { compilePattern, type Pattern, readPath } from './patterns.ts';
import { bucketArn, type Resource, ruleArn } from './resources.ts';
import type { ObjectCreated } from './s3/service.ts';
import { Schedules } from './schedules.ts';
import { LOCAL_ACCOUNT, LOCAL_REGION, UnsupportedLocally } from './types.ts';

type RuleProperties = Extract<Resource, { type: 'AWS::Events::Rule' }>['properties'];
type TargetProperties = RuleProperties['Targets'][number];

/** Puts an event that its target never took into a queue; resolves once it is there for good. */
export type Bury = (dead: {
  queueArn: string;
  ruleArn: string;
  /** JSON text. */
  input: string;
  /** As EventBridge says what happened: RULE_ARN, TARGET_ARN, ERROR_CODE, … */
  attributes: Record<string, string>;
}) => Promise<void>;

/** Hands an event to a target; resolves once the target has it for good. `id` is the same for a redelivery. */
export type Deliver = (delivery: {
  id: string;
  targetArn: string;
  roleArn: string | undefined;
  ruleArn: string;
  /** JSON text. */
  input: string;
  /** How often it has failed before. */
  attempts: number;
}) => Promise<void>;

interface Rule {
  name: string;
  /** Absent for a schedule. */
  pattern?: Pattern;
  targets: TargetProperties[];
}

const deliverySchema = z.object({
  id: z.string(),
  rule: z.string(),
  targetArn: z.string(),
  roleArn: z.string().optional(),
  input: z.string(),
  /** Where it goes when it cannot be delivered, and what is tried before that. */
  deadLetter: z.object({ queueArn: z.string(), attempts: z.number(), seconds: z.number() }).optional(),
  /** Milliseconds since 1970. */
  since: z.number().optional(),
  attempts: z.number().default(0),
  lastError: z.string().optional(),
});
type Delivery = z.infer<typeof deliverySchema>;

/** Errors that no retry mends: the target or the right to it is not there. */
const HOPELESS = new Set([
  'AccessDenied',
  'AccessDeniedException',
  'NoSuchEntity',
  'NotFound',
  'ResourceNotFoundException',
  'StateMachineDoesNotExist',
]);

const FIRST_RETRY_MS = 200;
const LAST_RETRY_MS = 30_000;

export class Events {
  readonly #folder: string;
  readonly #deliver: Deliver;
  readonly #bury: Bury;
  readonly #rules = new Map<string, Rule>();
  readonly #running = new Set<Promise<void>>();
  readonly #timers = new Set<NodeJS.Timeout>();
  readonly #schedules: Schedules;
  #closed = false;

  constructor(options: { folder: string; deliver: Deliver; bury: Bury }) {
    this.#folder = options.folder;
    this.#deliver = options.deliver;
    this.#bury = options.bury;
    mkdirSync(this.#folder, { recursive: true });
    this.#schedules = new Schedules({
      folder: join(this.#folder, 'schedules'),
      fire: (name, due) => this.#due(name, due),
    });
  }

  /** Throws {@link UnsupportedLocally} for what cannot be matched or delivered here. */
  putRule(name: string, rule: RuleProperties): void {
    const where = `rule ${name}`;
    if (rule.ScheduleExpression !== undefined) {
      this.#putSchedule(name, rule.ScheduleExpression, rule);
      return;
    }
    if (rule.EventPattern === undefined) {
      throw new UnsupportedLocally('a rule without EventPattern or ScheduleExpression', where);
    }
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

  #putSchedule(name: string, expression: string, rule: RuleProperties): void {
    const where = `rule ${name}`;
    if (rule.EventPattern !== undefined) {
      throw new UnsupportedLocally('both EventPattern and ScheduleExpression', where);
    }
    for (const target of rule.Targets) checkTarget(target, where);
    if (rule.State === 'DISABLED') {
      this.#rules.delete(name);
      this.#schedules.remove(name);
      return;
    }
    this.#rules.set(name, { name, targets: rule.Targets });
    this.#schedules.put(name, expression);
  }

  /** Takes an event in: on return it is on disk for every target of every rule that matches. */
  async objectCreated(created: ObjectCreated): Promise<void> {
    const event = objectCreatedEvent(created);
    for (const rule of this.#rules.values()) if (rule.pattern?.(event)) this.#take(rule, event);
  }

  #due(name: string, due: Date): void {
    const rule = this.#rules.get(name);
    if (rule) this.#take(rule, scheduledEvent(name, due));
  }

  #take(rule: Rule, event: { id: string }): void {
    for (const target of rule.targets) {
      const delivery: Delivery = {
        id: uuid(`${event.id}/${rule.name}/${target.Id}`),
        rule: rule.name,
        targetArn: target.Arn,
        input: transform(target, event),
        since: Date.now(),
        attempts: 0,
        ...(target.RoleArn === undefined ? {} : { roleArn: target.RoleArn }),
        ...deadLetterOf(target),
      };
      if (existsSync(this.#path(delivery))) continue;
      this.#write(delivery);
      this.#attempt(delivery, FIRST_RETRY_MS);
    }
  }

  /** Takes up what was not delivered before the last stop, and begins to keep time. */
  recover(): void {
    for (const delivery of this.pending()) this.#attempt(delivery, FIRST_RETRY_MS);
    this.#schedules.start();
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
    this.#schedules.close();
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
      const { id, targetArn, roleArn, input, attempts } = delivery;
      await this.#deliver({ id, targetArn, roleArn, ruleArn: ruleArn(delivery.rule), input, attempts });
      rmSync(this.#path(delivery), { force: true });
    } catch (error) {
      const lastError = error instanceof Error ? `${error.name}: ${error.message}` : String(error);
      const failed = { ...delivery, attempts: delivery.attempts + 1, lastError };
      this.#write(failed);
      if (await this.#buried(failed, error)) return;
      const timer = setTimeout(() => {
        this.#timers.delete(timer);
        this.#attempt(failed, Math.min(retryMs * 2, LAST_RETRY_MS));
      }, retryMs);
      this.#timers.add(timer);
      if (this.#closed) clearTimeout(timer);
    }
  }

  /** Gives up on a delivery that has a queue to go to, once nothing more is to be tried. */
  async #buried(delivery: Delivery, error: unknown): Promise<boolean> {
    const { deadLetter, attempts, since = Date.now(), input, targetArn } = delivery;
    const code = error instanceof Error ? error.name : 'Error';
    if (deadLetter === undefined) return false;
    const exhausted =
      attempts > deadLetter.attempts
        ? 'MaximumRetryAttempts'
        : Date.now() - since > deadLetter.seconds * 1000
          ? 'MaximumEventAgeInSeconds'
          : undefined;
    if (exhausted === undefined && !HOPELESS.has(code)) return false;
    const rule = ruleArn(delivery.rule);
    const attributes = {
      RULE_ARN: rule,
      TARGET_ARN: targetArn,
      ERROR_CODE: code,
      ERROR_MESSAGE: error instanceof Error ? error.message : String(error),
      RETRY_ATTEMPTS: String(attempts - 1),
      ...(exhausted && { EXHAUSTED_RETRY_CONDITION: exhausted }),
    };
    try {
      await this.#bury({ queueArn: deadLetter.queueArn, ruleArn: rule, input, attributes });
    } catch {
      // The queue did not take it either: it stays here, and is tried again.
      return false;
    }
    rmSync(this.#path(delivery), { force: true });
    return true;
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

/** What a schedule's targets get; the same rule and time give the same id. */
export function scheduledEvent(rule: string, due: Date) {
  return {
    version: '0',
    id: uuid(`${rule}@${due.toISOString()}`),
    'detail-type': 'Scheduled Event',
    source: 'aws.events',
    account: LOCAL_ACCOUNT,
    time: `${due.toISOString().slice(0, 19)}Z`,
    region: LOCAL_REGION,
    resources: [ruleArn(rule)],
    detail: {},
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

function deadLetterOf({ DeadLetterConfig, RetryPolicy }: TargetProperties): Pick<Delivery, 'deadLetter'> {
  if (DeadLetterConfig === undefined) return {};
  const { MaximumRetryAttempts = 185, MaximumEventAgeInSeconds = 86_400 } = RetryPolicy ?? {};
  return {
    deadLetter: {
      queueArn: DeadLetterConfig.Arn,
      attempts: MaximumRetryAttempts,
      seconds: MaximumEventAgeInSeconds,
    },
  };
}

// --- what a target gets ------------------------------------------------------------------------------------------

function checkTarget(target: TargetProperties, where: string): void {
  const service = target.Arn.split(':')[2];
  if (service === undefined || !['states', 'sns', 'lambda'].includes(service)) {
    throw new UnsupportedLocally(`target ${target.Arn}`, where);
  }
  if (service === 'lambda' && target.RoleArn !== undefined) {
    throw new UnsupportedLocally(
      `RoleArn of the function's target ${target.Id}; use AWS::Lambda::Permission`,
      where,
    );
  }
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
