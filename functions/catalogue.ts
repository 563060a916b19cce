/** The stage's catalogue as its functions get it: configuration from the environment, credentials from its secret. */
import { SecretsManagerClient } from '@aws-sdk/client-secrets-manager';
import type { Catalogue } from '../core/catalogue.ts';
import { Concentriq, readCredentials } from '../core/concentriq.ts';
import type { Limits } from '../core/concentriq-client.ts';
import { CatalogueMisconfigured } from '../core/errors.ts';

const secrets = new SecretsManagerClient({ maxAttempts: 5 });

/**
 * The catalogue, or `undefined` where the stage has none. Made for every invocation, so that a secret that was
 * changed is read anew. @throws {CatalogueMisconfigured}
 */
export function openCatalogue(limits: Partial<Limits> = {}): Catalogue | undefined {
  const { CATALOGUE_KIND, CATALOGUE_URL = '', CATALOGUE_SECRET_ARN = '', CATALOGUE_KEEP = '' } = process.env;
  if (!CATALOGUE_KIND || CATALOGUE_KIND === 'none') return undefined;
  if (CATALOGUE_KIND !== 'concentriq') {
    throw new CatalogueMisconfigured(
      `There is no kind of catalogue \`${CATALOGUE_KIND}\`: none or concentriq.`,
    );
  }
  return new Concentriq({
    url: CATALOGUE_URL,
    credentials: () => readCredentials(secrets, CATALOGUE_SECRET_ARN),
    keep: CATALOGUE_KEEP.split('|').filter((name) => name !== ''),
    limits,
  });
}
