/**
 * The errors of Slideway. A class's name is what the state machine retries on, what stands in `reason.error`,
 * and what the docs explain; its message says what is wrong and what to do.
 */
import type { Reason } from './contracts.ts';

export class SlidewayError extends Error {
  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = new.target.name;
  }
}

/** AWS asked to slow down; the state machine tries again, for long. */
export class Throttled extends SlidewayError {}
/** A service failed or could not be reached; the state machine tries again, for a while. */
export class ServiceUnavailable extends SlidewayError {}

/** The event is not an S3 "Object Created" of a manifest inside a study's folder. */
export class ManifestMisplaced extends SlidewayError {}
/** The object under the manifest's key is not a manifest at all. */
export class ManifestInvalid extends SlidewayError {}
/** The manifest version that the event names is no longer there. */
export class ManifestGone extends SlidewayError {}
/** More models in one run than it may have. */
export class TooManyModels extends SlidewayError {}

/** A run that is to be followed is not in the state table. */
export class RunNotFound extends SlidewayError {}
/** The manifest of a follow-up run would overwrite another. */
export class FollowUpTaken extends SlidewayError {}
/** Runs for slides that came late could not be started; the next sweep tries again. */
export class FollowUpsFailed extends SlidewayError {}

/** No package is registered under that name and version. */
export class ModelNotFound extends SlidewayError {}
/** A package that cannot be read, or whose model.json breaks the schema. */
export class ModelPackageInvalid extends SlidewayError {}
/** A package that brings code of its own, where the stage runs none. */
export class ModelFormatNotSupported extends ModelPackageInvalid {}
/** The package that a run pinned is not the one that lies in the bucket. */
export class ModelDigestMismatch extends SlidewayError {}
/** A pack is larger than one request to a Transform job may be. */
export class PackTooLarge extends SlidewayError {}

/** The catalogue could not be reached, or failed again and again. */
export class CatalogueUnavailable extends SlidewayError {}
/** The catalogue does not take our credentials, or grants them too little. */
export class CatalogueRefused extends SlidewayError {}
/** The catalogue answered, but not as the catalogue that it should be. */
export class CatalogueInvalid extends SlidewayError {}
/** The catalogue has no such thing. */
export class CatalogueNotFound extends SlidewayError {}
/** The stage's configuration of the catalogue, or its secret, cannot be used. */
export class CatalogueMisconfigured extends SlidewayError {}

/** A slide's file changed or vanished between plan and copy. */
export class SlideChanged extends SlidewayError {}
/** A slide of no bytes. */
export class SlideEmpty extends SlidewayError {}
/** Bronze is write-once, and other content stands under the slide's name. */
export class NameTaken extends SlidewayError {}
/** S3 takes no object of that name. */
export class NameRefused extends SlidewayError {}
/** The stage's `canonicalName` is no template. */
export class NameTemplateInvalid extends SlidewayError {}
/** The stage allows no content that is in Bronze already. */
export class ContentSeen extends SlidewayError {}
/** A slide that could not be copied in as many invocations as one slide may have. */
export class CopyTooSlow extends SlidewayError {}
/** What an earlier run took into Bronze is no longer there as it was. */
export class BronzeChanged extends SlidewayError {}
/** What arrived in Bronze is not what lies in Landing. */
export class ChecksumMismatch extends SlidewayError {}

export function reasonOf(error: unknown): Reason {
  if (error instanceof Error) return { error: error.name, message: error.message };
  return { error: 'Error', message: String(error) };
}

const THROTTLES = new Set([
  'ThrottlingException',
  'Throttling',
  'TooManyRequestsException',
  'ProvisionedThroughputExceededException',
  'RequestLimitExceeded',
  'SlowDown',
  'RequestThrottled',
]);

const UNREACHABLE = new Set(['ECONNREFUSED', 'ECONNRESET', 'EPIPE', 'ETIMEDOUT', 'ENOTFOUND', 'EAI_AGAIN']);

/** Names an error of the AWS SDK by what the state machine should do about it; any other comes back as it is. */
export function classify(error: unknown): unknown {
  if (!(error instanceof Error) || error instanceof SlidewayError) return error;
  const { $metadata, code } = error as { $metadata?: { httpStatusCode?: number }; code?: string };
  if (THROTTLES.has(error.name) || $metadata?.httpStatusCode === 429) {
    return new Throttled(`${error.name}: ${error.message}`, { cause: error });
  }
  const status = $metadata?.httpStatusCode ?? 0;
  if (status >= 500 || error.name === 'TimeoutError' || (code !== undefined && UNREACHABLE.has(code))) {
    return new ServiceUnavailable(`${error.name}: ${error.message}`, { cause: error });
  }
  return error;
}

/** Whether S3 or DynamoDB says that the thing is not there. */
export function isNotFound(error: unknown): boolean {
  return (
    error instanceof Error && ['NoSuchKey', 'NotFound', 'NoSuchVersion', 'NoSuchBucket'].includes(error.name)
  );
}
