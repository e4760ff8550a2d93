"""Messages of streams that there is no room for: refused, and gone at once."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import resource
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
import torch

from moeserve.server.inference.messages import pb as inference
from moeserve.v1 import moe_service_pb2 as pb
from tests.support.engine import HIDDEN
from tests.support.messages import request
from tests.support.servers import Running, run
from tests.support.waiting import until_async

STREAM, INFER_STREAM = "/moeserve.v1.MoEService/ForwardStream", "/inference.GRPCInferenceService/ModelStreamInfer"
MIB = 2**20
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    """A server whose room is filled but for half a MiB, until the gate of its engine is opened."""
    started = await run(max_queued_bytes=MIB * 3 // 2)
    started.engine.gate.clear()
    held = asyncio.ensure_future(started.stub.Forward(request(torch.zeros(2**14, HIDDEN))))
    await until_async(lambda: len(started.engine.requests) == 1)
    try:
        yield started
    finally:
        started.engine.gate.set()
        await held
        await started.stop()


#: method -> the sentence of an answer that says RESOURCE_EXHAUSTED as far as it says a code
STREAMS: dict[str, Callable[[bytes], str]] = {
    STREAM: lambda answer: (error := pb.ForwardResponse.FromString(answer).error).message * (error.code == EXHAUSTED.value[0]),
    INFER_STREAM: lambda answer: inference.ModelStreamInferResponse.FromString(answer).error_message,
}


@pytest.mark.parametrize("method", STREAMS)
async def test_a_message_that_was_refused_in_a_stream_is_not_kept(running: Running, method: str) -> None:
    """By nobody, so that it is gone before cycles of references are collected, which an idle process does not do."""
    message, told = bytes(64 * MIB), []
    gc.collect()
    gc.disable()
    try:
        before = resident_bytes()
        for _ in range(4):
            stream = running.channel.stream_stream(method)(iter([message]))
            told.append(STREAMS[method](await stream.read()))
            assert await stream.read() is grpc.aio.EOF
        await until_async(lambda: resident_bytes() < before + 2 * len(message))
    finally:
        gc.enable()
    assert all("does not fit" in sentence for sentence in told)
    running.engine.gate.set()


async def test_a_refused_message_is_not_kept_until_an_earlier_one_of_its_stream_is_answered(running: Running) -> None:
    """Answers by this protocol keep the order of their requests."""
    rows = inference.ModelInferRequest.InferInputTensor(name="hidden_states", datatype="FP32", shape=[3, HIDDEN])
    small = inference.ModelInferRequest(model_name="tiny/model.layers.3.mlp", inputs=[rows], raw_input_contents=[bytes(12 * HIDDEN)])
    stream = running.channel.stream_stream(INFER_STREAM)()
    await stream.write(small.SerializeToString())
    await until_async(lambda: len(running.engine.requests) == 2)
    large, before = bytes(64 * MIB), resident_bytes()
    for _ in range(4):
        await stream.write(large)
    assert await running.observed.until(4) == [("ModelStreamInfer", "RESOURCE_EXHAUSTED")] * 4
    await until_async(lambda: resident_bytes() < before + 2 * len(large))
    running.engine.gate.set()
    assert not inference.ModelStreamInferResponse.FromString(await stream.read()).error_message


def resident_bytes() -> int:
    """Without what is free, which a process that has served once keeps for a while."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
