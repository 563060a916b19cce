/**
 * Who may do what: the roles of the template with their policies, the policies of buckets and topics, and one
 * local access key per role, so that a right missing here is a right missing on AWS.
 *
 * What a policy can say and this evaluation cannot is refused when the policy is loaded, never ignored.
 */
import { createHmac, randomBytes } from 'node:crypto';
import { linkSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { z } from 'zod';
import { type Caller, LOCAL_ACCOUNT, LOCAL_REGION, ServiceError, UnsupportedLocally } from './types.ts';

export interface Credentials {
  accessKeyId: string;
  secretAccessKey: string;
}

/** A role as the template declares it; documents are resolved JSON. */
export interface RoleDefinition {
  arn: string;
  trust: unknown;
  policies: { name: string; document: unknown }[];
  managedPolicyArns: string[];
}

/** Values of condition keys, by lower-cased key; a key that is absent is absent from the request. */
type Context = Record<string, string>;

type Test = (context: Context) => boolean;

interface Statement {
  effect: 'Allow' | 'Deny';
  action(action: string): boolean;
  resource(resource: string): boolean;
  /** Resource policies only: whether the statement names this principal. */
  principal(principal: Principal, effect: 'Allow' | 'Deny'): boolean;
  conditions: Test[];
}

/** A role or root (by ARN), or an AWS service acting by itself. */
type Principal = { kind: 'root' | 'role'; arn: string } | { kind: 'service'; service: string };

const ROOT_ARN = `arn:aws:iam::${LOCAL_ACCOUNT}:root`;

/** AWS managed policies known here. A role should rather say what it needs; these are what Lambda users expect. */
const MANAGED_POLICIES: Record<string, unknown> = {
  'arn:aws:iam::aws:policy/service-role/AWSLambdaBasicExecutionRole': {
    Version: '2012-10-17',
    Statement: [
      {
        Effect: 'Allow',
        Action: ['logs:CreateLogGroup', 'logs:CreateLogStream', 'logs:PutLogEvents'],
        Resource: '*',
      },
    ],
  },
};

/** Condition keys whose value is known for each request; all others are refused when a policy is loaded. */
const KNOWN_KEYS = [
  'aws:SecureTransport',
  'aws:PrincipalArn',
  'aws:PrincipalAccount',
  'aws:PrincipalIsAWSService',
  'aws:ResourceAccount',
  'aws:RequestedRegion',
  'aws:SourceAccount',
  'aws:SourceArn',
  // Of requests that nobody makes here: there are no metrics.
  'cloudwatch:namespace',
  'iam:PassedToService',
  's3:if-match',
  's3:if-none-match',
  's3:ObjectCreationOperation',
].map((key) => key.toLowerCase());

const oneOrMore = z.union([z.string(), z.array(z.string()).min(1)]);
const scalar = z.union([z.string(), z.boolean(), z.number()]);
const statementSchema = z.strictObject({
  Sid: z.string().optional(),
  Effect: z.enum(['Allow', 'Deny']),
  Principal: z
    .union([z.literal('*'), z.strictObject({ AWS: oneOrMore.optional(), Service: oneOrMore.optional() })])
    .optional(),
  Action: oneOrMore.optional(),
  NotAction: oneOrMore.optional(),
  Resource: oneOrMore.optional(),
  NotResource: oneOrMore.optional(),
  Condition: z.record(z.string(), z.record(z.string(), z.union([scalar, z.array(scalar).min(1)]))).optional(),
});
const documentSchema = z.strictObject({
  Version: z.string().optional(),
  Id: z.string().optional(),
  Statement: z.union([statementSchema, z.array(statementSchema)]),
});

/** Reads documents, evaluates requests, and knows every principal by its access key. */
export class Iam {
  readonly root: Credentials;
  readonly #secret: string;
  readonly #roles = new Map<string, { identity: Statement[]; trust: Statement[] }>();
  readonly #resourcePolicies = new Map<string, Statement[]>();
  readonly #principals = new Map<string, { principal: Principal; secretAccessKey: string }>();

  /** Keys derive from a secret that is made once per state folder (`<folder>/iam.json`, mode 0600). */
  constructor(options: { folder: string }) {
    this.#secret = secretOf(options.folder);
    this.root = this.#register({ kind: 'root', arn: ROOT_ARN }, ROOT_ARN);
  }

  /** Declares a role, or declares it anew. Throws {@link UnsupportedLocally} for what cannot be evaluated. */
  addRole(role: RoleDefinition): void {
    const identity = role.policies.flatMap(({ name, document }) =>
      parsePolicy(document, `policy ${name} of ${role.arn}`, 'identity'),
    );
    for (const arn of role.managedPolicyArns) {
      const known = MANAGED_POLICIES[arn];
      if (known === undefined) throw new UnsupportedLocally(`managed policy ${arn}`, role.arn);
      identity.push(...parsePolicy(known, arn, 'identity'));
    }
    const trust = parsePolicy(role.trust, `trust policy of ${role.arn}`, 'trust');
    this.#roles.set(role.arn, { identity, trust });
    this.#register({ kind: 'role', arn: role.arn }, role.arn);
  }

  /** Replaces the policy of a bucket, topic or function (by its ARN). */
  setResourcePolicy(resourceArn: string, document: unknown): void {
    this.#resourcePolicies.set(resourceArn, parsePolicy(document, `policy of ${resourceArn}`, 'resource'));
  }

  /** The access key of a declared role. Throws `NoSuchEntity` for any other. */
  credentials(roleArn: string): Credentials {
    this.#role(roleArn);
    return this.#credentials(roleArn);
  }

  /** Who holds this access key, and the secret to check signatures with. */
  principal(accessKeyId: string): { caller: Caller; secretAccessKey: string } | undefined {
    const found = this.#principals.get(accessKeyId);
    return found && { caller: this.#caller(found.principal), secretAccessKey: found.secretAccessKey };
  }

  caller(roleArn: string): Caller {
    this.#role(roleArn);
    return this.#caller({ kind: 'role', arn: roleArn });
  }

  rootCaller(): Caller {
    return this.#caller({ kind: 'root', arn: ROOT_ARN });
  }

  /** An AWS service that acts by itself on behalf of `sourceArn`: allowed only what resource policies grant it. */
  serviceCaller(service: string, sourceArn: string): Caller {
    return this.#caller({ kind: 'service', service }, { 'aws:sourcearn': sourceArn });
  }

  /** Throws `AccessDenied` unless the role's trust policy lets `service` assume it. */
  assertAssumable(roleArn: string, service: string, sourceArn: string): void {
    const { trust } = this.#role(roleArn);
    const principal: Principal = { kind: 'service', service };
    const context = contextOf(principal, { 'aws:sourcearn': sourceArn });
    if (decide([], trust, principal, 'sts:AssumeRole', roleArn, context).allowed) return;
    throw new ServiceError(
      'AccessDenied',
      `${service} cannot assume ${roleArn} for ${sourceArn}: the role's trust policy does not allow it`,
      403,
    );
  }

  /**
   * The caller as `service` sees it: when the service asks whether it may be passed a role (`iam:PassRole`), the
   * policy learns which service asks, and the role must let that service assume it.
   */
  passingTo(service: string, caller: Caller): Caller {
    return {
      arn: caller.arn,
      authorize: (action, resource, context) => {
        if (action !== 'iam:PassRole') return caller.authorize(action, resource, context);
        this.#authorize(this.#principalOf(caller), action, resource, { 'iam:passedtoservice': service });
        return this.assertAssumable(
          resource,
          service,
          `arn:aws:${service.split('.')[0]}:${LOCAL_REGION}:${LOCAL_ACCOUNT}:*`,
        );
      },
    };
  }

  #principalOf(caller: Caller): Principal {
    if (caller.arn === ROOT_ARN) return { kind: 'root', arn: ROOT_ARN };
    return { kind: 'role', arn: caller.arn };
  }

  #caller(principal: Principal, extra: Context = {}): Caller {
    return {
      arn: nameOf(principal),
      authorize: (action, resource, context) =>
        this.#authorize(principal, action, resource, { ...context, ...extra }),
    };
  }

  #authorize(principal: Principal, action: string, resource: string, extra: Context): void {
    const identity = principal.kind === 'role' ? this.#role(principal.arn).identity : [];
    const policy = this.#resourcePolicies.get(policyHolder(resource)) ?? [];
    const context = contextOf(principal, extra);
    const { allowed, why } = decide(identity, policy, principal, action, resource, context);
    if (allowed) return;
    throw new ServiceError(
      'AccessDenied',
      `User: ${nameOf(principal)} is not authorized to perform: ${action} on resource: ${resource} ${why}`,
      403,
    );
  }

  #role(arn: string) {
    const role = this.#roles.get(arn);
    if (role === undefined) {
      throw new ServiceError('NoSuchEntity', `The role ${arn} is not in the deployed template.`, 404);
    }
    return role;
  }

  #register(principal: Principal, arn: string): Credentials {
    const credentials = this.#credentials(arn);
    this.#principals.set(credentials.accessKeyId, {
      principal,
      secretAccessKey: credentials.secretAccessKey,
    });
    return credentials;
  }

  #credentials(arn: string): Credentials {
    const derive = (what: string) => createHmac('sha256', this.#secret).update(`${what}:${arn}`);
    return {
      accessKeyId: `LOCAL${derive('id').digest('hex').slice(0, 15).toUpperCase()}`,
      secretAccessKey: derive('secret').digest('base64url').slice(0, 40),
    };
  }
}

