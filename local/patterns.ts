/**
 * EventBridge's event patterns: compiled once, so that an operator which is not known is refused when the rule is
 * loaded and not when an event fails to match.
 */
import { UnsupportedLocally } from './types.ts';

/** Whether an event matches. */
export type Pattern = (event: unknown) => boolean;

/** Whether one value of the event matches; `undefined` when the field is not there. */
type Test = (value: unknown) => boolean;

type Fields = Record<string, unknown>;

/** Compiles a pattern. Throws {@link UnsupportedLocally} for an operator that is not known. */
export function compilePattern(pattern: unknown, where: string): Pattern {
  if (!isFields(pattern)) throw new UnsupportedLocally('a pattern that is not an object', where);
  const tests = Object.entries(pattern).map(([name, expected]): Pattern => {
    if (name === '$or') {
      if (!Array.isArray(expected)) throw new UnsupportedLocally('$or without a list', where);
      const alternatives = expected.map((alternative) => compilePattern(alternative, where));
      return (event) => alternatives.some((alternative) => alternative(event));
    }
    if (isFields(expected)) {
      const inner = compilePattern(expected, where);
      return (event) => inner(isFields(event) ? event[name] : undefined);
    }
    if (!Array.isArray(expected) || expected.length === 0) {
      throw new UnsupportedLocally(`${name}: a value that is not in a list`, where);
    }
    const alternatives = expected.map((each) => compileTest(each, where));
    return (event) => {
      const value = isFields(event) ? event[name] : undefined;
      // A list in the event matches when any of its elements does.
      const values = Array.isArray(value) && value.length > 0 ? value : [value];
      return alternatives.some((test) => values.some(test));
    };
  });
  return (event) => tests.every((test) => test(event));
}

function compileTest(expected: unknown, where: string): Test {
  if (!isFields(expected)) return (value) => value !== undefined && value === expected;
  const [[operator, argument] = ['', undefined], ...more] = Object.entries(expected);
  if (more.length > 0)
    throw new UnsupportedLocally(`several operators in one: ${JSON.stringify(expected)}`, where);
  switch (operator) {
    case 'exists':
      return (value) => (value !== undefined) === (argument === true);
    case 'numeric':
      return compileNumeric(argument, where);
    case 'anything-but':
      return compileAnythingBut(argument, where);
    default:
      return compileText(operator, argument, where);
  }
}

/** Operators on text; `prefix` and `suffix` may ignore case. */
function compileText(operator: string, argument: unknown, where: string): Test {
  const ignoring = isFields(argument) ? argument['equals-ignore-case'] : undefined;
  const wanted = typeof ignoring === 'string' ? ignoring.toLowerCase() : argument;
  if (typeof wanted !== 'string') {
    throw new UnsupportedLocally(`pattern operator ${JSON.stringify({ [operator]: argument })}`, where);
  }
  const read = (value: unknown): string | undefined =>
    typeof value !== 'string' ? undefined : typeof ignoring === 'string' ? value.toLowerCase() : value;
  switch (operator) {
    case 'prefix':
      return (value) => read(value)?.startsWith(wanted) ?? false;
    case 'suffix':
      return (value) => read(value)?.endsWith(wanted) ?? false;
    case 'equals-ignore-case':
      return (value) => typeof value === 'string' && value.toLowerCase() === wanted.toLowerCase();
    case 'wildcard': {
      const source = wanted
        .split('*')
        .map((literal) => literal.replace(/[\\^$.+?()|[\]{}]/g, '\\$&'))
        .join('[^]*');
      const pattern = new RegExp(`^${source}$`);
      return (value) => typeof value === 'string' && pattern.test(value);
    }
    default:
      throw new UnsupportedLocally(`pattern operator ${operator}`, where);
  }
}

/** `[">", 0, "<=", 5]` */
function compileNumeric(argument: unknown, where: string): Test {
  if (!Array.isArray(argument) || argument.length === 0 || argument.length % 2 === 1) {
    throw new UnsupportedLocally(`numeric ${JSON.stringify(argument)}`, where);
  }
  const comparisons: ((value: number) => boolean)[] = [];
  for (let i = 0; i < argument.length; i += 2) {
    const bound: unknown = argument[i + 1];
    const compare = COMPARISONS[String(argument[i])];
    if (compare === undefined || typeof bound !== 'number') {
      throw new UnsupportedLocally(`numeric ${JSON.stringify(argument)}`, where);
    }
    comparisons.push((value) => compare(value, bound));
  }
  return (value) => typeof value === 'number' && comparisons.every((holds) => holds(value));
}

const COMPARISONS: Record<string, (value: number, bound: number) => boolean> = {
  '=': (value, bound) => value === bound,
  '<': (value, bound) => value < bound,
  '<=': (value, bound) => value <= bound,
  '>': (value, bound) => value > bound,
  '>=': (value, bound) => value >= bound,
};

/** A field must be there to be anything but something. */
function compileAnythingBut(argument: unknown, where: string): Test {
  if (isFields(argument)) {
    const [[operator, values] = ['', undefined], ...more] = Object.entries(argument);
    if (more.length > 0 || values === undefined) {
      throw new UnsupportedLocally(`anything-but ${JSON.stringify(argument)}`, where);
    }
    const tests = [values].flat().map((value) => compileText(operator, value, where));
    return (value) => value !== undefined && !tests.some((test) => test(value));
  }
  const excluded = [argument].flat();
  if (excluded.some((each) => typeof each !== 'string' && typeof each !== 'number')) {
    throw new UnsupportedLocally(`anything-but ${JSON.stringify(argument)}`, where);
  }
  return (value) => value !== undefined && !excluded.includes(value as string | number);
}

/** `$.a.b[0]`: the one kind of path that targets use. */
export function readPath(value: unknown, path: string, where: string): unknown {
  if (!/^\$(\.[A-Za-z0-9_-]+|\[\d+\])*$/.test(path)) throw new UnsupportedLocally(`path ${path}`, where);
  const steps = path.match(/[A-Za-z0-9_-]+/g) ?? [];
  return steps.reduce<unknown>((inner, step) => {
    if (Array.isArray(inner)) return inner[Number(step)];
    return isFields(inner) ? inner[step] : undefined;
  }, value);
}

function isFields(value: unknown): value is Fields {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}
