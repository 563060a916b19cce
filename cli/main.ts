/**
 * The `slideway` command: options and help, and what a person sees when something goes wrong. Each command is loaded
 * when it is called, so that help and a setup that is done answer at once.
 */
import { enableCompileCache } from 'node:module';
import { join } from 'node:path';
import { Command, CommanderError, InvalidArgumentError } from 'commander';
import type { DeadLetterOptions } from './commands/dead-letters.ts';
import type { DemoOptions } from './commands/demo.ts';
import type { ReconcileOptions } from './commands/reconcile.ts';
import type { ReplayOptions } from './commands/replay.ts';
import type { RunOptions, Streams } from './commands/run.ts';
import type { SetupOptions } from './commands/setup.ts';
import type { ShowOptions } from './commands/show.ts';
import type { VerifyOptions } from './commands/verify.ts';
import { addModelCommands } from './model-options.ts';
import { BUILD, projectVersion } from './paths.ts';
import { EXIT, Screen, UserError, usageError } from './terminal.ts';

interface Common {
  quiet?: boolean;
}

interface DeadLetters {
  deadLetters?: boolean;
}

const STATE = 'folder of the local AWS (default: .slideway in the project, or $SLIDEWAY_STATE)';
const STAGE = 'stage whose settings are used';
const AWS = 'work with the stack of the stage on AWS, with your AWS settings, in place of the local AWS';
const OUT = 'folder for the results (default: slideway-results/<run id>)';

export function positiveInteger(text: string): number {
  const value = Number(text);
  if (!Number.isInteger(value) || value < 1 || value > 1000) {
    throw new InvalidArgumentError('It must be a whole number from 1 to 1000.');
  }
  return value;
}

export function pixelSize(text: string): string {
  const [, width, height] = /^(\d{3,6})x(\d{3,6})$/i.exec(text) ?? [];
  const sides = [Number(width), Number(height)];
  if (!sides.every((side) => side >= 512 && side <= 131_072)) {
    throw new InvalidArgumentError(
      'It must be <width>x<height> with sides of 512 to 131072, such as 8192x6144.',
    );
  }
  return `${sides[0]}x${sides[1]}`;
}

/** What a command shares with who started it. */
export interface Session {
  /** Takes the exit code. */
  end(code: number): void;
  /** Aborted when the command is to stop. */
  signal: AbortSignal;
  /** Where progress is shown just now. */
  screen: Screen;
}

