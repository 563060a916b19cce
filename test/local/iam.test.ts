import { readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Iam, wildcard } from '../../local/iam.ts';
import { iamWith, temporaryFolder } from './kit.ts';

const ARN = 'arn:aws:iam::000000000000:role/worker';
const OBJECT = 'arn:aws:s3:::silver/runs/r1/run.json';

function decides(statements: unknown[], action: string, resource: string): boolean {
  try {
    iamWith({ worker: statements }).caller(ARN).authorize(action, resource);
    return true;
  } catch (error) {
    expect(error).toMatchObject({ code: 'AccessDenied', status: 403 });
    return false;
  }
}

const allow = (Action: string | string[], Resource: string | string[], more = {}) => ({
  Effect: 'Allow',
  Action,
  Resource,
  ...more,
});
const deny = (Action: string, Resource: string, more = {}) => ({ Effect: 'Deny', Action, Resource, ...more });

describe('identity policies', () => {
  it.each([
    ['nothing said is a refusal', [], 's3:GetObject', OBJECT, false],
    ['an exact statement allows', [allow('s3:GetObject', OBJECT)], 's3:GetObject', OBJECT, true],
    ['actions ignore case', [allow('S3:getobject', OBJECT)], 's3:GetObject', OBJECT, true],
    ['resources do not', [allow('s3:GetObject', OBJECT.toUpperCase())], 's3:GetObject', OBJECT, false],
    ['another action is refused', [allow('s3:GetObject', OBJECT)], 's3:PutObject', OBJECT, false],
    ['* spans slashes', [allow('s3:Get*', 'arn:aws:s3:::silver/*')], 's3:GetObject', OBJECT, true],
    ['? is one character', [allow('s3:Get?bject', '*')], 's3:GetObject', OBJECT, true],
    ['? is not none', [allow('s3:GetObject?', '*')], 's3:GetObject', OBJECT, false],
    ['a bucket is not its objects', [allow('s3:*', 'arn:aws:s3:::silver')], 's3:GetObject', OBJECT, false],
    ['dots are dots', [allow('*', 'arn:aws:s3:::silver/runs/r1/runxjson')], 's3:GetObject', OBJECT, false],
    ['lists are alternatives', [allow(['a:B', 's3:GetObject'], ['x', OBJECT])], 's3:GetObject', OBJECT, true],
    ['Deny wins', [allow('*', '*'), deny('s3:*', OBJECT)], 's3:GetObject', OBJECT, false],
    ['Deny elsewhere does not matter', [allow('*', '*'), deny('s3:*', 'x')], 's3:GetObject', OBJECT, true],
    [
      'NotAction is all others',
      [{ Effect: 'Allow', NotAction: 'iam:*', Resource: '*' }],
      's3:GetObject',
      OBJECT,
      true,
    ],
    [
      'NotAction excludes',
      [{ Effect: 'Allow', NotAction: 's3:*', Resource: '*' }],
      's3:GetObject',
      OBJECT,
      false,
    ],
    [
      'NotResource excludes',
      [{ Effect: 'Allow', Action: '*', NotResource: OBJECT }],
      's3:GetObject',
      OBJECT,
      false,
    ],
    [
      'Bool is compared',
      [allow('*', '*', { Condition: { Bool: { 'aws:SecureTransport': true } } })],
      's3:GetObject',
      OBJECT,
      true,
    ],
    [
      'loopback counts as secure',
      [allow('*', '*'), deny('*', '*', { Condition: { Bool: { 'aws:SecureTransport': 'false' } } })],
      's3:GetObject',
      OBJECT,
      true,
    ],
    [
      'StringEquals',
      [allow('*', '*', { Condition: { StringEquals: { 'aws:ResourceAccount': ['1', '000000000000'] } } })],
      's3:GetObject',
      OBJECT,
      true,
    ],
    [
      'StringNotEquals',
      [allow('*', '*', { Condition: { StringNotEquals: { 'aws:ResourceAccount': '000000000000' } } })],
      's3:GetObject',
      OBJECT,
      false,
    ],
    [
      'StringLike',
      [allow('*', '*', { Condition: { StringLike: { 'aws:PrincipalArn': '*:role/work??' } } })],
      's3:GetObject',
      OBJECT,
      true,
    ],
    [
      'ArnLike',
      [allow('*', '*', { Condition: { ArnLike: { 'aws:PrincipalArn': 'arn:aws:iam::*:role/other' } } })],
      's3:GetObject',
      OBJECT,
      false,
    ],
    [
      'a key that is absent fails',
      [allow('*', '*', { Condition: { StringEquals: { 'aws:SourceArn': 'x' } } })],
      's3:GetObject',
      OBJECT,
      false,
    ],
    [
      '… unless IfExists',
      [allow('*', '*', { Condition: { StringEqualsIfExists: { 'aws:SourceArn': 'x' } } })],
      's3:GetObject',
      OBJECT,
      true,
    ],
    [
      'Null asks for absence',
      [allow('*', '*', { Condition: { Null: { 'aws:SourceArn': 'true' } } })],
      's3:GetObject',
      OBJECT,
      true,
    ],
    [
      'all conditions must hold',
      [
        allow('*', '*', {
          Condition: {
            Bool: { 'aws:SecureTransport': 'true' },
            StringEquals: { 'aws:RequestedRegion': 'mars' },
          },
        }),
      ],
      's3:GetObject',
      OBJECT,
      false,
    ],
  ])('%s', (_, statements, action, resource, expected) => {
    expect(decides(statements, action, resource)).toBe(expected);
  });

  it('say who may not do what, as AWS does', () => {
    const caller = iamWith({ worker: [] }).caller(ARN);
    expect(() => caller.authorize('s3:PutObject', OBJECT)).toThrow(
      `User: ${ARN} is not authorized to perform: s3:PutObject on resource: ${OBJECT} because no identity-based policy allows the s3:PutObject action`,
    );
    const denied = iamWith({ worker: [deny('*', '*')] }).caller(ARN);
    expect(() => denied.authorize('s3:PutObject', OBJECT)).toThrow(
      'with an explicit deny in an identity-based policy',
    );
  });

  const statement = fc.record({
    Effect: fc.constantFrom('Allow', 'Deny'),
    Action: fc.constantFrom('*', 's3:*', 's3:GetObject', 's3:PutObject', 'sns:*'),
    Resource: fc.constantFrom('*', OBJECT, 'arn:aws:s3:::silver/*', 'arn:aws:s3:::gold/*'),
  });

  it('never grow by a Deny and never shrink by an Allow', () => {
    fc.assert(
      fc.property(fc.array(statement, { maxLength: 5 }), statement, (statements, one) => {
        const before = decides(statements, 's3:GetObject', OBJECT);
        const after = decides([...statements, one], 's3:GetObject', OBJECT);
        const [smaller, greater] = one.Effect === 'Deny' ? [after, before] : [before, after];
        if (smaller) expect(greater).toBe(true);
      }),
      { numRuns: 60 },
    );
  });

  it('do not depend on the order of statements', () => {
    fc.assert(
      fc.property(fc.array(statement, { maxLength: 5 }), (statements) => {
        expect(decides(statements.toReversed(), 's3:GetObject', OBJECT)).toBe(
          decides(statements, 's3:GetObject', OBJECT),
        );
      }),
      { numRuns: 60 },
    );
  });
});

