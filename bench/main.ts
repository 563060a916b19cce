/** `npm run bench -- [name …]`: measures, and shows a table for people or writes JSON for programs. */
import { writeFile } from 'node:fs/promises';
import { arch, availableParallelism, cpus, platform, release, totalmem } from 'node:os';
import { parseArgs } from 'node:util';
import { table } from '../cli/table.ts';
import { EXIT, Screen, UserError, usageError } from '../cli/terminal.ts';
import type { Bench, Measured } from './bench.ts';
import { ingestion } from './ingestion.ts';
import { localS3 } from './local-s3.ts';
import { reading } from './reading.ts';
import { run } from './run.ts';
import { serving } from './serving.ts';
import { tiling } from './tiling.ts';
import { transform } from './transform.ts';

const BENCHES: Bench[] = [run, reading, tiling, serving, transform, ingestion, localS3];

const HELP = `Measures Slideway on this machine.

  npm run bench -- [name …] [--json <file>] [--quick]

  --list         what there is
  --json <file>  the numbers as JSON; - for standard output
  --quick        small and quick, to see that the benches work; the figures mean little

Without names all are run. Ratios are of two things measured in the same run. bench/README.md tells what each
measures and how to read it.

Example:
  npm run bench -- reading --json reading.json`;

const machine = () => ({
  processor: cpus()[0]?.model.trim() ?? 'unknown',
  processors: availableParallelism(),
  memoryGb: Math.round(totalmem() / 1e9),
  system: `${platform()} ${release()} ${arch()}`,
  node: process.version,
  measuredAt: new Date().toISOString(),
});

function chosen(names: string[]): Bench[] {
  if (names.length === 0) return BENCHES;
  return names.map((name) => {
    const found = BENCHES.find((bench) => bench.name === name);
    if (!found)
      throw usageError(`There is no bench ${name}; there are ${BENCHES.map((b) => b.name).join(', ')}.`);
    return found;
  });
}

function show({ figures, ratios }: Measured, { about, name }: Bench, answer: Screen): void {
  const number = (value: number) => value.toLocaleString('en', { maximumSignificantDigits: 4 });
  const rows = (values: Record<string, number>) =>
    Object.entries(values).map(([key, value]) => ({ cells: [key, number(value)] }));
  const draw = (title: string, values: Record<string, number>) => {
    const columns = [{ title }, { title: '', align: 'right' as const }];
    for (const line of table(columns, rows(values), answer.paint, 100)) answer.print(line);
    answer.print();
  };
  answer.print(`${answer.paint('bold', name)}: ${about}`);
  answer.print();
  draw('figure', figures);
  draw('ratio', ratios);
}

async function main(): Promise<number> {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      json: { type: 'string' },
      quick: { type: 'boolean', default: false },
      list: { type: 'boolean', default: false },
      help: { type: 'boolean', short: 'h', default: false },
    },
  });
  const answer = new Screen(process.stdout);
  if (values.help) {
    answer.print(HELP);
    return EXIT.succeeded;
  }
  if (values.list) {
    for (const { name, about } of BENCHES) answer.print(`${name.padEnd(10)} ${about}`);
    return EXIT.succeeded;
  }
  const stop = new AbortController();
  process.once('SIGINT', () => stop.abort());
  const context = { screen: new Screen(process.stderr), quick: values.quick, signal: stop.signal };
  const results = [];
  for (const bench of chosen(positionals)) {
    const measured = await bench.measure(context);
    results.push({ name: bench.name, ...measured, machine: machine() });
    if (values.json !== '-') show(measured, bench, answer);
  }
  const document = `${JSON.stringify(results, null, 2)}\n`;
  if (values.json === '-') answer.print(document.trimEnd());
  else if (values.json) await writeFile(values.json, document);
  return EXIT.succeeded;
}

const code = await main().catch((error: unknown) => {
  if (process.env.SLIDEWAY_DEBUG === '1') console.error(error);
  else new Screen(process.stderr).warn(`bench: ${error instanceof Error ? error.message : String(error)}`);
  return error instanceof UserError ? error.exitCode : EXIT.failed;
});
process.exit(code);
