/**
 * SageMaker on this machine: the service's own protocol and checks, Processing and Transform jobs that really run, in
 * Docker or as processes, and the models that Transform jobs serve. Jobs are on disk before they are answered for;
 * after an end of the engine at any moment, `recover()` goes on with them, and no job ever runs twice at once on the
 * same folder.
 */
import { join } from 'node:path';
import { type Caller, type JsonOperation, type JsonService, ServiceError } from '../types.ts';
import { Machine, type SageMakerOptions } from './jobs.ts';
import { Models } from './models.ts';
import { ProcessingJobs } from './processing.ts';
import type { Tag } from './requests.ts';
import { TransformJobs } from './transform.ts';

export type { Fault, SageMakerOptions } from './jobs.ts';
export { PROCESSING_LOG_GROUP } from './processing.ts';
export { TRANSFORM_LOG_GROUP } from './transform.ts';

const MAX_TAGS = 50;

export class SageMaker implements JsonService {
  readonly #machine: Machine;
  readonly #processing: ProcessingJobs;
  readonly #transform: TransformJobs;
  readonly #models: Models;
  readonly operations: Record<string, JsonOperation>;

  constructor(options: SageMakerOptions) {
    this.#machine = new Machine(options);
    this.#processing = new ProcessingJobs(this.#machine, options.folder);
    this.#models = new Models(this.#machine, join(options.folder, '.models'));
    this.#transform = new TransformJobs(this.#machine, join(options.folder, '.transform'), this.#models);
    this.operations = {
      ...this.#processing.operations,
      ...this.#transform.operations,
      ...this.#models.operations,
      AddTags: (input: { ResourceArn: string; Tags: Tag[] }, caller: Caller) => this.#addTags(input, caller),
      ListTags: (input: { ResourceArn: string }, caller: Caller) => this.#listTags(input, caller),
    };
  }

  /** Goes on with the jobs that an earlier engine left, in the order in which they were asked for. */
  async recover(): Promise<void> {
    const left = [
      ...(await this.#processing.unfinished()).map((job) => ({
        at: job.creationTime,
        goOn: () => this.#processing.goOn(job),
      })),
      ...(await this.#transform.unfinished()).map((job) => ({
        at: job.creationTime,
        goOn: () => this.#transform.goOn(job),
      })),
    ];
    for (const { goOn } of left.sort((a, b) => a.at - b.at)) await goOn();
  }

  /** Ends what runs, at once; the jobs stay in progress for the next engine's `recover()`. */
  close(): Promise<void> {
    return this.#machine.turns.close();
  }

  /** What carries tags, and how its tags are kept. */
  #tagged(arn: string): { tags: Tag[]; keep(tags: Tag[]): void } {
    for (const kind of [this.#processing, this.#transform, this.#models]) {
      const tags = kind.tags(arn);
      if (tags) return { tags, keep: (all) => kind.tag(arn, all) };
    }
    throw new ServiceError('ValidationException', `Could not find the resource ${arn}`);
  }

  async #addTags(input: { ResourceArn: string; Tags: Tag[] }, caller: Caller) {
    (await this.#machine.model()).validate('AddTags', input);
    caller.authorize('sagemaker:AddTags', input.ResourceArn);
    const tagged = this.#tagged(input.ResourceArn);
    const tags = new Map([...tagged.tags, ...input.Tags].map((tag) => [tag.Key, tag]));
    if (tags.size > MAX_TAGS)
      throw new ServiceError(
        'ResourceLimitExceeded',
        `A resource has at most ${MAX_TAGS} tags; ${input.ResourceArn} would have ${tags.size}.`,
      );
    const all = [...tags.values()];
    tagged.keep(all);
    return { Tags: all };
  }

  async #listTags(input: { ResourceArn: string }, caller: Caller) {
    (await this.#machine.model()).validate('ListTags', input);
    caller.authorize('sagemaker:ListTags', input.ResourceArn);
    return { Tags: this.#tagged(input.ResourceArn).tags };
  }
}
