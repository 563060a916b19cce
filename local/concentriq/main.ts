/**
 * A Concentriq to try Slideway's catalogue with, on loopback:
 * `node local/concentriq/main.ts <content.json> [port]`, the file as `ConcentriqContent` in server.ts.
 */
import { readFileSync } from 'node:fs';
import { type ConcentriqContent, startConcentriq } from './server.ts';

const [path, port = '0'] = process.argv.slice(2);
if (path === undefined) {
  process.stderr.write('Usage: node local/concentriq/main.ts <content.json> [port]\n');
  process.exit(2);
}
const content = JSON.parse(readFileSync(path, 'utf8')) as ConcentriqContent;
const { url } = await startConcentriq(content, { port: Number(port) });
process.stdout.write(`${url}\n`);
