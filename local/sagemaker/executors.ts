/**
 * The two ways to run a container here: in Docker, or as a process of this machine with the container's folder as
 * its code and, where mount namespaces are allowed, a real /opt/ml. Both end up as one command to supervise.
 */
import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync } from 'node:fs';
import { devNull } from 'node:os';
import { basename, delimiter, dirname, join } from 'node:path';
import { promisify } from 'node:util';
import { LOCAL_REGION } from '../types.ts';
import { containerStart } from './dockerfile.ts';

const execute = promisify(execFile);

/** A command to run: nothing of this process's own environment is added to `env`. */
export interface Command {
  argv: [string, ...string[]];
  cwd: string;
  env: Record<string, string>;
  /** Name of the Docker container that the command starts, which may outlive it: see {@link removeContainer}. */
  container?: string;
  /** The Unix socket at which the container serves, where it has no port of this machine. */
  socket?: string;
}

/** One instance of a job, to be run. */
export interface Instance {
  /** The job's name. */
  job: string;
  host: string;
  /** What the container sees as /opt/ml. */
  folder: string;
  imageUri: string;
  /** The image's folder in the repository: Dockerfile and code. */
  container: string;
  /** In place of the image's own. */
  entrypoint?: string[] | undefined;
  arguments?: string[] | undefined;
  environment: Record<string, string>;
  /** Without network and credentials. */
  isolated: boolean;
  credentials: { accessKeyId: string; secretAccessKey: string };
  endpoint: string;
  /** For a container that serves: where on this machine it is to be reached. */
  serve?: { port: number; socket: string };
}

export interface Executor {
  /** The command that runs the instance. Throws when it cannot be run. */
  command(instance: Instance): Promise<Command>;
}

/** Variables of this machine without which programs do not run, or do not show text rightly. */
const ESSENTIAL = ['PATH', 'HOME', 'LANG', 'LC_ALL', 'TMPDIR', 'SYSTEMROOT'];

/** The port on which SageMaker expects a container to serve. */
const SERVE_PORT = 8080;

/** What SageMaker puts into the container's environment; an isolated container gets no credentials. */
function jobEnvironment({ environment, isolated, credentials, endpoint }: Instance): Record<string, string> {
  return {
    ...environment,
    AWS_REGION: LOCAL_REGION,
    AWS_DEFAULT_REGION: LOCAL_REGION,
    AWS_EC2_METADATA_DISABLED: 'true',
    ...(!isolated && {
      AWS_ENDPOINT_URL: endpoint,
      AWS_ACCESS_KEY_ID: credentials.accessKeyId,
      AWS_SECRET_ACCESS_KEY: credentials.secretAccessKey,
    }),
  };
}

const OPT_ML = join(import.meta.dirname, 'opt-ml.sh');
const ISOLATED = join(import.meta.dirname, 'isolated.py');

export class ProcessExecutor implements Executor {
  readonly #python: string;
  readonly #scratch: string;
  readonly #mountNamespace: boolean;
  #unshare: Promise<string[] | null> | undefined;

  /** `scratch` is an own folder for mount points; `mountNamespace` false keeps to the base-directory variable. */
  constructor(options: { python: string; scratch: string; mountNamespace: boolean }) {
    this.#python = options.python;
    this.#scratch = options.scratch;
    this.#mountNamespace = options.mountNamespace;
  }

