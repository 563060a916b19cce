/** Counts the AWS requests that a piece of work makes, by the classes in which they are billed. */

type Middleware = (
  next: (args: unknown) => Promise<unknown>,
  context: { commandName?: string },
) => (args: unknown) => Promise<unknown>;
interface Client {
  middlewareStack: { add(middleware: never, options: { step: 'finalizeRequest'; name: string }): void };
}

export type MeteredService = 's3' | 'dynamodb' | 'sns';

/** The class in which a command is billed. */
export function requestClass(service: MeteredService, command: string): string {
  if (service === 's3') return /^(Get|Head)/.test(command) ? 's3Get' : 's3Put';
  if (service === 'dynamodb')
    return /^(Get|Query|BatchGet|Scan)/.test(command) ? 'dynamodbRead' : 'dynamodbWrite';
  return 'snsPublish';
}

export class Meter {
  #counts: Record<string, number> = {};

  /** Counts every attempt that `client` sends from now on. */
  attach(client: Client, service: MeteredService): void {
    const count: Middleware = (next, context) => (args) => {
      const name = requestClass(service, context.commandName ?? '');
      this.#counts[name] = (this.#counts[name] ?? 0) + 1;
      return next(args);
    };
    client.middlewareStack.add(count as never, { step: 'finalizeRequest', name: 'meter' });
  }

  /** What was counted since the last call. */
  take(): Record<string, number> {
    const counts = this.#counts;
    this.#counts = {};
    return counts;
  }
}

export function addCounts(
  a: Record<string, number> = {},
  b: Record<string, number> = {},
): Record<string, number> {
  const sum = { ...a };
  for (const [name, count] of Object.entries(b)) sum[name] = (sum[name] ?? 0) + count;
  return sum;
}
