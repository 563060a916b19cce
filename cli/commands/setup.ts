/** `slideway setup`: makes what a machine lacks to run Slideway, and says so. Every other command calls it. */
import { performance } from 'node:perf_hooks';
import { venvFolder } from '../paths.ts';
import { ensureModel } from '../setup/model.ts';
import { ensurePackage } from '../setup/package.ts';
import { ensurePython, readyPython } from '../setup/python.ts';
import { duration, type Screen } from '../terminal.ts';

export interface SetupOptions {
  stage: string;
  /** With what the container's own tests need. */
  test?: boolean;
}

/** What setup made or found. */
export interface Ready {
  /** Interpreter of the environment that jobs run in. */
  python: string;
  /** Folder of the packaged deployment. */
  package: string;
  /** model.tar.gz of the reference model. */
  model: string;
}

export async function ensureReady(screen: Screen, { stage, test = false }: SetupOptions): Promise<Ready> {
  if (!readyPython({ test })) {
    screen.print('Setting up Slideway for this machine. This is done once.');
  }
  const python = await ensurePython(screen, { test });
  return {
    python,
    package: await ensurePackage(screen, stage),
    model: await ensureModel(screen, python),
  };
}

export async function setup(screen: Screen, options: SetupOptions): Promise<void> {
  const started = performance.now();
  await ensureReady(screen, options);
  screen.print(
    `Everything is in place (${duration((performance.now() - started) / 1000)}). Python: ${venvFolder()}`,
  );
  screen.print('Try it: npm run demo');
}