/** Builds the command line. */
export function program(session: Session): Command {
  const { signal } = session;
  const end = (code: number) => session.end(code);
  const streams = (options: Common): Streams => {
    session.screen = new Screen(process.stderr, { quiet: options.quiet ?? false });
    return {
      screen: session.screen,
      answer: new Screen(process.stdout),
      width: process.stdout.columns ?? 120,
    };
  };
  const command = new Command('slideway')
    .description('Whole-slide images through AI models to slide-level results, on this machine as on AWS.')
    .version(projectVersion(), '--version')
    // A command's own --version is its own.
    .enablePositionalOptions()
    .showHelpAfterError('(--help tells more)')
    .exitOverride()
    .addHelpText(
      'after',
      `
Examples:
  slideway demo                           try it with drawn slides
  slideway run /data/breast-2026          a folder of slides, with or without a repo.csv
  slideway run /data/breast-2026 --model my-model.tar.gz
  slideway model build my-model.pt --help   your own model, packed
  slideway runs                           what has run
  slideway show breast-2026-1f              one run, by the beginning of its id

Exit codes: 0 done, 1 failed, 2 wrong use, 3 done but not for every slide, 130 stopped.
Environment: SLIDEWAY_STATE, SLIDEWAY_VENV, SLIDEWAY_DEBUG=1 (stack traces), NO_COLOR.`,
    );

  command
    .command('setup')
    .description(
      'make what is missing on this machine: Python environment, packaged deployment, reference model',
    )
    .option('--stage <stage>', 'stage to package', 'dev')
    .option('--test', 'with what the tests of the container need')
    .addHelpText(
      'after',
      `
Python packages come from pip's index; where none is reachable, from Debian's own packages. pip's settings hold:
PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS. SLIDEWAY_VENV names another folder for the environment.

Example:
  SLIDEWAY_VENV=/scratch/slideway-venv slideway setup`,
    )
    .action(async (options: SetupOptions) => {
      const { setup } = await import('./commands/setup.ts');
      await setup(new Screen(process.stdout), options);
      end(EXIT.succeeded);
    });

  command
    .command('demo')
    .description('draw slides that look like H&E and run the reference model over them')
    .option('--slides <n>', 'how many', positiveInteger, 3)
    .option('--size <WxH>', 'their size in pixels, at 0.5 µm each', pixelSize, '8192x6144')
    .option('--out <folder>', OUT)
    .option('--state <folder>', STATE)
    .option('--stage <stage>', STAGE, 'dev')
    .option('--new', 'run again, although nothing has changed')
    .option('--json', 'answer with JSON')
    .option('--quiet', 'no progress')
    .addHelpText('after', '\nExample:\n  slideway demo --slides 2 --size 4096x4096 --out demo-results')
    .action(async (options: DemoOptions & Common) => {
      const { demo } = await import('./commands/demo.ts');
      end(await demo(options, streams(options), signal));
    });

  command
    .command('run')
    .description('run slides: a folder, or the repo.csv in it')
    .argument('<folder or repo.csv>')
    .option('--model <package or name>', 'model.tar.gz, or name[@version], for rows that name no model')
    .option('--out <folder>', OUT)
    .option('--state <folder>', STATE)
    .option('--study <name>', "the study's name (default: the folder's)")
    .option('--stage <stage>', STAGE, 'dev')
    .option('--aws', AWS)
    .option('--new', 'run again, although nothing has changed')
    .option('--json', 'answer with JSON')
    .option('--quiet', 'no progress')
    .addHelpText(
      'after',
      `
Only files that repo.csv names and that have changed are uploaded. The same command again goes on with a run that was
stopped, or shows its results. Ctrl-C stops in order; a second one at once.

Examples:
  slideway run /data/breast-2026
  slideway run /data/breast-2026/repo.csv --model haematoxylin-area@1.0.0 --out results
  slideway run /data/breast-2026 --json --quiet | jq .run.state`,
    )
    .action(async (given: string, options: RunOptions & Common) => {
      const { run } = await import('./commands/run.ts');
      end(await run(given, options, streams(options), signal));
    });

  command
    .command('runs')
    .description('list what has run')
    .option('--state <folder>', STATE)
    .option('--stage <stage>', STAGE, 'dev')
    .option('--aws', AWS)
    .option('--json', 'answer with JSON')
    .addHelpText('after', '\nExample:\n  slideway runs --json | jq -r .[].runId')
    .action(async (options: ShowOptions) => {
      const { showRuns } = await import('./commands/show.ts');
      end(await showRuns(options, streams({})));
    });

  command
    .command('show')
    .description('show a run: slides with state, reason and what to do, jobs, cost')
    .argument('<run id>', 'or the beginning of it')
    .option('--state <folder>', STATE)
    .option('--stage <stage>', STAGE, 'dev')
    .option('--aws', AWS)
    .option('--json', 'answer with JSON')
    .addHelpText('after', '\nExample:\n  slideway show demo-1f')
    .action(async (id: string, options: ShowOptions) => {
      const { showRun } = await import('./commands/show.ts');
      end(await showRun(id, options, streams({})));
    });

  command
    .command('trace')
    .description('trace a result back to Landing: bytes, versions, parameters, digests, who and when')
    .argument('<what>', 'key in Silver, slide id, or run id')
    .option('--state <folder>', STATE)
    .option('--stage <stage>', STAGE, 'dev')
    .option('--aws', AWS)
    .option('--json', 'answer with JSON')
    .addHelpText(
      'after',
      '\nExit code 3: a link is not on record.\n\nExample:\n  slideway trace slide-17 --json',
    )
    .action(async (what: string, options: ShowOptions) => {
      const { traceCommand } = await import('./commands/trace.ts');
      end(await traceCommand(what, options, streams({})));
    });

  command
    .command('verify')
    .description('verify the record and all that it points at; names the first broken link')
    .argument('[what]', 'slide id, run id or key in Silver (default: everything)')
    .option('--all', 'everything')
    .option('--anchor <date>', 'hold the record against the anchor of this day (default: the newest)')
    .option('--state <folder>', STATE)
    .option('--stage <stage>', STAGE, 'dev')
    .option('--aws', AWS)
    .option('--json', 'answer with JSON')
    .option('--quiet', 'no progress')
    .addHelpText(
      'after',
      '\nExit code 1: something is not as it was written.\n\nExample:\n  slideway verify --all --json | jq .findings',
    )
    .action(async (what: string | undefined, options: VerifyOptions & Common) => {
      const { verifyCommand } = await import('./commands/verify.ts');
      end(await verifyCommand(what, options, streams(options), signal));
    });

  command
    .command('reconcile')
    .description('hold manifests, states, Landing, Bronze and Silver of a study against each other')
    .argument('<study>')
    .option('--stuck-after <hours>', 'a slide that has not moved for so long is stuck', positiveInteger, 24)
    .option('--state <folder>', STATE)
    .option('--stage <stage>', STAGE, 'dev')
    .option('--aws', AWS)
    .option('--json', 'answer with JSON')
    .option('--quiet', 'no progress')
    .addHelpText(
      'after',
      '\nExit code 3: not everything is in order.\n\nExample:\n  slideway reconcile breast-2026',
    )
    .action(async (study: string, options: ReconcileOptions & Common) => {
      const { reconcileCommand } = await import('./commands/reconcile.ts');
      end(await reconcileCommand(study, options, streams(options), signal));
    });

  command
    .command('replay')
    .description('run again what did not succeed, or with another model; or deliver dead letters again')
    .argument('[run id]', 'or the beginning of it')
    .option('--failed', 'the slides without results; what is done when nothing else is asked for')
    .option('--slide <id>', 'this slide')
    .option('--model <package or name>', 'with this model; without --failed, every slide that was taken in')
    .option('--dead-letters', 'deliver again what lies in the dead-letter queues')
    .option('--list', 'of the dead letters: only show them')
    .option('--out <folder>', OUT)
    .option('--state <folder>', STATE)
    .option('--stage <stage>', STAGE, 'dev')
    .option('--aws', AWS)
    .option('--json', 'answer with JSON')
    .option('--quiet', 'no progress')
    .addHelpText(
      'after',
      `
A replay is a run of its own that names the run it follows; slides that are in Bronze are not copied again.

Examples:
  slideway replay breast-2026-1f --failed
  slideway replay breast-2026-1f --model my-model.tar.gz
  slideway replay --dead-letters --list`,
    )
    .action(
      async (id: string | undefined, options: ReplayOptions & DeadLetterOptions & Common & DeadLetters) => {
        if ((id === undefined) !== (options.deadLetters === true)) {
          throw usageError('Give the id of a run, or --dead-letters.');
        }
        if (id === undefined) {
          const { deadLetters } = await import('./commands/dead-letters.ts');
          end(await deadLetters(options, streams(options), signal));
        } else {
          const { replay } = await import('./commands/replay.ts');
          end(await replay(id, options, streams(options), signal));
        }
      },
    );
  addModelCommands(command, { signal, end, streams, texts: { state: STATE, stage: STAGE, aws: AWS } });
  return command;
}

