/**
 * Runs one instance's container as its child. It waits for the engine's word on stdin (one line of JSON), so that
 * nothing runs before the engine has this process on record; and when stdin ends, which it does however the engine
 * ends, everything in this process group is killed. Node has no parent-death signal; this is its stand-in.
 */
import { spawn } from 'node:child_process';
import { constants } from 'node:os';
import type { Command } from './executors.ts';

// A stop is meant for the container, which gets the same signal; this process stays to report how that ended.
process.on('SIGTERM', () => undefined);

function run({ argv: [file = '', ...args], cwd, env }: Command): void {
  const child = spawn(file, args, { cwd, env, stdio: ['ignore', 'inherit', 'inherit'] });
  child.on('error', (error) => {
    process.stderr.write(`${error.message}\n`, () => process.exit(127));
  });
  child.on('exit', (code, signal) => process.exit(code ?? 128 + (signal ? constants.signals[signal] : 0)));
}

const engineIsGone = () => process.kill(-process.pid, 'SIGKILL');

let received = '';
process.stdin.setEncoding('utf8');
process.stdin.on('data', (chunk: string) => {
  received += chunk;
  if (received.endsWith('\n')) run(JSON.parse(received));
});
process.stdin.on('end', engineIsGone);
process.stdin.on('error', engineIsGone);
