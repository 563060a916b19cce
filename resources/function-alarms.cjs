/** An alarm on the errors of each function: every folder in functions/ that is deployed has one. */
const { existsSync, readdirSync } = require('node:fs');
const { join } = require('node:path');

const FUNCTIONS = join(__dirname, '..', 'functions');
const pascal = (name) => name.replace(/(^|-)([a-z])/g, (_, _dash, letter) => letter.toUpperCase());

module.exports = async ({ resolveVariable }) => {
  const prefix = await resolveVariable('self:custom.prefix');
  const threshold = await resolveVariable('self:custom.config.alarms.functionErrors');
  const names = readdirSync(FUNCTIONS).filter((name) => existsSync(join(FUNCTIONS, name, 'deploy.yml')));
  const alarm = (name) => ({
    Type: 'AWS::CloudWatch::Alarm',
    Properties: {
      AlarmName: `${prefix}-errors-of-${name}`,
      AlarmDescription: `The function ${name} failed; its log says why`,
      Namespace: 'AWS/Lambda',
      MetricName: 'Errors',
      Dimensions: [{ Name: 'FunctionName', Value: `${prefix}-${name}` }],
      Statistic: 'Sum',
      Period: 300,
      EvaluationPeriods: 1,
      Threshold: threshold,
      ComparisonOperator: 'GreaterThanThreshold',
      TreatMissingData: 'notBreaching',
      AlarmActions: [{ Ref: 'AlarmsTopic' }],
    },
  });
  return { Resources: Object.fromEntries(names.map((name) => [`ErrorsOf${pascal(name)}`, alarm(name)])) };
};
