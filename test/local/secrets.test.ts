import { chmodSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  CreateSecretCommand,
  GetSecretValueCommand,
  PutSecretValueCommand,
  SecretsManagerClient,
} from '@aws-sdk/client-secrets-manager';
import { afterEach, beforeEach, expect, it } from 'vitest';
import { readCredentials } from '../../core/concentriq.ts';
import { Gateway } from '../../local/gateway.ts';
import { Secrets, secretArn } from '../../local/secrets.ts';
import { LOCAL_REGION, ServiceError } from '../../local/types.ts';

const NAME = 'slideway/concentriq';
let folder: string;
let gateway: Gateway;
let client: SecretsManagerClient;
let allowed: string[];

beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), 'secrets-'));
  allowed = [secretArn(NAME)];
  const authorize = (action: string, resource: string) => {
    if (!allowed.includes(resource)) throw new ServiceError('AccessDeniedException', action);
  };
  gateway = new Gateway({
    services: {
      secretsmanager: { protocol: 'json', service: new Secrets({ folder: join(folder, 'secrets') }) },
    },
    principals: () => ({ caller: { arn: 'arn', authorize }, secretAccessKey: 'secret' }),
  });
  await gateway.listen(0);
  client = new SecretsManagerClient({
    endpoint: gateway.endpoint,
    region: LOCAL_REGION,
    credentials: { accessKeyId: 'LOCAL', secretAccessKey: 'secret' },
  });
});
afterEach(async () => {
  client.destroy();
  await gateway.close();
  rmSync(folder, { recursive: true });
});

const create = (SecretString: string) => client.send(new CreateSecretCommand({ Name: NAME, SecretString }));
const get = (SecretId: string) => client.send(new GetSecretValueCommand({ SecretId }));
const path = () => join(folder, 'secrets', 'slideway%2Fconcentriq');

it('a secret is read by name, by ARN, and by ARN without its end', async () => {
  const { ARN = '' } = await create('one');
  expect(ARN).toMatch(/:secret:slideway\/concentriq-[A-Za-z0-9]{6}$/);
  for (const id of [NAME, ARN, ARN.slice(0, -7)]) expect((await get(id)).SecretString).toBe('one');
  await client.send(new PutSecretValueCommand({ SecretId: ARN, SecretString: 'two' }));
  expect((await get(ARN)).SecretString).toBe('two');
  await expect(create('three')).rejects.toThrow(/already exists/);
});

it('a secret lies in a file that only its owner reads, and one that others read is refused', async () => {
  await create('one');
  expect(statSync(path()).mode & 0o777).toBe(0o600);
  expect(readFileSync(path(), 'utf8')).toBe('one');
  chmodSync(path(), 0o644);
  await expect(get(NAME)).rejects.toThrow(/Set its mode to 600/);
});

it('who may not read it, or asks for none, is refused', async () => {
  await create('one');
  allowed = [];
  await expect(get(NAME)).rejects.toMatchObject({ name: 'AccessDeniedException' });
  allowed = [secretArn('other')];
  await expect(get('other')).rejects.toMatchObject({ name: 'ResourceNotFoundException' });
  await expect(get('../iam.json')).rejects.toMatchObject({ name: 'AccessDeniedException' });
});

it("the catalogue's credentials are read from it, and what is wrong with them is said without them", async () => {
  await create('{"username":"lab","password":"hidden"}');
  expect(await readCredentials(client, secretArn(NAME))).toEqual({
    username: 'lab',
    password: 'hidden',
    authentication: 'token',
  });
  for (const text of ['hidden', '{"password":"hidden"}', '{"apiKey":"hidden","token":"hidden"}']) {
    writeFileSync(path(), text);
    const error = await readCredentials(client, NAME).catch((thrown: Error) => thrown);
    expect(error).toMatchObject({
      name: 'CatalogueMisconfigured',
      message: expect.not.stringContaining('hidden'),
    });
  }
  rmSync(path());
  await expect(readCredentials(client, NAME)).rejects.toThrow(/cannot be read: ResourceNotFoundException/);
});
