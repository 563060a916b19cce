/**
 * Secrets Manager, as much as the functions use: a secret is a file of the state folder, `secrets/<name>`, that only
 * its owner may read. It is put there through CreateSecret or PutSecretValue, or by hand.
 */
import { createHash, randomBytes } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync, renameSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import {
  type Caller,
  type JsonOperation,
  type JsonService,
  LOCAL_ACCOUNT,
  LOCAL_REGION,
  ServiceError,
} from './types.ts';

const ARN = `arn:aws:secretsmanager:${LOCAL_REGION}:${LOCAL_ACCOUNT}:secret:`;

/** AWS ends a secret's ARN with six characters of its own; here they follow from the name. */
export const secretArn = (name: string): string =>
  `${ARN}${name}-${createHash('sha256').update(name).digest('hex').slice(0, 6)}`;

const notFound = () =>
  new ServiceError('ResourceNotFoundException', "Secrets Manager can't find the specified secret.");

export class Secrets implements JsonService {
  readonly #folder: string;
  readonly operations: Record<string, JsonOperation>;

  constructor(options: { folder: string }) {
    this.#folder = options.folder;
    const operations: Record<string, (input: Input, caller: Caller) => unknown> = {
      CreateSecret: (input, caller) => this.#create(input, caller),
      PutSecretValue: (input, caller) => this.#put(input, caller),
      GetSecretValue: (input, caller) => this.#get(input, caller),
    };
    this.operations = Object.fromEntries(
      Object.entries(operations).map(([name, operation]) => [
        name,
        async (input: never, caller: Caller) => operation(input, caller),
      ]),
    );
  }

  #create({ Name, SecretString }: Input, caller: Caller): unknown {
    const name = checkedName(Name);
    caller.authorize('secretsmanager:CreateSecret', secretArn(name));
    if (existsSync(this.#path(name))) {
      throw new ServiceError(
        'ResourceExistsException',
        `The operation failed because the secret ${name} already exists.`,
      );
    }
    return this.#write(name, SecretString);
  }

  #put({ SecretId, SecretString }: Input, caller: Caller): unknown {
    const name = nameOf(SecretId);
    caller.authorize('secretsmanager:PutSecretValue', secretArn(name));
    if (!existsSync(this.#path(name))) throw notFound();
    return this.#write(name, SecretString);
  }

  #get({ SecretId }: Input, caller: Caller): unknown {
    const name = nameOf(SecretId);
    caller.authorize('secretsmanager:GetSecretValue', secretArn(name));
    const path = this.#path(name);
    if (!existsSync(path)) throw notFound();
    const { mode, mtimeMs } = statSync(path);
    if ((mode & 0o077) !== 0) {
      throw new ServiceError(
        'InvalidRequestException',
        `The file of the secret ${name} may be read by others. Set its mode to 600.`,
      );
    }
    return {
      ARN: secretArn(name),
      Name: name,
      SecretString: readFileSync(path, 'utf8'),
      VersionStages: ['AWSCURRENT'],
      CreatedDate: mtimeMs / 1000,
    };
  }

  #write(name: string, value: string | undefined): unknown {
    if (typeof value !== 'string' || value === '') {
      throw new ServiceError(
        'InvalidParameterException',
        'The local AWS keeps secrets as a SecretString only.',
      );
    }
    mkdirSync(this.#folder, { recursive: true, mode: 0o700 });
    const path = this.#path(name);
    const fresh = `${path}.${process.pid}.${randomBytes(4).toString('hex')}`;
    writeFileSync(fresh, value, { mode: 0o600 });
    renameSync(fresh, path);
    return { ARN: secretArn(name), Name: name };
  }

  /** Slashes are part of a secret's name, and of no file's. */
  #path(name: string): string {
    return join(this.#folder, name.replaceAll('/', '%2F'));
  }
}

interface Input {
  Name?: string;
  SecretId?: string;
  SecretString?: string;
}

/** By name, or by ARN with or without the end that AWS adds. */
function nameOf(id: string | undefined): string {
  if (!id?.startsWith('arn:')) return checkedName(id);
  if (!id.startsWith(ARN)) throw notFound();
  const rest = id.slice(ARN.length);
  const name = rest.replace(/-[A-Za-z0-9]{6}$/, '');
  return checkedName(secretArn(name) === id ? name : rest);
}

function checkedName(name: string | undefined): string {
  if (typeof name === 'string' && /^[A-Za-z0-9/_+=.@-]{1,512}$/.test(name) && !/^\.{1,2}$/.test(name))
    return name;
  throw new ServiceError(
    'InvalidParameterException',
    'Invalid name. Must be a valid name containing alphanumeric characters, or any of the following: -/_+=.@!',
  );
}
