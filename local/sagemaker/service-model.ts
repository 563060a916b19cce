/**
 * What SageMaker demands of a request (types, required members, lengths, patterns, values), from AWS's own service
 * model. botocore carries it, and the jobs' Python environment has botocore: none of it is kept by hand.
 */
import { execFile } from 'node:child_process';
import { glob, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { gunzip } from 'node:zlib';
import { ProcessingInstanceType, TransformInstanceType } from '@aws-sdk/client-sagemaker';
import { z } from 'zod';
import { ServiceError } from '../types.ts';

const execute = promisify(execFile);

const reference = z.object({ shape: z.string() }).transform(({ shape }) => shape);

/** A type of the service; who refers to others does so by name. */
const shapeSchema = z.object({
  type: z.string(),
  required: z.array(z.string()).optional(),
  members: z.record(z.string(), reference).optional(),
  member: reference.optional(),
  key: reference.optional(),
  value: reference.optional(),
  min: z.number().optional(),
  max: z.number().optional(),
  pattern: z.string().optional(),
  enum: z.array(z.string()).optional(),
});
type Shape = z.infer<typeof shapeSchema>;

/** botocore's service-2.json, without its documentation. */
const modelSchema = z.object({
  operations: z.record(z.string(), z.object({ input: reference.optional() })),
  shapes: z.record(z.string(), shapeSchema),
});

/** Values that an old botocore, such as Debian's, does not know of; the SDK of this project is newer. */
const NEWER: Record<string, readonly string[]> = {
  ProcessingInstanceType: Object.values(ProcessingInstanceType),
  TransformInstanceType: Object.values(TransformInstanceType),
};

/**
 * The jobs' environment does not give the service model. Not a server's fault on the wire, which callers would
 * take for one that passes.
 */
export class ServiceModelUnavailable extends ServiceError {
  constructor(python: string, reason: string) {
    super(
      'ServiceModelUnavailable',
      `Requests to SageMaker are checked against the service model in botocore, which ${python} does not give: ${reason}. Run \`slideway setup\` to make the Python environment anew.`,
    );
  }
}

export const invalid = (message: string) => new ServiceError('ValidationException', message);

/** The service's words for a value that breaks a constraint; `undefined` is a member that is not there. */
export const violation = (value: unknown, path: string, constraint: string) =>
  invalid(
    `1 validation error detected: Value ${value === undefined ? 'null' : `'${typeof value === 'string' ? value : JSON.stringify(value)}'`} at '${path}' failed to satisfy constraint: ${constraint}`,
  );

export const memberPath = (parent: string, name: string) => {
  const camel = `${name.charAt(0).toLowerCase()}${name.slice(1)}`;
  return parent === '' ? camel : `${parent}.${camel}`;
};

function checkRange(shape: Shape, size: number, value: unknown, path: string, what: string): void {
  if (shape.min !== undefined && size < shape.min)
    throw violation(value, path, `Member must have ${what} greater than or equal to ${shape.min}`);
  if (shape.max !== undefined && size > shape.max)
    throw violation(value, path, `Member must have ${what} less than or equal to ${shape.max}`);
}

function checkString(name: string, shape: Shape, value: string, path: string): void {
  if (shape.enum && !shape.enum.includes(value) && !NEWER[name]?.includes(value))
    throw violation(value, path, `Member must satisfy enum value set: [${shape.enum.join(', ')}]`);
  checkRange(shape, value.length, value, path, 'length');
  if (shape.pattern !== undefined && !new RegExp(`^(?:${shape.pattern})$`, 'u').test(value))
    throw violation(value, path, `Member must satisfy regular expression pattern: ^${shape.pattern}$`);
}

export class ServiceModel {
  readonly #model: z.infer<typeof modelSchema>;

  /** `document` is botocore's service-2.json, parsed. */
  constructor(document: unknown) {
    this.#model = modelSchema.parse(document);
  }

  /** Throws `ValidationException` naming the member unless `input` is what the operation takes. */
  validate(operation: string, input: unknown): void {
    this.#check(this.#model.operations[operation]?.input, input, '');
  }

  #check(name: string | undefined, value: unknown, path: string): void {
    const shape = name === undefined ? undefined : this.#model.shapes[name];
    if (name === undefined || shape === undefined)
      throw new Error(`The service model lacks the shape ${name} (at '${path}')`);
    const wrongType = () => violation(value, path, `Member must be of type ${shape.type}`);
    switch (shape.type) {
      case 'structure':
        if (typeof value !== 'object' || value === null || Array.isArray(value)) throw wrongType();
        this.#checkStructure(shape, value, path);
        return;
      case 'list':
        if (!Array.isArray(value)) throw wrongType();
        checkRange(shape, value.length, value, path, 'length');
        value.forEach((item, index) => {
          this.#check(shape.member, item, `${path}.${index + 1}.member`);
        });
        return;
      case 'map':
        if (typeof value !== 'object' || value === null || Array.isArray(value)) throw wrongType();
        checkRange(shape, Object.keys(value).length, value, path, 'length');
        for (const [key, item] of Object.entries(value)) {
          this.#check(shape.key, key, `${path}.key`);
          this.#check(shape.value, item, `${path}.${key}.member`);
        }
        return;
      case 'integer':
        if (typeof value !== 'number' || !Number.isInteger(value)) throw wrongType();
        checkRange(shape, value, value, path, 'value');
        return;
      case 'boolean':
        if (typeof value !== 'boolean') throw wrongType();
        return;
      case 'timestamp':
        if (typeof value !== 'number') throw wrongType();
        return;
      default:
        if (typeof value !== 'string') throw wrongType();
        checkString(name, shape, value, path);
    }
  }

  #checkStructure(shape: Shape, value: object, path: string): void {
    const members = shape.members ?? {};
    const entries = new Map<string, unknown>(Object.entries(value));
    for (const name of entries.keys())
      if (!Object.hasOwn(members, name)) throw invalid(`Unknown member '${memberPath(path, name)}'`);
    for (const [name, member] of Object.entries(members)) {
      const given = entries.get(name);
      if (given !== undefined && given !== null) this.#check(member, given, memberPath(path, name));
      else if (shape.required?.includes(name))
        throw violation(undefined, memberPath(path, name), 'Member must not be null');
    }
  }
}

