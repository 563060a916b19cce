/**
 * Reads what `serverless package` wrote: the CloudFormation template with every intrinsic function resolved, in
 * an order in which it can be created, and the bundle of each function. What the local AWS cannot do is refused
 * here by name, before anything is created.
 */
import { createHash } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { z } from 'zod';
import { isKnownType, RESOURCE_TYPES, type Resource, type ResourceType, type TypeName } from './resources.ts';
import { LOCAL_ACCOUNT, LOCAL_REGION, UnsupportedLocally } from './types.ts';

/** The template contradicts itself or lacks something; CloudFormation would refuse it too. */
export class InvalidTemplate extends Error {
  override readonly name = 'InvalidTemplate';
}

/** There is no package in the folder. */
export class PackageNotFound extends Error {
  override readonly name = 'PackageNotFound';
}

export interface Stack {
  name: string;
  /** In an order in which each comes after what it refers to. */
  resources: Resource[];
  outputs: Record<string, string>;
  /** Path of a function's bundle, by the key its Code names. */
  bundle(s3Key: string): string;
}

const templateSchema = z.strictObject({
  AWSTemplateFormatVersion: z.string().optional(),
  Description: z.string().optional(),
  Metadata: z.unknown().optional(),
  Resources: z.record(
    z.string(),
    z.strictObject({
      Type: z.string(),
      Properties: z.record(z.string(), z.unknown()).default({}),
      DependsOn: z.union([z.string(), z.array(z.string())]).default([]),
      DeletionPolicy: z.string().optional(),
      UpdateReplacePolicy: z.string().optional(),
      Metadata: z.unknown().optional(),
    }),
  ),
  Outputs: z
    .record(
      z.string(),
      z.strictObject({
        Description: z.string().optional(),
        Value: z.unknown(),
        Export: z.unknown().optional(),
      }),
    )
    .default({}),
});
type Template = z.infer<typeof templateSchema>;

const stateSchema = z.object({
  service: z.object({
    service: z.string(),
    provider: z.object({ stage: z.string(), stackName: z.string().optional() }),
  }),
});

/** Loads the folder that `serverless package` wrote (`.serverless`). */
export function loadPackage(folder: string): Stack {
  const read = (name: string): unknown => {
    const path = join(folder, name);
    if (!existsSync(path)) {
      throw new PackageNotFound(
        `${path} does not exist. Run \`serverless package\` first (\`npm run package\`).`,
      );
    }
    return JSON.parse(readFileSync(path, 'utf8'));
  };
  const { service, provider } = stateSchema.parse(read('serverless-state.json')).service;
  const name = provider.stackName ?? `${service}-${provider.stage}`;
  return {
    ...resolveTemplate(read('cloudformation-template-update-stack.json'), name),
    bundle(s3Key) {
      const path = join(folder, basename(s3Key));
      if (!existsSync(path)) throw new PackageNotFound(`${path} does not exist, but the template names it.`);
      return path;
    },
  };
}

/** Resolves a template. Throws {@link UnsupportedLocally} or {@link InvalidTemplate}. */
export function resolveTemplate(document: unknown, stackName: string): Omit<Stack, 'bundle'> {
  const parsed = templateSchema.safeParse(document);
  if (!parsed.success) throw refusal(parsed.error, 'the template');
  const scope = new Scope(parsed.data, stackName);
  const outputs = Object.entries(parsed.data.Outputs).map(([name, output]) => {
    return [name, text(scope.resolve(output.Value, `Outputs.${name}`), `Outputs.${name}`)] as const;
  });
  return { name: stackName, resources: scope.ordered(), outputs: Object.fromEntries(outputs) };
}

/** Stands for a property that `AWS::NoValue` removes. */
const NO_VALUE = Symbol('AWS::NoValue');

/** One template: finds names and attributes of its resources, and resolves what refers to them. */
class Scope {
  readonly #template: Template;
  readonly #stackName: string;
  readonly #names = new Map<string, string>();
  readonly #naming: string[] = [];
  readonly #pseudo: Record<string, unknown>;
  /** What the value now being resolved refers to. */
  #referred = new Set<string>();