describe('wildcards', () => {
  /** The definition itself, without regular expressions. */
  function matches(pattern: string, text: string): boolean {
    if (pattern === '') return text === '';
    if (pattern[0] === '*') {
      return matches(pattern.slice(1), text) || (text !== '' && matches(pattern, text.slice(1)));
    }
    return (
      text !== '' &&
      (pattern[0] === '?' || pattern[0] === text[0]) &&
      matches(pattern.slice(1), text.slice(1))
    );
  }

  it('match as defined, whatever characters stand between them', () => {
    const letters = fc.constantFrom('a', 'b', '*', '?', '.', '+', '/', '(', '[', '\\', '$', '\n');
    fc.assert(
      fc.property(
        fc.array(letters, { maxLength: 7 }).map((list) => list.join('')),
        fc.array(letters, { maxLength: 7 }).map((list) => list.join('')),
        (pattern, text) => {
          expect(wildcard(pattern, false).test(text)).toBe(matches(pattern, text));
        },
      ),
      { numRuns: 2000 },
    );
  });
});

describe('what cannot be evaluated is refused when it is loaded', () => {
  it.each([
    [
      'a condition operator',
      allow('*', '*', { Condition: { NumericLessThan: { 'aws:SecureTransport': 1 } } }),
      'NumericLessThan',
    ],
    [
      'a set operator',
      allow('*', '*', { Condition: { 'ForAllValues:StringEquals': { 'aws:PrincipalArn': 'x' } } }),
      'ForAllValues:StringEquals',
    ],
    ['a condition key', allow('*', '*', { Condition: { StringEquals: { 's3:prefix': 'x' } } }), 's3:prefix'],
    ['a policy variable', allow('*', `arn:aws:s3:::home/\${aws:username}/*`), 'aws:username'],
    ['an unknown element', allow('*', '*', { Extra: 1 }), 'Extra'],
    ['a statement without resource', { Effect: 'Allow', Action: '*' }, 'Resource'],
    ['a principal in an identity policy', allow('*', '*', { Principal: '*' }), 'Principal'],
  ])('%s', (_, statement, named) => {
    expect(() => iamWith({ worker: [statement] })).toThrow(named);
    expect(() => iamWith({ worker: [statement] })).toThrow(
      expect.objectContaining({ name: 'UnsupportedLocally' }),
    );
  });

  it('a managed policy that is not known', () => {
    const iam = new Iam({ folder: temporaryFolder() });
    const trust = { Statement: [] };
    const known = 'arn:aws:iam::aws:policy/service-role/AWSLambdaBasicExecutionRole';
    iam.addRole({ arn: ARN, trust, policies: [], managedPolicyArns: [known] });
    iam.caller(ARN).authorize('logs:PutLogEvents', 'arn:aws:logs:x');
    const unknown = 'arn:aws:iam::aws:policy/AdministratorAccess';
    expect(() => iam.addRole({ arn: ARN, trust, policies: [], managedPolicyArns: [unknown] })).toThrow(
      unknown,
    );
  });
});

