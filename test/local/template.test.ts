import { existsSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { RESOURCE_TYPES, type ResourceType } from '../../local/resources.ts';
import { loadPackage, resolveTemplate } from '../../local/template.ts';
import { packaged, role, temporaryFolder } from './kit.ts';

const bucket = { Type: 'AWS::S3::Bucket', Properties: { BucketName: 'landing' } };
const topic = { Type: 'AWS::SNS::Topic', Properties: { TopicName: 'runs' } };

/** What an output of this value resolves to, beside a bucket `Landing` and a topic `Runs`. */
function output(value: unknown): string | undefined {
  const template = { Resources: { Landing: bucket, Runs: topic }, Outputs: { It: { Value: value } } };
  return resolveTemplate(template, 'lab-dev').outputs.It;
}

function refuses(template: unknown, ...named: string[]): void {
  for (const name of named) expect(() => resolveTemplate(template, 'lab-dev')).toThrow(name);
  expect(() => resolveTemplate(template, 'lab-dev')).toThrow(
    expect.objectContaining({ name: 'UnsupportedLocally' }),
  );
}

describe('intrinsic functions', () => {
  it.each([
    ['Ref of a bucket is its name', { Ref: 'Landing' }, 'landing'],
    ['Ref of a topic is its ARN', { Ref: 'Runs' }, 'arn:aws:sns:us-east-1:000000000000:runs'],
    ['Ref of a pseudo parameter', { Ref: 'AWS::AccountId' }, '000000000000'],
    ['GetAtt as a list', { 'Fn::GetAtt': ['Landing', 'Arn'] }, 'arn:aws:s3:::landing'],
    ['GetAtt as a string', { 'Fn::GetAtt': 'Runs.TopicName' }, 'runs'],
    [
      'Sub of resources and pseudo parameters',
      { 'Fn::Sub': `\${Landing}-\${AWS::Region}-\${Landing.Arn}` },
      'landing-us-east-1-arn:aws:s3:::landing',
    ],
    [
      'Sub with variables',
      { 'Fn::Sub': [`\${a}/\${Landing}`, { a: { Ref: 'AWS::StackName' } }] },
      'lab-dev/landing',
    ],
    ['Sub with a literal', { 'Fn::Sub': `\${!a}` }, `\${a}`],
    [
      'Join',
      { 'Fn::Join': [':', ['arn', { Ref: 'AWS::Partition' }, { Ref: 'Landing' }]] },
      'arn:aws:landing',
    ],
    ['Select and Split', { 'Fn::Select': [1, { 'Fn::Split': ['-', 'a-b-c'] }] }, 'b'],
    [
      'nested',
      { 'Fn::Join': ['', [{ 'Fn::Sub': `\${Landing}` }, { 'Fn::Select': ['0', ['x']] }]] },
      'landingx',
    ],
    ['the URL suffix', { 'Fn::Sub': `\${AWS::URLSuffix}` }, 'amazonaws.com'],
  ])('%s', (_, value, expected) => {
    expect(output(value)).toBe(expected);
  });

  it('NoValue removes the property', () => {
    const Properties = {
      BucketName: { Ref: 'AWS::NoValue' },
      VersioningConfiguration: { Ref: 'AWS::NoValue' },
    };
    const [resource] = resolveTemplate(
      { Resources: { B: { Type: 'AWS::S3::Bucket', Properties } } },
      'lab-dev',
    ).resources;
    expect(resource).toMatchObject({ properties: {} });
  });

  it.each(['Fn::ImportValue', 'Fn::FindInMap', 'Fn::If', 'Fn::GetAZs', 'Fn::Transform', 'Fn::Cidr'])(
    '%s is refused',
    (name) => {
      expect(() => output({ [name]: 'x' })).toThrow(expect.objectContaining({ name: 'UnsupportedLocally' }));
      expect(() => output({ [name]: 'x' })).toThrow(name);
    },
  );

  it('an attribute, a pseudo parameter or a resource that is not there is named', () => {
    expect(() => output({ 'Fn::GetAtt': ['Landing', 'WebsiteURL'] })).toThrow(
      'attribute WebsiteURL of AWS::S3::Bucket',
    );
    expect(() => output({ Ref: 'AWS::NotificationARNs' })).toThrow('AWS::NotificationARNs');
    expect(() => output({ Ref: 'Nowhere' })).toThrow('no resource Nowhere');
    expect(() => output({ 'Fn::Select': [3, ['a']] })).toThrow('no element 3');
  });
});

describe('names', () => {
  it('are the template’s, or made from stack and logical id, and then always the same', () => {
    const template = { Resources: { MyBucket: { Type: 'AWS::S3::Bucket' }, Landing: bucket } };
    const names = (stack: string) =>
      resolveTemplate(template, stack).resources.map((resource) => resource.name);
    expect(names('lab-dev')).toEqual(names('lab-dev'));
    expect(names('lab-dev')).toEqual([expect.stringMatching(/^lab-dev-mybucket-[0-9a-f]{12}$/), 'landing']);
    expect(names('lab-prod')[0]).not.toBe(names('lab-dev')[0]);
  });

  it('may be made of other names, but not of themselves', () => {
    const named = (BucketName: unknown) => ({ Type: 'AWS::S3::Bucket', Properties: { BucketName } });
    const Resources = { A: named({ 'Fn::Sub': `\${B}-logs` }), B: named('slides') };
    expect(resolveTemplate({ Resources }, 'lab-dev').resources.map(({ name }) => name)).toEqual([
      'slides',
      'slides-logs',
    ]);
    const circle = { Resources: { A: named({ Ref: 'B' }), B: named({ Ref: 'A' }) } };
    expect(() => resolveTemplate(circle, 'lab-dev')).toThrow('Names depend on each other: A → B → A');
  });
});

describe('order', () => {
  it('puts each resource after what it refers to and depends on', () => {
    const Resources = {
      Policy: {
        Type: 'AWS::S3::BucketPolicy',
        Properties: { Bucket: { Ref: 'Landing' }, PolicyDocument: {} },
        DependsOn: 'Runs',
      },
      Landing: bucket,
      Runs: topic,
    };
    const order = resolveTemplate({ Resources }, 'lab-dev').resources.map((resource) => resource.logicalId);
    expect(order.indexOf('Policy')).toBe(2);
  });

  it('refuses circles and dependencies on nothing', () => {
    const Resources = { A: { ...bucket, DependsOn: ['B'] }, B: { ...topic, DependsOn: 'A' } };
    expect(() => resolveTemplate({ Resources }, 'lab-dev')).toThrow('A → B → A');
    const lost = { Resources: { A: { ...bucket, DependsOn: 'Gone' } } };
    expect(() => resolveTemplate(lost, 'lab-dev')).toThrow('Gone');
  });
});

describe('what the local AWS does not do is refused by name', () => {
  const one = (Type: string, Properties: unknown) => ({ Resources: { It: { Type, Properties } } });

  it.each(['Conditions', 'Mappings', 'Transform', 'Parameters', 'Rules'])('section %s', (section) => {
    refuses({ Resources: {}, [section]: {} }, section);
  });

  it.each(['Condition', 'CreationPolicy', 'UpdatePolicy'])('resource attribute %s', (attribute) => {
    refuses({ Resources: { It: { ...bucket, [attribute]: 'x' } } }, attribute, 'It');
  });

  it.each(['AWS::EC2::Instance', 'AWS::Kinesis::Stream', 'AWS::Lambda::EventSourceMapping', 'Custom::Thing'])(
    'resource type %s',
    (type) => {
      refuses(one(type, {}), type, 'It');
    },
  );

  const table = { AttributeDefinitions: [{ AttributeName: 'pk', AttributeType: 'S' }], KeySchema: [] };
  const lambda = { Code: { S3Bucket: 'b', S3Key: 'k' }, Handler: 'h', Role: 'r', Runtime: 'nodejs24.x' };
  it.each([
    ['AWS::S3::Bucket', { ReplicationConfiguration: {} }, 'ReplicationConfiguration'],
    [
      'AWS::S3::Bucket',
      { NotificationConfiguration: { LambdaConfigurations: [] } },
      'NotificationConfiguration',
    ],
    ['AWS::DynamoDB::Table', { ...table, StreamSpecification: {} }, 'StreamSpecification'],
    ['AWS::DynamoDB::Table', { ...table, TimeToLiveSpecification: {} }, 'TimeToLiveSpecification'],
    ['AWS::SNS::Topic', { FifoTopic: true }, 'FifoTopic'],
    ['AWS::SNS::Subscription', { TopicArn: 't', Protocol: 'sqs', Endpoint: 'q' }, 'Protocol'],
    [
      'AWS::IAM::Role',
      { ...role('lambda.amazonaws.com', []), PermissionsBoundary: 'x' },
      'PermissionsBoundary',
    ],
    ['AWS::Lambda::Function', { ...lambda, Layers: ['x'] }, 'Layers'],
    ['AWS::Lambda::Function', { ...lambda, DeadLetterConfig: {} }, 'DeadLetterConfig'],
    ['AWS::Lambda::Function', { ...lambda, PackageType: 'Image' }, 'PackageType'],
    ['AWS::StepFunctions::StateMachine', { RoleArn: 'r', StateMachineType: 'EXPRESS' }, 'StateMachineType'],
    ['AWS::Events::Rule', { EventBusName: 'mine' }, 'EventBusName'],
    ['AWS::Events::Rule', { Targets: [{ Id: 'a', Arn: 'b', SqsParameters: {} }] }, 'SqsParameters'],
  ])('%s with %j', (type, properties, named) => {
    refuses(one(type, properties), named, 'It');
  });

  it('every property without effect has its reason, and is taken', () => {
    for (const [name, type] of Object.entries(RESOURCE_TYPES) as [string, ResourceType][]) {
      for (const [property, why] of Object.entries(type.noEffect)) {
        expect(why.length, `${name}.${property}`).toBeGreaterThan(10);
      }
    }
    const Properties = {
      BucketName: 'b',
      BucketEncryption: { any: 'thing' },
      Tags: [{ Key: 'a', Value: 'b' }],
    };
    expect(resolveTemplate(one('AWS::S3::Bucket', Properties), 'lab-dev').resources).toMatchObject([
      { name: 'b', properties: {} },
    ]);
  });
});

describe('a package', () => {
  it('gives its stack, outputs and bundles', () => {
    const folder = packaged(
      { Resources: { Landing: bucket }, Outputs: { Where: { Value: { Ref: 'Landing' } } } },
      { hello: { 'handler.mjs': '' } },
    );
    const stack = loadPackage(folder);
    expect(stack.name).toBe('lab-dev');
    expect(stack.outputs).toEqual({ Where: 'landing' });
    expect(existsSync(stack.bundle('serverless/lab/dev/1-2/hello.zip'))).toBe(true);
    expect(() => stack.bundle('serverless/lab/dev/1-2/gone.zip')).toThrow('gone.zip');
  });

  it('that is not there says what to run', () => {
    const folder = temporaryFolder();
    expect(() => loadPackage(folder)).toThrow('serverless package');
    writeFileSync(
      join(folder, 'serverless-state.json'),
      '{"service":{"service":"a","provider":{"stage":"b"}}}',
    );
    expect(() => loadPackage(folder)).toThrow(expect.objectContaining({ name: 'PackageNotFound' }));
  });
});
