/**
 * Tells whoever listens of new objects, at least once each: an event is on record with its object before it is told,
 * and off the record only when the listener has taken it.
 */
import { Batch, type ObjectCreated, type Store } from './store.ts';

const FIRST_RETRY_MS = 1000;
const LAST_RETRY_MS = 60_000;

export class Deliveries {
  readonly #store: Store;
  readonly #deliver: (event: ObjectCreated) => Promise<void>;
  /** By sequencer: deliveries that this process is at. */
  readonly #running = new Map<string, Promise<void>>();
  readonly #closing = new AbortController();

  constructor(store: Store, deliver: (event: ObjectCreated) => Promise<void>) {
    this.#store = store;
    this.#deliver = deliver;
  }

  /** Begins the delivery of an event that is on record. */
  start(event: ObjectCreated): void {
    if (this.#running.has(event.sequencer) || this.#closing.signal.aborted) return;
    const running = this.#run(event).finally(() => this.#running.delete(event.sequencer));
    this.#running.set(event.sequencer, running);
  }

  /** Begins again with everything that an earlier process did not finish. */
  async recover(): Promise<void> {
    for await (const event of this.#store.events()) this.start(event);
  }

  /** Ends after the deliveries that are being made; what waits for a retry stays on record. */
  async close(): Promise<void> {
    this.#closing.abort();
    await Promise.all(this.#running.values());
  }

  async #run(event: ObjectCreated): Promise<void> {
    for (let wait = FIRST_RETRY_MS; ; wait = Math.min(wait * 2, LAST_RETRY_MS)) {
      try {
        await this.#deliver(event);
        return await this.#store.write(new Batch().event(event.sequencer, undefined));
      } catch {
        if (this.#closing.signal.aborted) return;
        await this.#pause(wait);
        if (this.#closing.signal.aborted) return;
      }
    }
  }

  #pause(milliseconds: number): Promise<void> {
    return new Promise((resolve) => {
      const end = () => {
        clearTimeout(timer);
        this.#closing.signal.removeEventListener('abort', end);
        resolve();
      };
      const timer = setTimeout(end, milliseconds);
      timer.unref();
      this.#closing.signal.addEventListener('abort', end);
    });
  }
}
