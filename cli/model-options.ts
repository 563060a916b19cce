/** Options and help of `slideway model`; the commands themselves are loaded when they are called. */
import { type Command, InvalidArgumentError, Option } from 'commander';
import type { BuildOptions, CheckOptions, RegisterOptions } from './commands/model.ts';
import type { Streams } from './commands/run.ts';

interface Quiet {
  quiet?: boolean;
}

export interface ModelSession {
  signal: AbortSignal;
  end(code: number): void;
  streams(options: Quiet): Streams;
  /** Texts of options that other commands have, too. */
  texts: { state: string; stage: string; aws: string };
}

export const words = (text: string): string[] => {
  const list = text.split(',').map((word) => word.trim());
  if (list.some((word) => word === ''))
    throw new InvalidArgumentError('It must be words separated by commas.');
  return list;
};

export const number = (text: string): number => {
  const value = Number(text);
  if (text.trim() === '' || !Number.isFinite(value)) throw new InvalidArgumentError('It must be a number.');
  return value;
};

export const threeNumbers = (text: string): number[] => {
  const numbers = text.split(',').map(number);
  if (numbers.length !== 3) throw new InvalidArgumentError('It must be three numbers separated by commas.');
  return numbers;
};

export function addModelCommands(command: Command, { signal, end, streams, texts }: ModelSession): void {
  const model = command
    .command('model')
    .description('build, check and register model packages, and see what is registered')
    .addHelpText(
      'after',
      `
Examples:
  slideway model build tumour.pt --license proprietary --task classification --outputs normal,tumour --px 224 --mpp 0.5
  slideway model check tumour-0.1.0.tar.gz
  slideway model add tumour-0.1.0.tar.gz
  slideway model list
  slideway model show tumour`,
    );
  const commands = () => import('./commands/model.ts');

  model
    .command('build')
    .description('pack weights (model.pt, model.onnx) or a folder with code/inference.py into a model.tar.gz')
    .argument('<weights or folder>')
    .option(
      '--model-json <file>',
      'its description (default: model.json beside the weights); flags win over it',
    )
    .option('--name <name>', 'lower-case letters, digits, hyphens (default: from the file name)')
    .option('--version <version>', 'raise it for every change (default: 0.1.0)')
    .option('--license <text>', 'of the weights')
    .option('--description <text>', 'for people')
    .addOption(
      new Option('--task <task>', 'what it answers').choices(['classification', 'regression', 'embedding']),
    )
    .option('--outputs <names>', 'classes or quantities, in order, separated by commas', words)
    .option('--dimensions <n>', 'of an embedding', number)
    .option('--px <n>', 'pixels a side of a tile', number)
    .option('--mpp <µm>', 'µm per pixel at which it was trained', number)
    .option('--overlap <n>', 'pixels by which neighbouring tiles overlap (default: 0)', number)
    .option('--mean <r,g,b>', 'subtracted from pixels of 0 to 1 (default: 0,0,0)', threeNumbers)
    .option('--std <r,g,b>', 'what is divided by then (default: 1,1,1)', threeNumbers)
    .addOption(
      new Option('--mode <mode>', 'how it is run (default: processing)').choices(['processing', 'transform']),
    )
    .addOption(
      new Option('--encoding <format>', "of tiles in mode transform (default: the stage's)").choices([
        ...['jpeg', 'png', 'raw'],
      ]),
    )
    .option('--batch <n>', 'most tiles at once (default: 64)', number)
    .option('--aggregate <names>', 'columns of results.csv: mean, median, max, top_k_mean, p1 … p99', words)
    .option('--head <file>', 'TorchScript of the head that model.json describes (default: beside it)')
    .option('--out <file>', 'the package (default: <name>-<version>.tar.gz)')
    .option('--json', 'answer with JSON')
    .option('--quiet', 'no progress')
    .addHelpText(
      'after',
      `
The same content gives the same bytes. docs/models.md tells what model.json may say.

Examples:
  slideway model build tumour.pt --license proprietary --task classification --outputs normal,tumour --px 224 --mpp 0.5
  slideway model build features.onnx --license Apache-2.0 --dimensions 1024 --px 224 --mpp 0.5 --mode transform
  slideway model build my-model/ --version 1.1.0`,
    )
    .action(async (given: string, options: BuildOptions & Quiet) =>
      end(await (await commands()).build(given, options, streams(options), signal)),
    );

  model
    .command('check')
    .description('check a package: its model.json, that it loads, and that both modes give the same numbers')
    .argument('<model.tar.gz>')
    .option('--tiles <n>', 'generated tiles to run it on', number, 64)
    .option('--seconds <n>', 'at most, for each mode', number, 120)
    .option('--no-code', 'refuse code of the package, as a stage may')
    .option('--json', 'answer with JSON')
    .option('--quiet', 'no progress')
    .addHelpText(
      'after',
      '\nExit code 1: the package is no good; the answer says why.\n\nExample:\n  slideway model check tumour-0.1.0.tar.gz --json | jq .maxDifference',
    )
    .action(async (path: string, options: CheckOptions & Quiet) =>
      end(await (await commands()).check(path, options, streams(options), signal)),
    );

  model
    .command('add')
    .description('register packages; a version never changes')
    .argument('<model.tar.gz...>')
    .option('--state <folder>', texts.state)
    .option('--stage <stage>', texts.stage, 'dev')
    .option('--aws', texts.aws)
    .option('--json', 'answer with JSON')
    .option('--quiet', 'no progress')
    .addHelpText(
      'after',
      '\nThe same package again is fine; other content under a registered version is refused.\n\nExamples:\n  slideway model add tumour-0.1.0.tar.gz\n  slideway model add tumour-0.1.0.tar.gz --stage prod --aws',
    )
    .action(async (paths: string[], options: RegisterOptions & Quiet) =>
      end(await (await commands()).add(paths, options, streams(options), signal)),
    );

  model
    .command('list')
    .description('list what is registered, by name, the newest version first')
    .argument('[name]', 'of one model')
    .option('--state <folder>', texts.state)
    .option('--stage <stage>', texts.stage, 'dev')
    .option('--aws', texts.aws)
    .option('--json', 'answer with JSON')
    .addHelpText('after', '\nExample:\n  slideway model list --json | jq -r \'.[] | .name + "@" + .version\'')
    .action(async (name: string | undefined, options: RegisterOptions) =>
      end(await (await commands()).list(name, options, streams({}))),
    );

  model
    .command('show')
    .description('show a registered model: model.json, licence, digest, size, the latest runs that used it')
    .argument('<name[@version]>', 'without a version the newest')
    .option('--state <folder>', texts.state)
    .option('--stage <stage>', texts.stage, 'dev')
    .option('--aws', texts.aws)
    .option('--json', 'answer with JSON')
    .addHelpText('after', '\nExample:\n  slideway model show haematoxylin-area@1.0.0')
    .action(async (wanted: string, options: RegisterOptions) =>
      end(await (await commands()).show(wanted, options, streams({}))),
    );
}