/**
 * The decision as AWS documents it: an explicit Deny anywhere wins, then an Allow in either kind of policy;
 * nothing said is a refusal. Root needs no Allow.
 */
function decide(
  identity: Statement[],
  resourcePolicy: Statement[],
  principal: Principal,
  action: string,
  resource: string,
  context: Context,
): { allowed: boolean; why: string } {
  const applies = (statement: Statement) =>
    statement.action(action) &&
    statement.resource(resource) &&
    statement.conditions.every((test) => test(context));
  const byIdentity = identity.filter(applies);
  const byResource = resourcePolicy.filter(
    (statement) => statement.principal(principal, statement.effect) && applies(statement),
  );
  const denies = (statement: Statement) => statement.effect === 'Deny';
  if (byIdentity.some(denies)) {
    return { allowed: false, why: 'with an explicit deny in an identity-based policy' };
  }
  if (byResource.some(denies)) {
    return { allowed: false, why: 'with an explicit deny in a resource-based policy' };
  }
  const allowed = principal.kind === 'root' || byIdentity.length > 0 || byResource.length > 0;
  const kind = principal.kind === 'service' ? 'resource-based' : 'identity-based';
  return { allowed, why: `because no ${kind} policy allows the ${action} action` };
}

/** The resource that holds the policy: an object's bucket, else the resource itself. */
function policyHolder(resource: string): string {
  return resource.startsWith('arn:aws:s3:::') ? (resource.split('/')[0] ?? resource) : resource;
}

