/** What follows from an instance's type for the jobs that run on it. */

/** SageMaker takes requests under way times their payload up to this, in MB. */
export const MOST_IN_FLIGHT_MB = 100;

/**
 * Virtual processors of an instance type, from its size: AWS gives `large` 2, `xlarge` 4, and `<n>xlarge` 4n in every
 * family that SageMaker has. 1 for what is none of these.
 */
export function processorsOf(instanceType: string): number {
  const size = instanceType.split('.').at(-1) ?? '';
  if (size === 'large') return 2;
  const [, times = '1'] = /^(\d*)xlarge$/.exec(size) ?? [];
  return size.endsWith('xlarge') ? 4 * Number(times || 1) : 1;
}

/**
 * Requests that a server on such an instance works at once: one per processor, because each has a pack to decode while
 * the model is busy with another, as far as the payload leaves room.
 */
export function concurrencyOf(instanceType: string, payloadMb: number): number {
  return Math.max(1, Math.min(processorsOf(instanceType), Math.floor(MOST_IN_FLIGHT_MB / payloadMb)));
}
