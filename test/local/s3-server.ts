/** A local S3 behind a bare HTTP server, and AWS SDK clients of it, for the tests of local/s3. */
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { S3Client, type S3ClientConfig } from '@aws-sdk/client-s3';
import { type Expired, type ObjectCreated, S3Service } from '../../local/s3/service.ts';
import { type Caller, ServiceError } from '../../local/types.ts';

export const CALLER_ARN = 'arn:aws:iam::000000000000:role/test';

export interface TestS3 {
  service: S3Service;
  endpoint: string;
  /** Every event that was delivered. */
  events: ObjectCreated[];
  /** Actions asked for, as `<action> <arn>`; those in `denied` (by action) are refused. */
  asked: string[];
  denied: Set<string>;
  client(config?: S3ClientConfig): S3Client;
  close(): Promise<void>;
}

export async function startS3(
  folder: string,
  onObjectCreated: (event: ObjectCreated) => Promise<void> = async () => {},
  onExpired: (expired: Expired) => void = () => {},
): Promise<TestS3> {
  const events: ObjectCreated[] = [];
  const asked: string[] = [];
  const denied = new Set<string>();
  const clients: S3Client[] = [];
  const service = new S3Service({
    folder,
    onObjectCreated: async (event) => {
      await onObjectCreated(event);
      events.push(event);
    },
    onExpired,
  });
  const caller: Caller = {
    arn: CALLER_ARN,
    authorize(action, resource) {
      asked.push(`${action} ${resource}`);
      if (denied.has(action)) throw new ServiceError('AccessDenied', `not allowed: ${action}`, 403);
    },
  };
  const server = createServer((request, response) => {
    void service.handle(request, response, caller);
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const endpoint = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  await service.recover();
  return {
    service,
    endpoint,
    events,
    asked,
    denied,
    client(config = {}) {
      const client = new S3Client({
        endpoint,
        region: 'us-east-1',
        credentials: { accessKeyId: 'test', secretAccessKey: 'test' },
        maxAttempts: 1,
        ...config,
      });
      clients.push(client);
      return client;
    },
    async close() {
      for (const client of clients) client.destroy();
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
      await service.close();
    },
  };
}