function nameOf(principal: Principal): string {
  return principal.kind === 'service' ? principal.service : principal.arn;
}

function contextOf(principal: Principal, extra: Context): Context {
  const context: Context = {
    // Requests never leave loopback, which is as private as TLS.
    'aws:securetransport': 'true',
    'aws:resourceaccount': LOCAL_ACCOUNT,
    'aws:requestedregion': LOCAL_REGION,
    'aws:principalisawsservice': String(principal.kind === 'service'),
    ...extra,
  };
  if (principal.kind === 'service') context['aws:sourceaccount'] = LOCAL_ACCOUNT;
  else {
    context['aws:principalarn'] = principal.arn;
    context['aws:principalaccount'] = LOCAL_ACCOUNT;
  }
  return context;
}

// --- reading a policy document ---------------------------------------------------------------------------------

function parsePolicy(document: unknown, where: string, kind: 'identity' | 'resource' | 'trust'): Statement[] {
  const parsed = documentSchema.safeParse(document);
  if (!parsed.success) {
    const issue = parsed.error.issues[0];
    throw new UnsupportedLocally(`a policy document with ${issue?.path.join('.')}: ${issue?.message}`, where);
  }
  return [parsed.data.Statement].flat().map((raw) => {
    refuseVariables(raw, where);
    if (kind === 'identity' && raw.Principal !== undefined) {
      throw new UnsupportedLocally('Principal in an identity-based policy', where);
    }
    if (kind !== 'identity' && raw.Principal === undefined) {
      throw new UnsupportedLocally('a statement without Principal', where);
    }
    return {
      effect: raw.Effect,
      action: matcher(raw.Action, raw.NotAction, 'Action', where, true),
      resource:
        kind === 'trust' ? () => true : matcher(raw.Resource, raw.NotResource, 'Resource', where, false),
      principal: principalMatcher(raw.Principal),
      conditions: Object.entries(raw.Condition ?? {}).flatMap(([operator, keys]) =>
        Object.entries(keys).map(([key, values]) => condition(operator, key, [values].flat(), where)),
      ),
    };
  });
}

