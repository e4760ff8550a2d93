"""Generated Python code as docs/clients.md shows it, and what the page says of limits and compression."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import grpc
import pytest
import torch

from moeserve.v1 import moe_service_pb2_grpc as pb_grpc
from tests.stock_clients.node import REPOSITORY, STOCK_LIMIT_BYTES
from tests.support.engine import HIDDEN
from tests.support.messages import request, value
from tests.support.servers import Running


async def test_the_documented_client(running: Running) -> None:
    page = (REPOSITORY / "docs" / "clients.md").read_text()
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "import grpc" in code)
    names: dict[str, Any] = {}
    await asyncio.to_thread(exec, code.replace("127.0.0.1:50051", running.target), names)
    names["channel"].close()
    assert names["y"].shape == (16, HIDDEN)
    assert torch.equal(names["y"], names["x"])


async def test_a_client_that_says_nothing_refuses_large_answers(running: Running) -> None:
    large = request(torch.zeros(STOCK_LIMIT_BYTES // HIDDEN // 4, HIDDEN))
    with pytest.raises(grpc.aio.AioRpcError, match=r"larger than max \(\d+ vs\. 4194304\)") as caught:
        await running.stub.Forward(large)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    async with grpc.aio.insecure_channel(running.target, options=[("grpc.max_receive_message_length", 2**23)]) as channel:
        answer = await pb_grpc.MoEServiceStub(channel).Forward(large)
    assert len(answer.hidden_states.data) == STOCK_LIMIT_BYTES


@pytest.mark.parametrize("how", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_requests_may_be_compressed(running: Running, how: grpc.Compression) -> None:
    batch = torch.arange(4096.0 * HIDDEN).view(-1, HIDDEN)
    answer = await running.stub.Forward(request(batch), compression=how)
    assert torch.equal(value(answer.hidden_states), batch)
