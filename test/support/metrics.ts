/** The metrics that a function writes into its log, in CloudWatch's embedded metric format. */

interface Embedded {
  _aws: { CloudWatchMetrics: { Namespace: string; Dimensions: string[][]; Metrics: { Name: string }[] }[] };
}

/** What `work` answers, and the metrics it emits meanwhile: `<name> <dimension>=<value> …` → value. */
export async function emittedBy<T>(
  work: () => Promise<T>,
): Promise<{ answer: T; metrics: Record<string, number> }> {
  const lines: string[] = [];
  const write = process.stdout.write;
  process.stdout.write = (chunk: string | Uint8Array) => {
    lines.push(String(chunk));
    return true;
  };
  try {
    const answer = await work();
    return { answer, metrics: metricsOf(lines.join('').split('\n')) };
  } finally {
    process.stdout.write = write;
  }
}

function metricsOf(lines: string[]): Record<string, number> {
  const found: Record<string, number> = {};
  for (const line of lines.filter((text) => text.includes('"CloudWatchMetrics"'))) {
    const document = JSON.parse(line) as Embedded & Record<string, number | string>;
    for (const { Namespace, Dimensions, Metrics } of document._aws.CloudWatchMetrics) {
      if (Namespace !== 'Slideway') throw new Error(`Metrics of the namespace ${Namespace}`);
      for (const names of Dimensions) {
        const by = names.map((name) => `${name}=${document[name]}`).join(' ');
        for (const { Name } of Metrics) found[`${Name} ${by}`] = Number(document[Name]);
      }
    }
  }
  return found;
}
