import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { CommandFailed, command } from '../../cli/setup/command.ts';
import { hashOf } from '../../cli/setup/package.ts';
import { ensurePython, pipDetail, readyPython } from '../../cli/setup/python.ts';
import { Screen } from '../../cli/terminal.ts';

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'slideway-setup-'));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

const silent = () => new Screen({ write: () => true }, { quiet: true });

/** A program in `bin` that says what `script` makes it say. */
function program(bin: string, name: string, script: string): void {
  mkdirSync(bin, { recursive: true });
  writeFileSync(join(bin, name), `#!/bin/sh\n${script}\n`, { mode: 0o755 });
}

describe('A program that setup runs', () => {
  it('tells its lines as they come, standard output and error together', async () => {
    const heard: string[] = [];
    await command('sh', ['-c', 'echo one; echo two >&2'], { onLine: (line) => heard.push(line) });
    expect(heard.sort()).toEqual(['one', 'two']);
  });

  it('that fails leaves its last lines in the error', async () => {
    const failure = await command('sh', ['-c', 'seq 100; exit 3']).catch((error: unknown) => error);
    expect(failure).toBeInstanceOf(CommandFailed);
    expect((failure as CommandFailed).message).toBe('sh ended with code 3');
    expect((failure as CommandFailed).tail.at(-1)).toBe('100');
    expect((failure as CommandFailed).tail.length).toBeLessThan(100);
  });

  it('that is not there is named', async () => {
    await expect(command(join(folder, 'nothing'), [])).rejects.toThrow(/nothing could not be started/);
  });
});

describe('What pip is at', () => {
  it.each([
    ['Collecting torch==2.13.0', 'torch==2.13.0'],
    [
      '  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (526.0 MB)',
      'loading torch 2.13.0 (526.0 MB)',
    ],
    ['  Downloading torch-2.13.0-cp311.whl.metadata (30 kB)', 'loading torch 2.13.0 (30 kB)'],
    ['Installing collected packages: a, b', 'unpacking'],
    ['Requirement already satisfied: pip', undefined],
  ])('is read from %j', (line, detail) => expect(pipDetail(line)).toBe(detail));
});

describe('The hash of sources', () => {
  const write = (path: string, text: string) => {
    mkdirSync(join(folder, path, '..'), { recursive: true });
    writeFileSync(join(folder, path), text);
  };

  it('changes with a file’s content, its name, and a file that comes or goes', () => {
    write('core/a.ts', '1');
    write('one.json', '{}');
    const hash = () => hashOf(folder, ['one.json', 'core', 'absent']);
    const first = hash();
    expect(hash()).toBe(first);
    write('core/a.ts', '2');
    const second = hash();
    write('core/deep/b.ts', '');
    const third = hash();
    rmSync(join(folder, 'core/deep/b.ts'));
    expect(hash()).toBe(second);
    expect(new Set([first, second, third]).size).toBe(3);
  });
});

describe('The Python environment', () => {
  const venv = () => join(folder, 'venv');
  const env = (more: NodeJS.ProcessEnv = {}) => ({ ...process.env, SLIDEWAY_VENV: venv(), ...more });

  it('is not ready where there is none', () => {
    expect(readyPython({ env: env() })).toBeUndefined();
  });

  it('is not ready when a setup was broken off', () => {
    program(join(venv(), 'bin'), 'python', 'exit 0');
    const marker = { complete: false, hash: '', test: false, source: 'index' };
    writeFileSync(join(venv(), 'slideway-setup.json'), JSON.stringify(marker));
    expect(readyPython({ env: env() })).toBeUndefined();
  });

  it('is not ready when what it was made from has changed', () => {
    program(join(venv(), 'bin'), 'python', 'exit 0');
    const marker = { complete: true, hash: 'of other requirements', test: true, source: 'index' };
    writeFileSync(join(venv(), 'slideway-setup.json'), JSON.stringify(marker));
    expect(readyPython({ env: env() })).toBeUndefined();
  });

  it('that somebody else made is taken when it has everything, and then known without being started', async () => {
    program(join(venv(), 'bin'), 'python', 'exit 0');
    const python = await ensurePython(silent(), { env: env() });
    expect(python).toBe(join(venv(), 'bin', 'python'));
    expect(readyPython({ env: env() })).toBe(python);
    expect(readyPython({ env: env(), test: true })).toBeUndefined();
  });

  it('that somebody else made and lacks something is refused by what it lacks, and left as it is', async () => {
    program(join(venv(), 'bin'), 'python', `echo "ModuleNotFoundError: No module named 'torch'"; exit 1`);
    await expect(ensurePython(silent(), { env: env() })).rejects.toThrow(
      /not made by Slideway .* No module named 'torch'.*SLIDEWAY_VENV/,
    );
    expect(readdirSync(venv())).toEqual(['bin']);
  });

  it('is not made in a folder that holds other things', async () => {
    mkdirSync(venv());
    writeFileSync(join(venv(), 'thesis.txt'), 'years of work');
    await expect(ensurePython(silent(), { env: env() })).rejects.toThrow(/is no Python environment/);
    expect(readdirSync(venv())).toEqual(['thesis.txt']);
  });

  it('leaves nothing behind when no package can be had, and says what to do', async () => {
    const bin = join(folder, 'bin');
    // A Python that makes environments, but whose pip reaches nothing, as does apt.
    const fake = `case "$*" in *version_info*) echo 3.13;; *"-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python";; *tomllib*) echo '{"runtime":["numpy"],"test":[]}';; *) echo "ERROR: No matching distribution found for pillow"; exit 1;; esac`;
    program(bin, 'python', fake);
    program(bin, 'dpkg-query', 'exit 1');
    program(bin, 'apt-get', 'echo "E: Unable to locate package python3-torch"; exit 100');
    const failure = await ensurePython(silent(), {
      env: env({ PATH: `${bin}:/bin:/usr/bin` }),
      interpreters: [join(bin, 'python')],
    }).catch((error: unknown) => error);
    expect(String(failure)).toMatch(
      /package index cannot be reached \(No matching distribution found for pillow\)/,
    );
    expect(String(failure)).toMatch(/PIP_INDEX_URL/);
    expect(existsSync(venv())).toBe(false);
  });

  it('asks for a newer Python, naming the old ones', async () => {
    const old = join(folder, 'python3');
    program(folder, 'python3', 'echo 3.9');
    const result = ensurePython(silent(), { env: env(), interpreters: [join(folder, 'none'), old] });
    await expect(result).rejects.toThrow(/^Python 3\.11 or newer was not found \(.*python3 is 3\.9\)/);
    expect(existsSync(venv())).toBe(false);
  });
});