describe('resource policies', () => {
  const bucket = 'arn:aws:s3:::silver';
  const policy = (...Statement: unknown[]) => ({ Version: '2012-10-17', Statement });

  it('deny even root and roles that may', () => {
    const iam = iamWith({ worker: [allow('*', '*')] });
    iam.setResourcePolicy(bucket, policy(deny('s3:DeleteObject', `${bucket}/*`, { Principal: '*' })));
    for (const caller of [iam.caller(ARN), iam.rootCaller()]) {
      expect(() => caller.authorize('s3:DeleteObject', OBJECT)).toThrow(
        'explicit deny in a resource-based policy',
      );
      caller.authorize('s3:GetObject', OBJECT);
      caller.authorize('s3:DeleteObject', 'arn:aws:s3:::other/x');
    }
  });

  it('grant a role by its ARN, but not by its account', () => {
    const iam = iamWith({ worker: [], other: [] });
    iam.setResourcePolicy(bucket, policy(allow('s3:GetObject', `${bucket}/*`, { Principal: { AWS: ARN } })));
    iam.caller(ARN).authorize('s3:GetObject', OBJECT);
    const other = iam.caller('arn:aws:iam::000000000000:role/other');
    expect(() => other.authorize('s3:GetObject', OBJECT)).toThrow('not authorized');
    iam.setResourcePolicy(
      bucket,
      policy(allow('s3:GetObject', `${bucket}/*`, { Principal: { AWS: '000000000000' } })),
    );
    expect(() => other.authorize('s3:GetObject', OBJECT)).toThrow('not authorized');
  });

  it('are all that a service may act on', () => {
    const iam = iamWith({});
    const topic = 'arn:aws:sns:us-east-1:000000000000:runs';
    const events = iam.serviceCaller('events.amazonaws.com', 'arn:aws:events:us-east-1:000000000000:rule/r');
    expect(() => events.authorize('sns:Publish', topic)).toThrow('no resource-based policy allows');
    iam.setResourcePolicy(
      topic,
      policy(
        allow('sns:Publish', topic, {
          Principal: { Service: 'events.amazonaws.com' },
          Condition: { ArnLike: { 'aws:SourceArn': 'arn:aws:events:*:*:rule/r' } },
        }),
      ),
    );
    events.authorize('sns:Publish', topic);
    const other = iam.serviceCaller('events.amazonaws.com', 'arn:aws:events:us-east-1:000000000000:rule/q');
    expect(() => other.authorize('sns:Publish', topic)).toThrow('not authorized');
  });
});

