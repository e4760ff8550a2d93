// A client in Node that needs only the service's .proto files. https://grpc.io/docs/languages/node describes its packages.
//
// npm install --prefix examples/node
// node examples/node/client.js 127.0.0.1:50051          # layers, a batch through the first one, a stream through all
// TOKEN=$(cat token) CA=tls.crt node examples/node/client.js moe.example:50051
'use strict';

const fs = require('fs');
const path = require('path');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const PROTOS = path.join(__dirname, '../../protos');
const LOADING = { includeDirs: [PROTOS], keepCase: true, longs: String, enums: String, defaults: true, oneofs: true };
// Answers are as large as requests. The default limit of gRPC, 4 MB, is reached by 2048 tokens of 1024 float16.
const LIMITS = { 'grpc.max_receive_message_length': 256 * 2 ** 20, 'grpc.max_send_message_length': 256 * 2 ** 20 };

function connect(target, token, ca) {
  const { MoEService } = grpc.loadPackageDefinition(loader.loadSync('moeserve/v1/moe_service.proto', LOADING)).moeserve.v1;
  const credentials = ca ? grpc.credentials.createSsl(fs.readFileSync(ca)) : grpc.credentials.createInsecure();
  const metadata = new grpc.Metadata();
  if (token) metadata.set('authorization', `Bearer ${token}`);
  return { client: new MoEService(target, credentials, LIMITS), metadata };
}

// Float32Array of T * H numbers -> a Tensor of shape [T, H]
function tensor(numbers, shape) {
  return { dtype: 'D_TYPE_FLOAT32', shape, data: Buffer.from(numbers.buffer, numbers.byteOffset, numbers.byteLength) };
}

// A float32 Tensor -> Float32Array. It is a copy, because the message's bytes may start at any address and the numbers must be aligned.
function numbers({ data }) {
  return new Float32Array(new Uint8Array(data).buffer);
}

// The answer to one unary call.
function call({ client, metadata }, method, request, seconds = 10) {
  return new Promise((resolve, reject) => {
    client[method](request, metadata, { deadline: Date.now() + 1000 * seconds }, (error, answer) => (error ? reject(error) : resolve(answer)));
  });
}

// The answers to several requests over one call, in the order of their arrival.
async function stream({ client, metadata }, requests, seconds = 60) {
  const call = client.ForwardStream(metadata, { deadline: Date.now() + 1000 * seconds });
  for (const request of requests) call.write(request);
  call.end();
  const answers = [];
  for await (const answer of call) answers.push(answer);
  return answers;
}

async function main(target) {
  const service = connect(target, process.env.TOKEN, process.env.CA);
  const { layers } = await call(service, 'ListLayers', {});
  for (const layer of layers) console.log(`${layer.index}: ${layer.name}, ${layer.num_experts} experts of hidden size ${layer.hidden_size}`);

  const shape = [4, layers[0].hidden_size];
  const batch = tensor(Float32Array.from({ length: shape[0] * shape[1] }, (_, i) => Math.sin(i)), shape);
  const answer = await call(service, 'Forward', { layer_index: 0, hidden_states: batch, return_routing: true });
  const { dtype, shape: got } = answer.hidden_states;
  console.log(`answer: ${dtype} [${got}], first row starts with ${numbers(answer.hidden_states)[0].toPrecision(6)}`);

  const requests = layers.map(({ index }) => ({ request_id: String(index), layer_index: index, hidden_states: batch }));
  for (const { request_id, hidden_states, error } of await stream(service, requests)) {
    console.log(error ? `layer ${request_id}: failed with ${error.code}: ${error.message}` : `layer ${request_id}: [${hidden_states.shape}]`);
  }
  service.client.close();
}

main(process.argv[2] ?? '127.0.0.1:50051').catch((error) => {
  console.error(error.message);
  process.exitCode = 1;
});
