import { execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { expect, it } from 'vitest';
import model from '../../local/sagemaker/model.json' with { type: 'json' };

const root = join(import.meta.dirname, '..', '..');
const python = resolve(root, process.env.SLIDEWAY_VENV ?? '.venv', 'bin', 'python');
const program = `
import json, sys
sys.path.insert(0, "local/sagemaker")
import generate_model
print(json.dumps(generate_model.model()))
`;

function botocoreVersion(): string | null {
  if (!existsSync(python)) return null;
  try {
    return execFileSync(python, ['-c', 'import botocore; print(botocore.__version__)'], {
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'ignore'],
    }).trim();
  } catch {
    return null;
  }
}

// Another version may say something else with good reason.
it.skipIf(botocoreVersion() !== model.botocore)('model.json is what its botocore says', () => {
  const said = execFileSync(python, ['-c', program], { cwd: root, encoding: 'utf8', maxBuffer: 1 << 26 });
  expect(model).toEqual(JSON.parse(said));
});
