/** The reference model's package, which the container's own code builds; made anew when its sources change. */
import { existsSync } from 'node:fs';
import { mkdir, rename, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { BUILD, CONTAINER } from '../paths.ts';
import { type Screen, UserError } from '../terminal.ts';
import { CommandFailed, command } from './command.ts';
import { hashOf } from './package.ts';

const REFERENCE_MODEL = 'haematoxylin-area';
const SOURCES = [join('models', REFERENCE_MODEL), join('slideway_inference', 'reference_model.py')];

/** Builds the package where it is missing; answers the path of its model.tar.gz. */
export async function ensureModel(screen: Screen, python: string): Promise<string> {
  const folder = join(BUILD, 'models', `${REFERENCE_MODEL}-${hashOf(CONTAINER, SOURCES).slice(0, 12)}`);
  const path = join(folder, 'model.tar.gz');
  if (existsSync(path)) return path;
  const made = `${folder}.${process.pid}`;
  try {
    await mkdir(made, { recursive: true });
    await screen.task(`Building the reference model's package (${REFERENCE_MODEL})`, () =>
      command(python, ['-B', '-m', 'slideway_inference.reference_model', made], {
        env: { ...process.env, PYTHONPATH: CONTAINER },
      }),
    );
    await rm(folder, { recursive: true, force: true });
    await rename(made, folder);
  } catch (error) {
    if (!(error instanceof CommandFailed)) throw error;
    throw new UserError(
      `The reference model could not be built: ${error.tail.at(-1) ?? error.message}`,
      undefined,
      {
        cause: error,
      },
    );
  } finally {
    await rm(made, { recursive: true, force: true });
  }
  return path;
}