  constructor(template: Template, stackName: string) {
    this.#template = template;
    this.#stackName = stackName;
    this.#pseudo = {
      'AWS::AccountId': LOCAL_ACCOUNT,
      'AWS::Region': LOCAL_REGION,
      'AWS::Partition': 'aws',
      'AWS::StackName': stackName,
      'AWS::StackId': `arn:aws:cloudformation:${LOCAL_REGION}:${LOCAL_ACCOUNT}:stack/${stackName}/local`,
      'AWS::URLSuffix': 'amazonaws.com',
      'AWS::NoValue': NO_VALUE,
    };
  }

  /** Every resource after those it refers to or depends on. */
  ordered(): Resource[] {
    const done = new Map<string, Resource>();
    const visit = (logicalId: string, path: string[]): void => {
      if (done.has(logicalId)) return;
      if (path.includes(logicalId)) {
        throw new InvalidTemplate(`Resources depend on each other: ${[...path, logicalId].join(' → ')}`);
      }
      this.#referred = new Set([this.#raw(logicalId).DependsOn].flat());
      const resource = this.#resource(logicalId);
      for (const other of this.#referred) visit(other, [...path, logicalId]);
      done.set(logicalId, resource);
    };
    for (const logicalId of Object.keys(this.#template.Resources)) visit(logicalId, []);
    return [...done.values()];
  }

  resolve(value: unknown, where: string): unknown {
    if (Array.isArray(value)) {
      return value.map((item) => this.resolve(item, where)).filter((item) => item !== NO_VALUE);
    }
    if (typeof value !== 'object' || value === null) return value;
    const entries = Object.entries(value);
    const [first] = entries;
    if (first && entries.length === 1 && (first[0] === 'Ref' || first[0].startsWith('Fn::'))) {
      return this.#intrinsic(first[0], first[1], where);
    }
    return Object.fromEntries(
      entries
        .map(([key, item]) => [key, this.resolve(item, `${where}.${key}`)] as const)
        .filter(([, item]) => item !== NO_VALUE),
    );
  }

  #intrinsic(name: string, argument: unknown, where: string): unknown {
    switch (name) {
      case 'Ref':
        return this.#ref(text(argument, where), where);
      case 'Fn::GetAtt':
        return this.#getAtt(argument, where);
      case 'Fn::Sub':
        return this.#sub(argument, where);
      case 'Fn::Join': {
        const [separator, parts] = this.#arguments(
          argument,
          where,
          z.tuple([z.string(), z.array(z.unknown())]),
        );
        return parts.map((part) => text(part, where)).join(separator);
      }
      case 'Fn::Select': {
        const [index, list] = this.#arguments(
          argument,
          where,
          z.tuple([z.coerce.number().int(), z.array(z.unknown())]),
        );
        if (!(index in list)) throw new InvalidTemplate(`Fn::Select has no element ${index} (in ${where})`);
        return list[index];
      }
      case 'Fn::Split': {
        const [separator, whole] = this.#arguments(argument, where, z.tuple([z.string(), z.string()]));
        return whole.split(separator);
      }
      default:
        throw new UnsupportedLocally(name, where);
    }
  }

  #arguments<T>(argument: unknown, where: string, schema: z.ZodType<T>): T {
    const parsed = schema.safeParse(this.resolve(argument, where));
    if (!parsed.success) throw refusal(parsed.error, where);
    return parsed.data;
  }

  #ref(target: string, where: string): unknown {
    if (Object.hasOwn(this.#pseudo, target)) return this.#pseudo[target];
    if (target.startsWith('AWS::')) throw new UnsupportedLocally(`pseudo parameter ${target}`, where);
    const type = this.#type(target, where);
    this.#referred.add(target);
    return type.ref(this.#name(target));
  }

  #getAtt(argument: unknown, where: string): string {
    const [target = '', ...rest] = Array.isArray(argument)
      ? argument.map((part) => text(part, where))
      : text(argument, where).split('.');
    const attribute = rest.join('.');
    const type = this.#type(target, where);
    const read = Object.hasOwn(type.attributes, attribute) ? type.attributes[attribute] : undefined;
    if (read === undefined) {
      throw new UnsupportedLocally(`attribute ${attribute} of ${this.#raw(target).Type}`, where);
    }
    this.#referred.add(target);
    return read(this.#name(target));
  }

  /** Both forms: a string, or a string and its variables. `${!x}` stands for a literal `${x}`. */
  #sub(argument: unknown, where: string): string {
    const [template, variables] = Array.isArray(argument)
      ? [text(argument[0], where), z.record(z.string(), z.unknown()).parse(argument[1])]
      : [text(argument, where), {}];
    return template.replace(/\$\{([^}]*)\}/g, (_, raw: string) => {
      const name = raw.trim();
      if (name.startsWith('!')) return `\${${name.slice(1)}}`;
      if (Object.hasOwn(variables, name)) return text(this.resolve(variables[name], where), where);
      const value = name.includes('.') ? this.#getAtt(name, where) : this.#ref(name, where);
      return text(value, where);
    });
  }

  #raw(logicalId: string) {
    const raw = this.#template.Resources[logicalId];
    if (raw === undefined) throw new InvalidTemplate(`There is no resource ${logicalId} to refer to`);
    return raw;
  }

  #type(logicalId: string, where: string): ResourceType {
    if (!Object.hasOwn(this.#template.Resources, logicalId)) {
      throw new InvalidTemplate(`There is no resource ${logicalId} (in ${where})`);
    }
    return RESOURCE_TYPES[this.#typeName(logicalId)];
  }

  #typeName(logicalId: string): TypeName {
    const { Type } = this.#raw(logicalId);
    if (!isKnownType(Type)) throw new UnsupportedLocally(`resource type ${Type}`, logicalId);
    return Type;
  }

  /** The physical name: the template's own, or one made from stack and logical id, always the same. */
  #name(logicalId: string): string {
    const known = this.#names.get(logicalId);
    if (known !== undefined) return known;
    if (this.#naming.includes(logicalId)) {
      throw new InvalidTemplate(`Names depend on each other: ${[...this.#naming, logicalId].join(' → ')}`);
    }
    this.#naming.push(logicalId);
    const { Properties } = this.#raw(logicalId);
    const typeName = this.#typeName(logicalId);
    const { nameProperty }: ResourceType = RESOURCE_TYPES[typeName];
    const where = `${logicalId}.${nameProperty}`;
    const given = nameProperty === undefined ? undefined : this.resolve(Properties[nameProperty], where);
    let name: string;
    if (typeName === 'AWS::Lambda::Version') {
      name = `${text(this.resolve(Properties.FunctionName, where), where)}:1`;
    } else if (given !== undefined && given !== NO_VALUE) {
      name = text(given, where);
    } else {
      const digest = createHash('sha256')
        .update(`${this.#stackName}/${logicalId}`)
        .digest('hex')
        .slice(0, 12);
      const made = `${this.#stackName}-${logicalId}`.slice(0, 50);
      name = typeName === 'AWS::S3::Bucket' ? `${made.toLowerCase()}-${digest}` : `${made}-${digest}`;
    }
    this.#naming.pop();
    this.#names.set(logicalId, name);
    return name;
  }

  #resource(logicalId: string): Resource {
    const { Properties } = this.#raw(logicalId);
    const typeName = this.#typeName(logicalId);
    const type: ResourceType = RESOURCE_TYPES[typeName];
    const where = `${logicalId} (${typeName})`;
    const honoured = Object.fromEntries(
      Object.entries(Properties).filter(
        ([key]) => key !== type.nameProperty && !('*' in type.noEffect) && !Object.hasOwn(type.noEffect, key),
      ),
    );
    const parsed = type.schema.safeParse(this.resolve(honoured, where));
    if (!parsed.success) throw refusal(parsed.error, where);
    // The schema is the one of this type name, which the compiler cannot see through the lookup.
    return { type: typeName, logicalId, name: this.#name(logicalId), properties: parsed.data } as Resource;
  }
}

function text(value: unknown, where: string): string {
  if (typeof value === 'string') return value;
  if (typeof value === 'number' || typeof value === 'boolean') return String(value);
  throw new InvalidTemplate(`Expected a string, got ${JSON.stringify(value)} (in ${where})`);
}

/** The first thing that a schema did not take, as the refusal that names it. */
function refusal(error: z.ZodError, where: string): Error {
  const issue = error.issues[0];
  const path = issue?.path.map(String) ?? [];
  if (issue?.code === 'unrecognized_keys') {
    return new UnsupportedLocally(`property ${[...path, issue.keys[0]].join('.')}`, where);
  }
  return new UnsupportedLocally(`${path.join('.') || 'the value'}: ${issue?.message}`, where);
}
