"""Callers that send anything but what they should, or leave in the middle.

They get a status that says why; the log gets few lines, and nobody else is served worse.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from moeserve import Client, MoELayer
from moeserve.api.wire import WireRequest, encode_forward_request
from moeserve.v1 import admin_service_pb2, control_service_pb2
from moeserve.v1 import moe_service_pb2 as pb
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness

LAYER = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 4}
MAX_MESSAGE_BYTES = 2**20
ADMIN = (("authorization", "Bearer of-the-administrator"),)
FOLLOW = (("authorization", "Bearer follow"),)
NOT_PROTOBUF = b"\xff" * 20

Metadata = Sequence[tuple[str, str]]

#: method -> metadata with the token it needs, a message that it takes
METHODS: dict[str, tuple[Metadata, bytes]] = {
    "/moeserve.v1.MoEService/Forward": ((), encode_forward_request(WireRequest(torch.ones(3, 16), request_id="fuzz"))),
    "/moeserve.v1.MoEService/ForwardStream": ((), encode_forward_request(WireRequest(torch.ones(3, 16), request_id="fuzz"))),
    "/moeserve.v1.MoEService/ListLayers": ((), pb.ListLayersRequest().SerializeToString()),
    "/moeserve.v1.MoEService/GetStats": ((), pb.GetStatsRequest().SerializeToString()),
    "/moeserve.v1.AdminService/GetPlacement": (ADMIN, admin_service_pb2.GetPlacementRequest().SerializeToString()),
    "/moeserve.v1.AdminService/SwapExperts": (
        ADMIN,
        admin_service_pb2.SwapExpertsRequest(layer="layers.0", checkpoint="/nowhere", experts=[1, 2]).SerializeToString(),
    ),
    "/moeserve.v1.AdminService/Scale": (ADMIN, admin_service_pb2.ScaleRequest(hosts=0).SerializeToString()),
    "/moeserve.v1.AdminService/ScaleCopies": (
        ADMIN,
        admin_service_pb2.ScaleCopiesRequest(layer="layers.0", expert=99, copies=2).SerializeToString(),
    ),
    "/moeserve.v1.AdminService/Rebalance": (ADMIN, admin_service_pb2.RebalanceRequest(dry_run=True).SerializeToString()),
    "/moeserve.v1.AdminService/DrainHost": (ADMIN, admin_service_pb2.DrainHostRequest(host="host-9").SerializeToString()),
    "/moeserve.v1.AdminService/Shutdown": (ADMIN, b""),
    "/moeserve.v1.ControlService/Follow": (FOLLOW, control_service_pb2.FrontendReport(name="a", epoch=1).SerializeToString()),
    "/grpc.health.v1.Health/Check": ((), health_pb2.HealthCheckRequest(service="layers.0").SerializeToString()),
    "/grpc.health.v1.Health/Watch": ((), health_pb2.HealthCheckRequest(service="layers.0").SerializeToString()),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": (
        (),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="moeserve.v1.MoEService").SerializeToString(),
    ),
}
STREAMED = ("ForwardStream", "Follow", "Watch", "ServerReflectionInfo")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceHarness]:
    folder = tmp_path_factory.mktemp("strangers")
    (folder / "admin").write_text("of-the-administrator")
    (folder / "admin").chmod(0o600)
    server = {"port": 0, "admin_token_file": folder / "admin", "max_message_bytes": MAX_MESSAGE_BYTES}
    with ServiceHarness({"layers": [LAYER], "server": server}, "local", folder) as running:
        running.call(running.open_control())
        yield running


def target(service: ServiceHarness, method: str) -> str:
    return service.control_target if "Control" in method else service.target


async def call(channel: grpc.aio.Channel, method: str, message: bytes, metadata: Metadata, timeout: float = 20) -> grpc.StatusCode:
    """The status of one message; of a stream it is the first answer that counts."""
    try:
        if method.endswith(STREAMED):
            stream = channel.stream_stream(method)(metadata=metadata, timeout=timeout)
            await stream.write(message)
            answer = await stream.read()
            stream.cancel()
            if method.endswith("ForwardStream") and answer is not grpc.aio.EOF:
                number = pb.ForwardResponse.FromString(answer).error.code
                return next(code for code in grpc.StatusCode if code.value[0] == number)
        else:
            await channel.unary_unary(method)(message, metadata=metadata, timeout=timeout)
    except grpc.aio.AioRpcError as error:
        return error.code()
    except asyncio.InvalidStateError:  # a stream that had ended before it was written to
        return await stream.code()
    return grpc.StatusCode.OK


def still_serves(service: ServiceHarness) -> None:
    with Client(service.target) as client:
        rows = torch.randn(5, 16)
        assert_close(client.forward(rows).hidden_states, MoELayer(**LAYER)(rows))


def require_few_lines(caplog: pytest.LogCaptureFixture, at_most: int) -> None:
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [record.getMessage() for record in lines if record.exc_info]
    assert len(lines) <= at_most, Counter(record.getMessage() for record in lines)


@pytest.mark.parametrize("method", METHODS)
async def test_bytes_that_are_no_message_are_refused_in_a_sentence_and_said_once(
    service: ServiceHarness, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    metadata, _ = METHODS[method]
    async with grpc.aio.insecure_channel(target(service, method)) as channel:
        codes = [await call(channel, method, NOT_PROTOBUF, metadata) for _ in range(20)]
        assert set(codes) == {grpc.StatusCode.INVALID_ARGUMENT}
    require_few_lines(caplog, 1)


@pytest.mark.parametrize("method", [method for method, (metadata, _) in METHODS.items() if metadata])
async def test_who_may_not_call_is_told_before_his_bytes_are_looked_at(service: ServiceHarness, method: str) -> None:
    async with grpc.aio.insecure_channel(target(service, method)) as channel:
        # Nothing is sent, or only what cannot be read: neither is waited for.
        with pytest.raises(grpc.aio.AioRpcError, match="token is missing or wrong"):
            await channel.stream_stream(method)(timeout=20).read()
        if not method.endswith(STREAMED):
            assert await call(channel, method, NOT_PROTOBUF, ()) is grpc.StatusCode.UNAUTHENTICATED


async def test_after_thousands_of_broken_messages_nothing_is_different(service: ServiceHarness, caplog: pytest.LogCaptureFixture) -> None:
    chance, codes = random.Random(7), Counter[tuple[str, grpc.StatusCode]]()
    channels = {at: grpc.aio.insecure_channel(at) for at in (service.target, service.control_target)}

    async def one(method: str) -> None:
        metadata, message = METHODS[method]
        codes[method, await call(channels[target(service, method)], method, broken(message, chance), metadata)] += 1

    methods = [method for method in METHODS if not method.endswith("Shutdown")]
    for _ in range(20):
        await asyncio.gather(*(one(method) for method in methods for _ in range(15)))
    for channel in channels.values():
        await channel.close()
    assert codes.total() == 20 * 15 * len(methods)
    allowed = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "CANCELLED", "UNAVAILABLE", "DATA_LOSS"}
    assert {code.name for _, code in codes} <= allowed, codes
    require_few_lines(caplog, 20)
    still_serves(service)


def broken(message: bytes, chance: random.Random) -> bytes:
    kind = chance.randrange(4)
    if kind == 0 or not message:
        return chance.randbytes(chance.choice([1, 3, 40]))
    if kind == 1:
        return message[: chance.randrange(len(message))]
    changed = bytearray(message * (2 if kind == 2 else 1))
    for _ in range(chance.choice([1, 4])):
        changed[chance.randrange(min(len(changed), 40))] = chance.randrange(256)
    return bytes(changed)


async def test_what_grpc_refuses_itself_has_a_status_and_no_traceback(service: ServiceHarness, caplog: pytest.LogCaptureFixture) -> None:
    forward = "/moeserve.v1.MoEService/Forward"
    options = [("grpc.max_send_message_length", -1), ("grpc.max_metadata_size", 2**20), ("grpc.absolute_max_metadata_size", 2**20)]
    async with grpc.aio.insecure_channel(service.target, options=options) as channel:
        zeros = bytes(64 * MAX_MESSAGE_BYTES)
        for message, compression in ((zeros[: 2 * MAX_MESSAGE_BYTES], None), (zeros, grpc.Compression.Gzip)):
            with pytest.raises(grpc.aio.AioRpcError, match="larger than max") as caught:
                await channel.unary_unary(forward)(message, compression=compression, timeout=20)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(forward)(b"", metadata=[("x", "y" * 2**16)], timeout=20)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for method in ("/moeserve.v1.MoEService/Backward", "/nothing", "/a" * 2000):
            assert await call(channel, method, NOT_PROTOBUF, ()) is grpc.StatusCode.UNIMPLEMENTED
    require_few_lines(caplog, 0)
    still_serves(service)


async def test_callers_that_leave_leave_nothing_in_the_log(service: ServiceHarness, caplog: pytest.LogCaptureFixture) -> None:
    chance = random.Random(3)

    async def in_a_hurry(method: str) -> None:
        metadata, message = METHODS[method]
        async with grpc.aio.insecure_channel(target(service, method), options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            some = [message, NOT_PROTOBUF, b""]
            await asyncio.gather(
                *(call(channel, method, chance.choice(some), metadata, timeout=chance.uniform(0.0005, 0.02)) for _ in range(40))
            )
            stream = channel.stream_stream(method)(metadata=metadata)
            await stream.write(message)  # and then the connection ends

    methods = [method for method in METHODS if not method.endswith("Shutdown")]
    for _ in range(4):
        await asyncio.gather(*(in_a_hurry(method) for method in methods))
    still_serves(service)
    require_few_lines(caplog, 10)
