/** Runs another program and tells what it says, line by line. */
import { spawn } from 'node:child_process';
import { createInterface } from 'node:readline';

const TAIL = 40;

/** A program that ended with an error or could not be started. */
export class CommandFailed extends Error {
  override readonly name = 'CommandFailed';
  /** The last lines it wrote. */
  readonly tail: string[];
  constructor(program: string, how: string, tail: string[]) {
    super(`${program} ${how}`);
    this.tail = tail;
  }
}

export interface CommandOptions {
  cwd?: string;
  env?: NodeJS.ProcessEnv;
  onLine?: (line: string) => void;
  timeoutMs?: number;
}

/**
 * Runs `program` to its end; standard output and error come together, also as the answer.
 * @throws {CommandFailed}
 */
export async function command(
  program: string,
  args: string[],
  options: CommandOptions = {},
): Promise<string[]> {
  const lines: string[] = [];
  const child = spawn(program, args, {
    cwd: options.cwd,
    env: options.env ?? process.env,
    stdio: ['ignore', 'pipe', 'pipe'],
    ...(options.timeoutMs !== undefined && { timeout: options.timeoutMs }),
  });
  const read = async (stream: NodeJS.ReadableStream) => {
    for await (const line of createInterface({ input: stream })) {
      lines.push(line);
      options.onLine?.(line);
    }
  };
  const ended = new Promise<string | undefined>((resolve) => {
    child.once('error', (error) => resolve(`could not be started: ${error.message}`));
    child.once('close', (code, signal) =>
      resolve(code === 0 ? undefined : signal ? `was ended by ${signal}` : `ended with code ${code}`),
    );
  });
  const [how] = await Promise.all([ended, read(child.stdout), read(child.stderr)]);
  if (how !== undefined) throw new CommandFailed(program, how, lines.slice(-TAIL));
  return lines;
}