describe('roles', () => {
  it('are assumed only by the service that their trust policy names', () => {
    const iam = iamWith({ worker: [] });
    iam.assertAssumable(ARN, 'lambda.amazonaws.com', 'arn:aws:lambda:::f');
    expect(() => iam.assertAssumable(ARN, 'states.amazonaws.com', 'arn:aws:states:::s')).toThrow(
      'states.amazonaws.com cannot assume',
    );
  });

  it('are passed to a service only where iam:PassRole says so, and only if it may assume them', () => {
    const pass = allow('iam:PassRole', '*', {
      Condition: { StringEquals: { 'iam:PassedToService': 'lambda.amazonaws.com' } },
    });
    const iam = iamWith({ worker: [pass], job: [] });
    const job = 'arn:aws:iam::000000000000:role/job';
    iam.passingTo('lambda.amazonaws.com', iam.caller(ARN)).authorize('iam:PassRole', job);
    const toSageMaker = iam.passingTo('sagemaker.amazonaws.com', iam.caller(ARN));
    expect(() => toSageMaker.authorize('iam:PassRole', job)).toThrow(
      'not authorized to perform: iam:PassRole',
    );
    const root = iam.passingTo('sagemaker.amazonaws.com', iam.rootCaller());
    expect(() => root.authorize('iam:PassRole', job)).toThrow('cannot assume');
  });

  it('have an access key each, the same after a restart and another in another folder', () => {
    const folder = temporaryFolder();
    const first = iamWith({ worker: [], other: [] }, folder);
    const again = iamWith({ worker: [] }, folder);
    expect(again.credentials(ARN)).toEqual(first.credentials(ARN));
    expect(again.root).toEqual(first.root);
    const other = 'arn:aws:iam::000000000000:role/other';
    expect(first.credentials(other).accessKeyId).not.toBe(first.credentials(ARN).accessKeyId);
    expect(iamWith({ worker: [] }).credentials(ARN)).not.toEqual(first.credentials(ARN));
    expect(first.principal(first.credentials(ARN).accessKeyId)?.caller.arn).toBe(ARN);
    expect(() => again.credentials(other)).toThrow(expect.objectContaining({ code: 'NoSuchEntity' }));
  });

  it('keep their secret to the person whose folder it is', () => {
    const folder = temporaryFolder();
    new Iam({ folder });
    expect(statSync(join(folder, 'iam.json')).mode & 0o777).toBe(0o600);
    expect(readFileSync(join(folder, 'iam.json'), 'utf8')).toMatch(/^\{"secret":"[0-9a-f]{64}"\}$/);
  });
});

describe('write-once buckets', () => {
  const bucket = 'arn:aws:s3:::bronze';
  const writes = (condition: object, context: Record<string, string>) => {
    const iam = iamWith({ worker: [allow('s3:PutObject', `${bucket}/*`)] });
    iam.setResourcePolicy(bucket, {
      Statement: [{ ...deny('s3:PutObject', `${bucket}/*`), Principal: '*', Condition: condition }],
    });
    try {
      iam.caller(ARN).authorize('s3:PutObject', `${bucket}/x`, context);
      return true;
    } catch {
      return false;
    }
  };
  const creates = { 's3:objectcreationoperation': 'true' };
  const onceOnly = {
    Bool: { 's3:ObjectCreationOperation': 'true' },
    Null: { 's3:if-none-match': 'true' },
  };
  const orSeen = { ...onceOnly, Null: { 's3:if-none-match': 'true', 's3:if-match': 'true' } };

  it.each([
    ['a write without a condition is refused', onceOnly, creates, false],
    ['If-None-Match passes', onceOnly, { ...creates, 's3:if-none-match': '*' }, true],
    ['If-Match does not', onceOnly, { ...creates, 's3:if-match': 'e' }, false],
    ['a part of an upload passes', onceOnly, { 's3:objectcreationoperation': 'false' }, true],
    ['either passes where both are allowed', orSeen, { ...creates, 's3:if-match': 'e' }, true],
    ['neither is refused there too', orSeen, creates, false],
  ])('%s', (_, condition, context, allowed) => {
    expect(writes(condition, context)).toBe(allowed);
  });
});
