import { defineConfig } from 'vitest/config';
import { BaseSequencer, type TestSpecification } from 'vitest/node';

/** Folders whose files take minutes: they begin first, so that none of them is left alone at the end. */
const LONG = ['test/faults/', 'test/e2e/', 'test/docs/', 'test/cli/'];

const rank = ({ moduleId }: TestSpecification) => {
  const place = LONG.findIndex((folder) => moduleId.includes(folder));
  return place < 0 ? LONG.length : place;
};

class LongFirst extends BaseSequencer {
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    return (await super.sort(files)).sort((a, b) => rank(a) - rank(b));
  }
}

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    testTimeout: 60_000,
    hookTimeout: 120_000,
    pool: 'forks',
    maxWorkers: 2,
    sequence: { sequencer: LongFirst },
  },
});
