/**
 * CloudFormation: tells of the one stack that is deployed here, so that a client finds buckets, tables and the state
 * machine as on AWS. Nothing is created through it.
 */
import { randomUUID } from 'node:crypto';
import type { IncomingMessage, ServerResponse } from 'node:http';
import { actionOf, type BodyService, xml } from './gateway.ts';
import { type Caller, LOCAL_ACCOUNT, LOCAL_REGION, ServiceError } from './types.ts';

export interface CloudFormationOptions {
  stackName: string;
  outputs: Record<string, string>;
}

export class CloudFormation implements BodyService {
  readonly #options: CloudFormationOptions;
  readonly #createdAt = new Date().toISOString();

  constructor(options: CloudFormationOptions) {
    this.#options = options;
  }

  operation(_request: IncomingMessage, body: Buffer): string {
    return actionOf(body);
  }

  async handle(
    request: IncomingMessage,
    body: Buffer,
    response: ServerResponse,
    caller: Caller,
  ): Promise<void> {
    const operation = this.operation(request, body);
    if (operation !== 'DescribeStacks') {
      throw new ServiceError(
        'InvalidAction',
        `The local AWS does not support cloudformation:${operation}; it supports DescribeStacks.`,
      );
    }
    const { stackName, outputs } = this.#options;
    const wanted = new URLSearchParams(body.toString('utf8')).get('StackName') ?? stackName;
    const stackId = `arn:aws:cloudformation:${LOCAL_REGION}:${LOCAL_ACCOUNT}:stack/${stackName}/local`;
    caller.authorize('cloudformation:DescribeStacks', stackId);
    if (wanted !== stackName && wanted !== stackId) {
      throw new ServiceError('ValidationError', `Stack with id ${wanted} does not exist`);
    }
    const members = Object.entries(outputs)
      .map(
        ([key, value]) =>
          `<member><OutputKey>${xml(key)}</OutputKey><OutputValue>${xml(value)}</OutputValue></member>`,
      )
      .join('');
    response.writeHead(200, { 'content-type': 'text/xml' });
    response.end(
      `<DescribeStacksResponse xmlns="http://cloudformation.amazonaws.com/doc/2010-05-15/"><DescribeStacksResult><Stacks><member><StackId>${xml(stackId)}</StackId><StackName>${xml(stackName)}</StackName><StackStatus>CREATE_COMPLETE</StackStatus><CreationTime>${this.#createdAt}</CreationTime><Outputs>${members}</Outputs></member></Stacks></DescribeStacksResult><ResponseMetadata><RequestId>${randomUUID()}</RequestId></ResponseMetadata></DescribeStacksResponse>`,
    );
  }
}