  async command(instance: Instance): Promise<Command> {
    const { folder, container, serve } = instance;
    const image = containerStart(container);
    const entrypoint = instance.entrypoint ?? image.entrypoint;
    const defaults = instance.entrypoint ? [] : image.cmd;
    const [head, ...rest] = [...entrypoint, ...(instance.arguments ?? defaults)];
    if (head === undefined) throw new Error(`${join(container, 'Dockerfile')} names no ENTRYPOINT`);
    const program = /^python3?(\.\d+)?$/.test(basename(head)) ? this.#python : head;

    const essential: Record<string, string> = {};
    for (const name of ESSENTIAL) {
      const value = process.env[name];
      if (value !== undefined) essential[name] = value;
    }
    const env = {
      ...essential,
      // The interpreter's own folder first, so that programs of its environment are found as in the image.
      PATH: [dirname(this.#python), essential.PATH ?? ''].join(delimiter),
      PYTHONPATH: [container, join(container, 'src')].filter((path) => existsSync(path)).join(delimiter),
      PYTHONUNBUFFERED: '1',
      // An image has no profiles; those of whoever sits here lead to a real account.
      AWS_CONFIG_FILE: devNull,
      AWS_SHARED_CREDENTIALS_FILE: devNull,
      ...jobEnvironment(instance),
    };

    // Several servers share this machine's ports, so each is told its own.
    const bound = serve ? { ...env, SAGEMAKER_BIND_TO_PORT: String(serve.port) } : env;
    const unshare = await this.#probe();
    if (unshare === null)
      return { argv: [program, ...rest], cwd: container, env: { ...bound, SLIDEWAY_ML_ROOT: folder } };
    const [tool = '', ...flags] = unshare;
    const inside = [...flags, ...(instance.isolated ? ['--net'] : []), 'sh', OPT_ML, folder, this.#aside];
    if (!serve || !instance.isolated)
      return { argv: [tool, ...inside, program, ...rest], cwd: container, env: bound };
    const port = String(SERVE_PORT);
    return {
      argv: [tool, ...inside, this.#python, '-B', '-I', ISOLATED, serve.socket, port, program, ...rest],
      cwd: container,
      env,
      socket: serve.socket,
    };
  }

  get #aside(): string {
    return join(this.#scratch, 'opt');
  }

  /** The command that opens a mount namespace in which /opt/ml can be had; null where none is allowed. */
  #probe(): Promise<string[] | null> {
    this.#unshare ??= this.#findNamespace();
    return this.#unshare;
  }

  async #findNamespace(): Promise<string[] | null> {
    if (!this.#mountNamespace || process.platform !== 'linux') return null;
    const probe = join(this.#scratch, 'probe');
    mkdirSync(join(probe, 'seen'), { recursive: true });
    mkdirSync(this.#aside, { recursive: true });
    for (const candidate of [
      ['unshare', '--mount'],
      ['unshare', '--user', '--map-root-user', '--mount'],
    ]) {
      const [tool = '', ...flags] = candidate;
      const argv = [...flags, 'sh', OPT_ML, probe, this.#aside, 'test', '-d', '/opt/ml/seen'];
      try {
        await execute(tool, argv, { timeout: 10_000 });
        return candidate;
      } catch {
        // Not allowed this way; the next one, or the base-directory variable.
      }
    }
    return null;
  }
}

/** Runs the job's image in Docker, sharing the machine's network so that the container reaches the engine. */
export class DockerExecutor implements Executor {
  readonly #images = new Map<string, Promise<string | null>>();
  #runtimes: Promise<string> | undefined;

  /** The name under which the engine has the image; null when no engine answers or it has no such image. */
  image(imageUri: string): Promise<string | null> {
    let found = this.#images.get(imageUri);
    if (!found) {
      found = this.#find(imageUri);
      this.#images.set(imageUri, found);
    }
    return found;
  }

  async #find(imageUri: string): Promise<string | null> {
    // As built for the registry, or as built on this machine: without the registry's host.
    for (const name of [imageUri, imageUri.replace(/^[^/]*[.:][^/]*\//, '')]) {
      try {
        await execute('docker', ['image', 'inspect', '--format', '{{.Id}}', name], { timeout: 10_000 });
        return name;
      } catch {
        // No engine, or not under this name.
      }
    }
    return null;
  }

  async #gpus(): Promise<string[]> {
    this.#runtimes ??= execute('docker', ['info', '--format', '{{json .Runtimes}}'], {
      timeout: 10_000,
    }).then(
      ({ stdout }) => stdout,
      () => '',
    );
    return (await this.#runtimes).includes('"nvidia"') ? ['--gpus', 'all'] : [];
  }

  async command(instance: Instance): Promise<Command> {
    const { imageUri, folder, isolated, serve } = instance;
    const image = await this.image(imageUri);
    if (image === null) throw new Error(`no container engine answers, or it has no image ${imageUri}`);
    const [entrypoint, ...rest] = instance.entrypoint ?? [];
    const container = containerName(instance);
    const variables = {
      ...jobEnvironment(instance),
      ...(serve && !isolated && { SAGEMAKER_BIND_TO_PORT: String(serve.port) }),
    };
    // A server without network must still be reached: it gets a bridge and one published port, but no credentials.
    const network = !isolated
      ? ['--network', 'host']
      : serve
        ? ['--publish', `127.0.0.1:${serve.port}:${SERVE_PORT}`]
        : ['--network', 'none'];
    const env: Record<string, string> = { ...variables };
    for (const name of [...ESSENTIAL, 'DOCKER_HOST', 'DOCKER_CONTEXT', 'DOCKER_CONFIG']) {
      const value = process.env[name];
      if (value !== undefined && !(name in variables)) env[name] = value;
    }
    return {
      argv: [
        'docker',
        'run',
        '--rm',
        '--name',
        container,
        ...network,
        '--shm-size',
        '2g',
        ...(await this.#gpus()),
        '--volume',
        `${folder}:/opt/ml`,
        // By name only: values, among them the secret key, stay out of the process list.
        ...Object.keys(variables).flatMap((name) => ['--env', name]),
        ...(entrypoint === undefined ? [] : ['--entrypoint', entrypoint]),
        image,
        ...rest,
        ...(instance.arguments ?? []),
      ],
      cwd: folder,
      env,
      container,
    };
  }
}

/** Removes a Docker container, running or not. */
export async function removeContainer(name: string): Promise<void> {
  try {
    await execute('docker', ['rm', '--force', name], { timeout: 60_000 });
  } catch (error) {
    // Without the program or its engine there is no container to remove.
    const { code, stderr = '' } = error as { code?: unknown; stderr?: string };
    if (code !== 'ENOENT' && !/cannot connect|no such container/i.test(stderr)) throw error;
  }
}

/** Docker's names are the machine's, job names the state folder's: the folder's hash keeps two engines apart. */
export function containerName({ job, host, folder }: Pick<Instance, 'job' | 'host' | 'folder'>): string {
  const hash = createHash('sha256').update(folder).digest('hex').slice(0, 12);
  return `${job}-${host}-${hash}`;
}
