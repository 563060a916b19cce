/** Schedules, function targets and locked buckets as a template has them, in a running engine. */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { DeleteObjectCommand, ListObjectVersionsCommand, S3Client } from '@aws-sdk/client-s3';
import { afterEach, describe, expect, it } from 'vitest';
import { type LocalAws, startLocalAws } from '../../local/engine.ts';
import { packaged, role, temporaryFolder, until } from './kit.ts';

/** Writes what it is called with; fails as often as its environment says, counting by what it has written. */
const HANDLER = `
import { ListObjectsV2Command, PutObjectCommand, S3Client } from '@aws-sdk/client-s3';
const s3 = new S3Client({});
const { BUCKET: Bucket, FAILURES } = process.env;
export const handler = async (event) => {
  const { KeyCount } = await s3.send(new ListObjectsV2Command({ Bucket }));
  await s3.send(new PutObjectCommand({ Bucket, Key: 'call-' + KeyCount, Body: JSON.stringify(event) }));
  if (KeyCount < Number(FAILURES)) throw new Error('not yet');
};`;

const BUNDLES = { note: { 'handler.mjs': HANDLER } };
const arn = (logicalId: string) => ({ 'Fn::GetAtt': [logicalId, 'Arn'] });

function template({ failures = 0, permission = true } = {}) {
  return {
    Resources: {
      Notes: {
        Type: 'AWS::S3::Bucket',
        Properties: {
          BucketName: 'lab-notes',
          VersioningConfiguration: { Status: 'Enabled' },
          ObjectLockEnabled: true,
          ObjectLockConfiguration: {
            ObjectLockEnabled: 'Enabled',
            Rule: { DefaultRetention: { Mode: 'COMPLIANCE', Years: 1 } },
          },
        },
      },
      NoteRole: {
        Type: 'AWS::IAM::Role',
        Properties: role('lambda.amazonaws.com', [
          { Effect: 'Allow', Action: 's3:ListBucket', Resource: arn('Notes') },
          { Effect: 'Allow', Action: 's3:PutObject', Resource: { 'Fn::Sub': `\${Notes.Arn}/*` } },
        ]),
      },
      Note: {
        Type: 'AWS::Lambda::Function',
        Properties: {
          FunctionName: 'lab-note',
          Code: { S3Bucket: 'deployment', S3Key: 'serverless/note.zip' },
          Handler: 'handler.handler',
          Runtime: 'nodejs24.x',
          Role: arn('NoteRole'),
          Timeout: 20,
          Environment: { Variables: { BUCKET: { Ref: 'Notes' }, FAILURES: String(failures) } },
        },
      },
      Nightly: {
        Type: 'AWS::Events::Rule',
        Properties: {
          Name: 'lab-nightly',
          ScheduleExpression: 'cron(0 2 * * ? *)',
          Targets: [{ Id: 'note', Arn: arn('Note') }],
        },
      },
      ...(permission && {
        NightlyMay: {
          Type: 'AWS::Lambda::Permission',
          Properties: {
            Action: 'lambda:InvokeFunction',
            FunctionName: arn('Note'),
            Principal: 'events.amazonaws.com',
            SourceArn: arn('Nightly'),
          },
        },
      }),
    },
  };
}

const running: LocalAws[] = [];
afterEach(async () => {
  for (const aws of running.splice(0)) await aws.stop();
});

/** An engine on a state folder in which the schedule came due before. */
async function start(options: Parameters<typeof template>[0] = {}) {
  const state = temporaryFolder();
  const schedules = join(state, 'events', 'schedules');
  mkdirSync(schedules, { recursive: true });
  writeFileSync(
    join(schedules, 'lab-nightly.json'),
    JSON.stringify({ expression: 'cron(0 2 * * ? *)', next: '2026-01-01T02:00:00.000Z' }),
  );
  const aws = await startLocalAws({
    state,
    package: packaged(template(options), BUNDLES),
    python: 'python3',
    containers: temporaryFolder(),
  });
  running.push(aws);
  const s3 = new S3Client({
    endpoint: aws.endpoint,
    region: aws.region,
    credentials: aws.credentials,
    forcePathStyle: true,
  });
  const calls = async () => {
    const { Versions = [] } = await s3.send(new ListObjectVersionsCommand({ Bucket: 'lab-notes' }));
    return Versions;
  };
  const settled = (count: number) =>
    until(() => (aws.services.events.pending().length === 0 ? count : undefined));
  return { aws, s3, calls, settled };
}

describe('a schedule', () => {
  it('calls the function that it names, with a scheduled event', async () => {
    const { s3, calls, settled } = await start();
    await settled(1);
    const [call, ...more] = await calls();
    expect(more).toEqual([]);
    expect(call?.Key).toBe('call-0');
    // What the function wrote is locked, as the bucket's default has it.
    await expect(
      s3.send(new DeleteObjectCommand({ Bucket: 'lab-notes', Key: 'call-0', VersionId: call?.VersionId })),
    ).rejects.toThrow(/object lock/);
  });

  it('whose function fails is tried twice more, as Lambda does', async () => {
    const { calls, settled } = await start({ failures: 9 });
    await settled(3);
    expect((await calls()).map(({ Key }) => Key)).toEqual(['call-0', 'call-1', 'call-2']);
  });

  it('without the permission to call the function is refused, and waits', async () => {
    const { aws, calls } = await start({ permission: false });
    const [waiting] = await until(() => {
      const pending = aws.services.events.pending();
      return pending[0]?.lastError === undefined ? undefined : pending;
    });
    expect(waiting?.lastError).toMatch(/AccessDenied.*lambda:InvokeFunction/);
    expect(await calls()).toEqual([]);
  });
});
