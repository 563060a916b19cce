/**
 * What taking slides in costs, counted by the local AWS: requests by class, table writes, state transitions and time
 * a slide, for cohorts of very different size. The slides are tiny, because S3 copies by itself what is in them; the
 * execution is stopped where inference would begin.
 */
import { randomBytes } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { PutObjectCommand, S3Client } from '@aws-sdk/client-s3';
import {
  DescribeExecutionCommand,
  ListExecutionsCommand,
  paginateGetExecutionHistory,
  SFNClient,
  StopExecutionCommand,
} from '@aws-sdk/client-sfn';
import { ensureReady, type Ready } from '../cli/commands/setup.ts';
import { PROJECT } from '../cli/paths.ts';
import { UserError } from '../cli/terminal.ts';
import { forEachConcurrently } from '../core/concurrency.ts';
import { modelKey } from '../core/keys.ts';
import { readModelPackage } from '../core/models.ts';
import { PRICES } from '../core/prices.ts';
import { type LocalAws, startLocalAws } from '../local/engine.ts';
import type { Bench, Context, Measured } from './bench.ts';

const COHORTS = [1, 100, 10_000];
const QUICK_COHORTS = [1, 20];
const SLIDE_BYTES = 200;

export const ingestion: Bench = {
  name: 'ingestion',
  about:
    'requests, table writes, transitions, dollars and time a slide from Landing to Bronze, by size of cohort',
  measure,
};

/** What one cohort's ingestion came to, in all. */
interface Counted {
  slides: number;
  /** By the classes of core/prices.ts. */
  requests: Record<string, number>;
  transitions: number;
  /** From the manifest's arrival to the last slide. */
  seconds: number;
}

async function measure({ quick, screen }: Context): Promise<Measured> {
  const ready = await ensureReady(screen, { stage: 'dev' });
  const cohorts: Counted[] = [];
  for (const slides of quick ? QUICK_COHORTS : COHORTS) {
    const counted = await screen.task(`Taking in ${slides.toLocaleString('en')} slides`, () =>
      takeIn(slides, ready),
    );
    cohorts.push(counted);
  }
  const figures: Record<string, number> = {};
  for (const { slides, requests, transitions, seconds } of cohorts) {
    const each = (name: string, value: number) => {
      figures[`${slides.toLocaleString('en')}: ${name} a slide`] = value / slides;
    };
    for (const [name, count] of Object.entries(requests)) each(name, count);
    each('transitions', transitions);
    each('USD', usd(requests, transitions));
    each('milliseconds', seconds * 1000);
  }
  const [few, many] = cohorts.slice(-2);
  const growth = (of: (counted: Counted) => number) =>
    few && many ? of(many) / many.slides / (of(few) / few.slides) : Number.NaN;
  const label = `a slide of ${many?.slides.toLocaleString('en')}, to one of ${few?.slides.toLocaleString('en')}`;
  return {
    figures,
    ratios: {
      [`USD ${label}`]: growth(({ requests, transitions }) => usd(requests, transitions)),
      [`table writes ${label}`]: growth(({ requests }) => requests.dynamodbWrite ?? 0),
      [`time ${label}`]: growth(({ seconds }) => seconds),
    },
  };
}

function usd(requests: Record<string, number>, transitions: number): number {
  const of = ([name, count]: [string, number]) => count * (PRICES.requests[name] ?? 0);
  return Object.entries(requests)
    .map(of)
    .reduce((a, b) => a + b, transitions * PRICES.transition);
}

