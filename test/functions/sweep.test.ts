import { PutObjectCommand } from '@aws-sdk/client-s3';
import { CreateModelCommand, ListModelsCommand, SageMakerClient } from '@aws-sdk/client-sagemaker';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { emittedBy } from '../support/metrics.ts';
import { CREDENTIALS, type Services, startServices } from '../support/services.ts';

let services: Services;
beforeAll(async () => {
  services = await startServices();
  await services.createBucket('landing');
  Object.assign(process.env, {
    AWS_ENDPOINT_URL: services.endpoint,
    AWS_REGION: 'us-east-1',
    AWS_ACCESS_KEY_ID: CREDENTIALS.accessKeyId,
    AWS_SECRET_ACCESS_KEY: CREDENTIALS.secretAccessKey,
    ...{ LANDING_BUCKET: 'landing', SILVER_BUCKET: services.silver, STATE_TABLE: 'state', STAGE: 'test' },
    JOB_PREFIX: 'slideway-test',
    ...{ MANIFEST_MINUTES: '0.00001', UNNAMED_HOURS: '1', STUCK_HOURS: '1', RUN_HOURS: '1' },
    POWERTOOLS_SERVICE_NAME: 'sweep',
    POWERTOOLS_METRICS_NAMESPACE: 'Slideway',
    POWERTOOLS_LOG_LEVEL: 'SILENT',
  });
});
afterAll(() => services.close());

it('what a sweep finds becomes metrics, zeros too, so that an alarm can end', async () => {
  await services.s3.send(
    new PutObjectCommand({ Bucket: 'landing', Key: 'colon/repo.csv', Body: 'slide\nx\n' }),
  );
  const sageMaker = new SageMakerClient({
    ...{ endpoint: services.endpoint, region: 'us-east-1', credentials: CREDENTIALS },
  });
  for (const name of ['slideway-test-left', 'slideway-tests-own', 'slideway-test-untagged'])
    await sageMaker.send(
      new CreateModelCommand({
        ModelName: name,
        PrimaryContainer: { Image: 'image' },
        ExecutionRoleArn: 'arn:aws:iam::000000000000:role/transform',
        ...(!name.endsWith('untagged') && { Tags: [{ Key: 'slideway:run', Value: 'gone' }] }),
      }),
    );
  // S3 tells times in whole seconds.
  await new Promise((resolve) => setTimeout(resolve, 1100));
  const { handler } = await import('../../functions/sweep/handler.ts');
  const context = { functionName: 'sweep', awsRequestId: '1' } as never;
  const { answer, metrics } = await emittedBy(() => handler({ 'detail-type': 'Scheduled Event' }, context));
  expect(answer).toMatchObject({ SweepStaleManifests: 1, SweepUnnamedSlides: 0 });
  expect(metrics).toEqual({
    'Sweeps service=sweep stage=test': 1,
    'SweepStaleManifests service=sweep stage=test': 1,
    'SweepUnnamedSlides service=sweep stage=test': 0,
    'SweepStuckSlides service=sweep stage=test': 0,
    'SweepEndlessRuns service=sweep stage=test': 0,
    'SweepLeftModels service=sweep stage=test': 1,
  });
  const { Models = [] } = await sageMaker.send(new ListModelsCommand({ SortBy: 'Name' }));
  expect(Models.map(({ ModelName }) => ModelName).sort()).toEqual([
    'slideway-test-untagged',
    'slideway-tests-own',
  ]);
});