/** The exit code of an error, which has been told. */
export function tell(error: unknown, screen: Screen): number {
  screen.clear();
  if (error instanceof CommanderError) return error.exitCode === 0 ? EXIT.succeeded : EXIT.usage;
  if (process.env.SLIDEWAY_DEBUG === '1') console.error(error);
  else screen.warn(`slideway: ${error instanceof Error ? error.message : String(error)}`);
  return error instanceof UserError ? error.exitCode : EXIT.failed;
}

async function main(): Promise<void> {
  // Half of a short command's time goes to compiling what it is made of.
  enableCompileCache(join(BUILD, 'compile-cache'));
  // Whoever reads the output may have read enough (`| head`); the work itself goes on to its end.
  for (const stream of [process.stdout, process.stderr]) {
    stream.on('error', (error: NodeJS.ErrnoException) => {
      if (error.code !== 'EPIPE') throw error;
    });
  }
  const stop = new AbortController();
  let code: number = EXIT.succeeded;
  const session: Session = {
    end: (ended) => {
      code = ended;
    },
    signal: stop.signal,
    screen: new Screen(process.stderr),
  };
  process.on('SIGINT', () => {
    if (stop.signal.aborted) {
      session.screen.clear();
      process.exit(EXIT.interrupted);
    }
    session.screen.warn('Stopping … (Ctrl-C again stops at once)');
    stop.abort();
  });
  process.on('SIGTERM', () => stop.abort());
  try {
    await program(session).parseAsync();
  } catch (error) {
    code = stop.signal.aborted ? EXIT.interrupted : tell(error, session.screen);
  }
  // What a library leaves open must not keep a command from ending.
  process.stdout.write('', () => process.exit(code));
}

if (import.meta.main) await main();