function matcher(
  is: string | string[] | undefined,
  isNot: string | string[] | undefined,
  element: string,
  where: string,
  ignoreCase: boolean,
): (value: string) => boolean {
  if ((is === undefined) === (isNot === undefined)) {
    throw new UnsupportedLocally(`a statement without one of ${element} and Not${element}`, where);
  }
  const patterns = [is ?? isNot ?? []].flat().map((pattern) => wildcard(pattern, ignoreCase));
  const matches = (value: string) => patterns.some((pattern) => pattern.test(value));
  return is === undefined ? (value) => !matches(value) : matches;
}

function principalMatcher(raw: z.infer<typeof statementSchema>['Principal']): Statement['principal'] {
  if (raw === undefined) return () => true;
  const aws = raw === '*' ? ['*'] : [raw.AWS ?? []].flat();
  const services = raw === '*' ? [] : [raw.Service ?? []].flat();
  return (principal, effect) => {
    if (principal.kind === 'service') return services.includes(principal.service) || raw === '*';
    if (aws.includes('*') || aws.includes(principal.arn)) return true;
    // Naming the account delegates to its identity policies: it denies everyone in it, but grants nobody.
    return effect === 'Deny' && (aws.includes(LOCAL_ACCOUNT) || aws.includes(ROOT_ARN));
  };
}

function condition(
  operator: string,
  key: string,
  values: (string | boolean | number)[],
  where: string,
): Test {
  const name = key.toLowerCase();
  if (!KNOWN_KEYS.includes(name)) throw new UnsupportedLocally(`condition key ${key}`, where);
  const wanted = values.map(String);
  if (operator === 'Null') {
    return (context) => wanted.includes(String(context[name] === undefined));
  }
  const ifExists = operator.endsWith('IfExists');
  const base = ifExists ? operator.slice(0, -'IfExists'.length) : operator;
  const test = OPERATORS[base];
  if (test === undefined) throw new UnsupportedLocally(`condition operator ${operator}`, where);
  const matches = test(wanted);
  const negated = base.includes('Not');
  return (context) => {
    const value = context[name];
    if (value === undefined) return ifExists || negated;
    return matches(value) !== negated;
  };
}

/** Operators by name: given the policy's values, whether any matches. `Not…` is negated by the caller. */
const OPERATORS: Record<string, (wanted: string[]) => (value: string) => boolean> = {
  StringEquals: equals,
  StringNotEquals: equals,
  StringEqualsIgnoreCase: equalsIgnoreCase,
  StringNotEqualsIgnoreCase: equalsIgnoreCase,
  StringLike: like,
  StringNotLike: like,
  ArnEquals: like,
  ArnNotEquals: like,
  ArnLike: like,
  ArnNotLike: like,
  Bool: equalsIgnoreCase,
};

function equals(wanted: string[]) {
  return (value: string) => wanted.includes(value);
}

function equalsIgnoreCase(wanted: string[]) {
  const lower = wanted.map((each) => each.toLowerCase());
  return (value: string) => lower.includes(value.toLowerCase());
}

function like(wanted: string[]) {
  const patterns = wanted.map((pattern) => wildcard(pattern, false));
  return (value: string) => patterns.some((pattern) => pattern.test(value));
}

/** IAM's wildcards: `*` is any run of characters, `?` any one. */
export function wildcard(pattern: string, ignoreCase: boolean): RegExp {
  const source = pattern
    .replace(/\*+/g, '*')
    .replace(/[\\^$.+()|[\]{}]/g, '\\$&')
    .replaceAll('*', '[^]*')
    .replaceAll('?', '[^]');
  return new RegExp(`^${source}$`, ignoreCase ? 'i' : '');
}

function refuseVariables(statement: unknown, where: string): void {
  const found = /\$\{[^}]*\}/.exec(JSON.stringify(statement));
  if (found) throw new UnsupportedLocally(`policy variable ${found[0]}`, where);
}

// --- the state folder's secret ---------------------------------------------------------------------------------

function secretOf(folder: string): string {
  mkdirSync(folder, { recursive: true });
  const path = join(folder, 'iam.json');
  const fresh = `${path}.${process.pid}.${randomBytes(4).toString('hex')}`;
  writeFileSync(fresh, JSON.stringify({ secret: randomBytes(32).toString('hex') }), { mode: 0o600 });
  try {
    // Whoever links first has made the secret; it appears whole or not at all.
    linkSync(fresh, path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error;
  } finally {
    rmSync(fresh);
  }
  return z.object({ secret: z.string().min(32) }).parse(JSON.parse(readFileSync(path, 'utf8'))).secret;
}
