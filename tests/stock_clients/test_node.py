"""A stock client that does not merge the pieces of a field: Node's gRPC with protobuf.js, and the example made of them.

T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from moeserve.api.request import LayerRequest
from moeserve.api.tensors import WIRE_NUMBERS, raw, view
from moeserve.v1 import tensor_pb2
from tests.stock_clients.node import EXAMPLE, REPOSITORY, STOCK_LIMIT_BYTES, Node
from tests.support.engine import EXPERTS, HIDDEN, echo_engine
from tests.support.servers import Running

SCRIPT = Path(__file__).with_name("forward.js")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
UNLIMITED = {"grpc.max_receive_message_length": -1, "grpc.max_send_message_length": -1}

Batch = tuple[torch.dtype, int]


def name(dtype: torch.dtype) -> str:
    return tensor_pb2.DType.Name(WIRE_NUMBERS[dtype])


async def answers(node: Node, running: Running, batches: list[Batch], options: dict[str, int]) -> list[dict[str, Any]]:
    told = [[name(dtype), dtype.itemsize, tokens, HIDDEN] for dtype, tokens in batches]
    about = {"target": running.target, "protos": str(REPOSITORY / "protos"), "options": options, "batches": told}
    return [json.loads(line) for line in await node(str(SCRIPT), json.dumps(about))]


def expected(batch: Batch) -> dict[str, Any]:
    """What forward.js says of the answer."""
    dtype, tokens = batch
    data = (torch.arange(tokens * HIDDEN * dtype.itemsize) % 59).to(torch.uint8)
    sent = view(data.numpy().tobytes(), [tokens, HIDDEN], dtype)
    found: dict[str, Any] = {"request_id": f"{name(dtype)} {tokens}", "error": None, "is_shared": False}
    values = dict(vars(echo_engine().answer(0, LayerRequest(sent, return_routing=True))))
    if not tokens:
        values |= dict.fromkeys(("requested", "processed", "dropped"), torch.zeros(EXPERTS, dtype=torch.int64))
        values |= {"aux_loss": 0, "z_loss": 0}
    for field, value in values.items():
        found[field] = value
        if isinstance(value, torch.Tensor):
            content = raw(value).tobytes()
            shape = [str(size) for size in value.shape]
            found[field] = {"dtype": name(value.dtype), "shape": shape, "bytes": len(content), "sha256": sha256(content).hexdigest()}
    return found | {"model_revision": "1"}


async def test_it_reads_all_of_every_answer(node: Node, running: Running) -> None:
    # hidden_states and the routing pass 8 KiB at different T, the message passes 128 KiB in between, the stock limit at the end.
    around = [near + more for near in (128, 256, 512, 1024, 2048, 4096) for more in (-1, 0, 1)]
    batches: list[Batch] = [(dtype, tokens) for dtype in FLOATS for tokens in (0, 1, *around)]
    batches.append((torch.float32, STOCK_LIMIT_BYTES // HIDDEN // 4 + 1))
    found = await answers(node, running, batches, UNLIMITED)
    assert [each["fields"] for each in found if each["how"] == "Forward"] == [expected(batch) for batch in batches]
    streamed = {each["fields"]["request_id"]: each["fields"] for each in found if each["how"] == "ForwardStream"}
    failed = streamed.pop("no such layer")
    assert streamed == {fields["request_id"]: fields for fields in map(expected, batches)}
    assert (failed["error"]["code"], failed["hidden_states"]) == (5, None)
    assert "layer 9" in failed["error"]["message"]


async def test_its_own_limit_refuses_large_answers_unless_it_is_raised(node: Node, running: Running) -> None:
    batches: list[Batch] = [(torch.float32, STOCK_LIMIT_BYTES // HIDDEN // 4)]
    refused, streamed = await answers(node, running, batches, {})
    for each in (refused, streamed):
        assert each["code"] == 8
        assert "larger than max" in each["details"]


async def test_the_example(node: Node, running: Running) -> None:
    lines = await node(str(EXAMPLE / "client.js"), running.target)
    assert lines[:2] == [
        f"{index}: model.layers.{layer}.mlp, {EXPERTS} experts of hidden size {HIDDEN}" for index, layer in enumerate((3, 5))
    ]
    assert lines[2] == f"answer: D_TYPE_FLOAT32 [4,{HIDDEN}], first row starts with 0.00000"
    assert sorted(lines[3:]) == [f"layer {index}: [4,{HIDDEN}]" for index in range(2)]
