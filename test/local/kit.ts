/** What the tests of the local AWS need time and again: folders, bundles, packages, and a gateway with a service. */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { crc32 } from 'node:zlib';
import { afterAll } from 'vitest';
import { Gateway, type Offer } from '../../local/gateway.ts';
import { Iam } from '../../local/iam.ts';

/** A folder that is gone after the tests of the file. */
export function temporaryFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'slideway-'));
  afterAll(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

/** A zip file with these files, stored. */
export function zip(path: string, files: Record<string, string>): string {
  const parts: Buffer[] = [];
  const directory: Buffer[] = [];
  let offset = 0;
  for (const [name, content] of Object.entries(files)) {
    const data = Buffer.from(content);
    const common = Buffer.alloc(26);
    common.writeUInt16LE(20, 0);
    common.writeUInt32LE(crc32(data), 10);
    common.writeUInt32LE(data.length, 14);
    common.writeUInt32LE(data.length, 18);
    common.writeUInt16LE(Buffer.byteLength(name), 22);
    const place = Buffer.alloc(14);
    place.writeUInt32LE(offset, 10);
    const local = Buffer.concat([Buffer.from('PK\x03\x04'), common, Buffer.from(name), data]);
    directory.push(Buffer.from('PK\x01\x02\x14\x00'), common, place, Buffer.from(name));
    parts.push(local);
    offset += local.length;
  }
  const index = Buffer.concat(directory);
  const end = Buffer.alloc(22);
  end.write('PK\x05\x06', 'latin1');
  end.writeUInt16LE(parts.length, 8);
  end.writeUInt16LE(parts.length, 10);
  end.writeUInt32LE(index.length, 12);
  end.writeUInt32LE(offset, 16);
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(path, Buffer.concat([...parts, index, end]));
  return path;
}

/** A folder as `serverless package` would write it: a template, and a bundle per function. */
export function packaged(template: unknown, bundles: Record<string, Record<string, string>> = {}): string {
  const folder = join(temporaryFolder(), '.serverless');
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, 'cloudformation-template-update-stack.json'), JSON.stringify(template));
  writeFileSync(
    join(folder, 'serverless-state.json'),
    JSON.stringify({ service: { service: 'lab', provider: { stage: 'dev' } } }),
  );
  for (const [name, files] of Object.entries(bundles)) zip(join(folder, `${name}.zip`), files);
  return folder;
}

/** A role's properties in a template: who may assume it, and its one policy. */
export function role(service: string, statements: unknown[]) {
  return {
    AssumeRolePolicyDocument: {
      Version: '2012-10-17',
      Statement: [{ Effect: 'Allow', Principal: { Service: service }, Action: 'sts:AssumeRole' }],
    },
    Policies: [{ PolicyName: 'own', PolicyDocument: { Version: '2012-10-17', Statement: statements } }],
  };
}

/** An IAM with one role of these statements, known as `arn:aws:iam::000000000000:role/<name>`. */
export function iamWith(roles: Record<string, unknown[]>, folder = temporaryFolder()): Iam {
  const iam = new Iam({ folder });
  for (const [name, statements] of Object.entries(roles)) {
    const properties = role('lambda.amazonaws.com', statements);
    iam.addRole({
      arn: `arn:aws:iam::000000000000:role/${name}`,
      trust: properties.AssumeRolePolicyDocument,
      policies: properties.Policies.map((policy) => ({
        name: policy.PolicyName,
        document: policy.PolicyDocument,
      })),
      managedPolicyArns: [],
    });
  }
  return iam;
}

/** A gateway that listens until the tests of the file are done. */
export async function serve(iam: Iam, services: Record<string, Offer>): Promise<Gateway> {
  const gateway = new Gateway({ services, principals: (id) => iam.principal(id) });
  await gateway.listen(0);
  afterAll(() => gateway.close());
  return gateway;
}

/** Waits until `condition` gives something, at most ten seconds. */
export async function until<T>(condition: () => T | undefined | false): Promise<T> {
  for (let waited = 0; waited < 10_000; waited += 20) {
    const value = condition();
    if (value !== undefined && value !== false) return value;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  throw new Error('It did not happen within ten seconds');
}