const models = new Map<string, Promise<ServiceModel>>();

/**
 * SageMaker's service model from the environment of the interpreter `python`, read at the first call in this process.
 * @throws {ServiceModelUnavailable} each time anew, until the environment is whole.
 */
export function serviceModel(python: string): Promise<ServiceModel> {
  let model = models.get(python);
  if (model === undefined) {
    model = read(python).catch((error: Error & { stderr?: string }) => {
      models.delete(python);
      // Of what Python wrote, the last line says why.
      throw new ServiceModelUnavailable(python, error.stderr?.trim().split('\n').at(-1) || error.message);
    });
    models.set(python, model);
  }
  return model;
}

async function read(python: string): Promise<ServiceModel> {
  // -P: nothing that lies in the current folder is taken for a module.
  const { stdout } = await execute(python, ['-P', '-c', 'import botocore; print(botocore.__path__[0])'], {
    timeout: 60_000,
  });
  const folder = join(stdout.trim(), 'data', 'sagemaker');
  // By API version, which is a date; compressed, but for Debian's.
  const [path] = (await Array.fromAsync(glob('*/service-2.json{,.gz}', { cwd: folder }))).sort().reverse();
  if (path === undefined) throw new Error(`there is no service-2.json in ${folder}`);
  const bytes = await readFile(join(folder, path));
  const text = path.endsWith('.gz') ? await promisify(gunzip)(bytes) : bytes;
  return new ServiceModel(JSON.parse(text.toString('utf8')));
}
