// Sends batches as a program would that has nothing but the .proto files, with the usual options of its packages, and prints what it reads
// in the answers, one line of JSON each. Its argument: {target, protos, options of the channel, batches: [[dtype, bytes per element, T, H]]}.
'use strict';

const { createHash } = require('crypto');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const { target, protos, options, batches } = JSON.parse(process.argv[2]);
const loading = { includeDirs: [protos], keepCase: true, longs: String, enums: String, defaults: true, oneofs: true };
const { MoEService } = grpc.loadPackageDefinition(loader.loadSync('moeserve/v1/moe_service.proto', loading)).moeserve.v1;
const client = new MoEService(target, grpc.credentials.createInsecure(), options);

// Bytes below 60 are finite numbers, whatever the type.
function request([dtype, itemsize, tokens, hidden]) {
  const data = Buffer.alloc(tokens * hidden * itemsize).map((_, i) => i % 59);
  return { request_id: `${dtype} ${tokens}`, layer_index: 0, return_routing: true, hidden_states: { dtype, shape: [tokens, hidden], data } };
}

function read(answer) {
  const fields = Object.entries(answer).map(([name, value]) => {
    if (!value || value.shape === undefined) return [name, value];
    const { dtype, shape, data } = value;
    return [name, { dtype, shape, bytes: data.length, sha256: createHash('sha256').update(data).digest('hex') }];
  });
  return Object.fromEntries(fields);
}

function say(how, what) {
  console.log(JSON.stringify({ how, ...what }));
}

function forward(batch) {
  return new Promise((resolve) => {
    client.Forward(request(batch), (error, answer) => {
      say('Forward', error ? { code: error.code, details: error.details } : { fields: read(answer) });
      resolve();
    });
  });
}

async function stream() {
  const call = client.ForwardStream();
  for (const batch of batches) call.write(request(batch));
  call.write({ request_id: 'no such layer', layer_index: 9, hidden_states: request(batches[0]).hidden_states });
  call.end();
  try {
    for await (const answer of call) say('ForwardStream', { fields: read(answer) });
  } catch (error) {
    say('ForwardStream', { code: error.code, details: error.details });
  }
}

(async () => {
  for (const batch of batches) await forward(batch);
  await stream();
  client.close();
})();
