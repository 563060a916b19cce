/**
 * The jobs on disk: one JSON record a job, beside the job's folders, replaced whole by a rename so that an end of
 * the engine at any moment leaves the old one or the new one.
 */
import { mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { ProcessMark } from './processes.ts';
import type { Tag } from './requests.ts';

export type JobStatus = 'InProgress' | 'Completed' | 'Failed' | 'Stopping' | 'Stopped';

export interface InstanceRecord {
  /** `algo-1` and so on: the instance's name within the job. */
  host: string;
  /** The process last launched for it; it may outlive the engine that launched it by a moment. */
  process?: ProcessMark;
  /** The Docker container that the process started, if it is one. */
  container?: string;
  /** Set when the container ended well; such an instance is not run again. */
  finished?: boolean;
}

/** Times are epoch seconds, as on the wire. */
export interface JobRecord<Request = object> {
  /** The request as it came, tags included. */
  request: Request;
  arn: string;
  status: JobStatus;
  creationTime: number;
  lastModifiedTime: number;
  startTime?: number;
  endTime?: number;
  failureReason?: string;
  exitMessage?: string;
  tags: Tag[];
  instances: InstanceRecord[];
  /** A fault to act out in place of the job. */
  fault?: string;
}

/** What the ARN ends in: the name, unique among its kind. */
export const nameOf = ({ arn }: { arn: string }) => arn.slice(arn.indexOf('/') + 1);

interface Kept {
  arn: string;
  lastModifiedTime: number;
}

/** Records of one kind (jobs, models) in a folder of their own, `<name>/job.json` each. */
export class Records<Kind extends Kept> {
  readonly #folder: string;
  readonly #records = new Map<string, Kind>();

  /** Reads every record under `folder`. */
  constructor(folder: string) {
    this.#folder = folder;
    mkdirSync(folder, { recursive: true });
    for (const entry of readdirSync(folder, { withFileTypes: true })) {
      if (!entry.isDirectory()) continue;
      try {
        this.#records.set(entry.name, JSON.parse(readFileSync(this.#path(entry.name), 'utf8')));
      } catch (error) {
        // A folder without a record is a job that was never answered for: its name is free.
        if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
      }
    }
  }

  #path(name: string): string {
    return join(this.#folder, name, 'job.json');
  }

  get(name: string): Kind | undefined {
    return this.#records.get(name);
  }

  all(): Kind[] {
    return [...this.#records.values()];
  }

  /** The record's own folder. */
  folder(record: Kind): string {
    return join(this.#folder, nameOf(record));
  }

  /** A job's folder for one instance, which its container sees as /opt/ml. */
  instanceFolder(record: Kind, host: string): string {
    return join(this.folder(record), host);
  }

  /** Puts the record on disk; returns when it is there. */
  save(record: Kind): void {
    const name = nameOf(record);
    record.lastModifiedTime = Date.now() / 1000;
    mkdirSync(this.folder(record), { recursive: true });
    const path = this.#path(name);
    writeFileSync(`${path}.tmp`, JSON.stringify(record, null, 2));
    renameSync(`${path}.tmp`, path);
    this.#records.set(name, record);
  }

  remove(record: Kind): void {
    rmSync(this.folder(record), { recursive: true, force: true });
    this.#records.delete(nameOf(record));
  }
}
