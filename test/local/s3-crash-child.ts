/** A local S3 in a process of its own, to be killed: prints its endpoint, appends each delivered event to a file. */
import { appendFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { startS3 } from './s3-server.ts';

const [folder = '', log = ''] = process.argv.slice(2);
const s3 = await startS3(folder, async (event) => {
  // Time enough to be killed between the commit and the acknowledgement.
  await sleep(15);
  appendFileSync(log, `${event.key} ${event.etag}\n`);
});
await s3.service.createBucket('crash-bucket', { versioning: false, eventBridge: true });
process.stdout.write(`${s3.endpoint}\n`);