async function takeIn(slides: number, ready: Ready): Promise<Counted> {
  const state = await mkdtemp(join(tmpdir(), 'slideway-bench-'));
  const containers = join(PROJECT, 'containers');
  const { python } = ready;
  const engine = await startLocalAws({ state, package: ready.package, python, containers });
  const client = { endpoint: engine.endpoint, region: engine.region, credentials: engine.credentials };
  const s3 = new S3Client({ ...client, forcePathStyle: true });
  const stepFunctions = new SFNClient(client);
  try {
    const { LandingBucket = '', ModelsBucket = '', StateMachineArn = '' } = engine.outputs;
    const { model } = await readModelPackage(createReadStream(ready.model));
    await s3.send(
      new PutObjectCommand({
        Bucket: ModelsBucket,
        Key: modelKey(model.name, model.version),
        Body: await readFile(ready.model),
      }),
    );
    const rows = Array.from({ length: slides }, (_, i) => `slide-${String(i).padStart(6, '0')}`);
    await forEachConcurrently(rows, 8, async (row) => {
      await s3.send(
        new PutObjectCommand({
          Bucket: LandingBucket,
          Key: `bench/${row}.svs`,
          Body: randomBytes(SLIDE_BYTES),
        }),
      );
    });
    await settled(engine);

    const begun = performance.now();
    const manifest = `slide,slide_id,model\n${rows.map((row) => `${row}.svs,${row},${model.name}\n`).join('')}`;
    await s3.send(new PutObjectCommand({ Bucket: LandingBucket, Key: 'bench/repo.csv', Body: manifest }));
    const executionArn = await untilIngested(stepFunctions, StateMachineArn);
    const seconds = (performance.now() - begun) / 1000;
    await stepFunctions.send(new StopExecutionCommand({ executionArn }));
    const requests = requestsOf(engine);
    // Every object's arrival calls mark-arrival; a slide calls ingest-slide; claiming and planning are once a run.
    requests.lambda = slides + slides + 1 + 2;
    const { standard } = engine.services.stepFunctions.transitions(executionArn);
    return { slides, requests, transitions: standard, seconds };
  } finally {
    s3.destroy();
    stepFunctions.destroy();
    await engine.stop();
    await rm(state, { recursive: true, force: true });
  }
}

/** Waits until no function works on the arrivals any more. */
async function settled(engine: LocalAws): Promise<void> {
  for (let before = ''; ; ) {
    const now = JSON.stringify(engine.counts().byPrincipal);
    if (now === before) return;
    before = now;
    await sleep(1500);
  }
}

/** Waits until all slides are taken in; answers the execution's ARN. */
async function untilIngested(stepFunctions: SFNClient, stateMachineArn: string): Promise<string> {
  for (;;) {
    await sleep(50);
    const { executions = [] } = await stepFunctions.send(new ListExecutionsCommand({ stateMachineArn }));
    const executionArn = executions[0]?.executionArn;
    if (!executionArn) continue;
    const history = paginateGetExecutionHistory(
      { client: stepFunctions },
      { executionArn, reverseOrder: true },
    );
    for await (const { events = [] } of history)
      if (events.some(({ stateEnteredEventDetails: state }) => state?.name === 'Plan inference'))
        return executionArn;
    const { status } = await stepFunctions.send(new DescribeExecutionCommand({ executionArn }));
    if (status !== 'RUNNING') throw new UserError(`The execution ended ${status} before all slides were in.`);
  }
}

/** What the functions and the state machine asked for, in the classes of core/prices.ts; not what this bench did. */
function requestsOf(engine: LocalAws): Record<string, number> {
  const requests: Record<string, number> = { s3Get: 0, s3Put: 0, dynamodbRead: 0, dynamodbWrite: 0 };
  for (const [arn, counts] of Object.entries(engine.counts().byPrincipal)) {
    if (!arn.includes(':role/')) continue;
    for (const [name, count] of Object.entries(counts)) {
      const [service = '', operation = ''] = name.split('.');
      const reads = /^(Get|Query|BatchGet|Scan)/.test(operation);
      if (service === 's3' && operation === 'delete') continue;
      if (service === 's3') add(requests, operation === 'get' ? 's3Get' : 's3Put', count);
      if (service === 'dynamodb') add(requests, reads ? 'dynamodbRead' : 'dynamodbWrite', count);
    }
  }
  return requests;
}

function add(counts: Record<string, number>, name: string, count: number): void {
  counts[name] = (counts[name] ?? 0) + count;
}
