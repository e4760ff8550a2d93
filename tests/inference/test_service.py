"""What this protocol shares with the others of the service: tokens, metrics, readiness, drain, reflection; and the process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import Default
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from moeserve.errors import ExpertUnavailable, Overloaded
from moeserve.server.inference.messages import pb
from tests.inference.requests import METHOD, raw_request
from tests.support.engine import X
from tests.support.servers import Running, run, served
from tests.support.waiting import until_async

UNARY = (
    *("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer", "ModelConfig", "ModelStatistics"),
    *("RepositoryIndex", "SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister"),
)


async def ask(running: Running, method: str, request: Any = None, **options: Any) -> Any:
    message = (request or getattr(pb, f"{method}Request")()).SerializeToString()
    answer = await running.channel.unary_unary(METHOD + method)(message, **options)
    return getattr(pb, f"{method}Response").FromString(answer)


async def code(running: Running, method: str, request: Any = None, **options: Any) -> str:
    try:
        await ask(running, method, request, **options)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


@pytest.fixture
async def running() -> Any:
    started = await run()
    yield started
    await started.stop()


async def test_every_method_needs_the_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("of-the-caller")
    running = await run(auth_token_file=token)
    try:
        for method in UNARY:
            assert await code(running, method) == "UNAUTHENTICATED", method
        metadata = (("authorization", "Bearer of-the-caller"),)
        assert await code(running, "ModelInfer", raw_request(hidden_states=X), metadata=metadata) == "OK"
        call = running.channel.stream_stream(METHOD + "ModelStreamInfer")(iter([b""]))
        with pytest.raises(grpc.aio.AioRpcError, match="token is missing"):
            await call.read()
    finally:
        await running.stop()


async def test_calls_are_counted_by_method_and_code(running: Running) -> None:
    assert await code(running, "ModelInfer", raw_request(hidden_states=X)) == "OK"
    assert await code(running, "ModelInfer", raw_request("tiny/no", hidden_states=X)) == "NOT_FOUND"
    good, bad = raw_request(hidden_states=X).SerializeToString(), b"\xff"
    call = running.channel.stream_stream(METHOD + "ModelStreamInfer")(iter([good, bad]))
    assert len([answer async for answer in call]) == 2
    await running.observed.until(4)
    assert sorted(running.observed) == [
        ("ModelInfer", "NOT_FOUND"),
        ("ModelInfer", "OK"),
        ("ModelStreamInfer", "INVALID_ARGUMENT"),
        ("ModelStreamInfer", "OK"),
    ]


@pytest.mark.parametrize("error", [Overloaded("full", 0.5), ExpertUnavailable("gone")])
async def test_what_the_engine_raises_is_the_status(running: Running, error: Any) -> None:
    running.engine.errors.append(error)
    assert await code(running, "ModelInfer", raw_request(hidden_states=X)) == error.code.name


async def test_refusals_come_before_the_message_is_read(running: Running) -> None:
    running.engine.refusing = Overloaded("full", 0.5)
    assert await code(running, "ModelInfer", raw_request(hidden_states=X)) == "RESOURCE_EXHAUSTED"
    assert not running.engine.requests


async def test_deadlines_reach_the_engine_the_earlier_one_first(running: Running) -> None:
    request = raw_request(hidden_states=X)
    await ask(running, "ModelInfer", request)
    await ask(running, "ModelInfer", request, timeout=500)
    request.parameters["timeout"].int64_param = 100_000_000
    await ask(running, "ModelInfer", request, timeout=500)
    await ask(running, "ModelInfer", request)
    without, call, both, parameter = (each.deadline for _, each in running.engine.requests)
    assert without is None
    assert 300 < call - both < 500
    assert abs(parameter - both) < 60


async def test_a_caller_that_leaves_gives_its_request_up(running: Running) -> None:
    running.engine.gate.clear()
    call = running.channel.unary_unary(METHOD + "ModelInfer")(raw_request(hidden_states=X).SerializeToString())
    await until_async(lambda: running.engine.requests)
    call.cancel()
    await until_async(lambda: running.engine.cancelled == 1)


async def test_readiness_follows_health_while_it_drains_too(running: Running) -> None:
    layers = [f"tiny/{spec.name}" for spec in running.engine.layers]

    async def ready() -> list[bool]:
        whole = (await ask(running, "ServerReady")).ready
        return [whole, *[(await ask(running, "ModelReady", pb.ModelReadyRequest(name=name))).ready for name in layers]]

    async def listed(**options: Any) -> list[str]:
        return [each.state for each in (await ask(running, "RepositoryIndex", pb.RepositoryIndexRequest(**options))).models]

    assert await ready() == [False, False, False]
    running.server.set_serving(1, True)
    assert await ready() == [False, False, True]
    assert (await listed(), await listed(ready=True)) == (["UNAVAILABLE", "READY"], ["READY"])
    running.server.set_serving(0, True)
    assert await ready() == [True, True, True]
    running.engine.gate.clear()
    pending = asyncio.create_task(code(running, "ModelInfer", raw_request(hidden_states=X)))
    await until_async(lambda: running.engine.requests)
    draining = asyncio.create_task(running.server.drain(30))
    await until_async(running.server._boundary.draining.is_set)
    assert await ready() == [False, False, False]
    assert (await ask(running, "ServerLive")).live
    assert await code(running, "ModelInfer", raw_request(hidden_states=X)) == "UNAVAILABLE"
    running.engine.gate.set()
    assert await pending == "OK"
    await draining


async def test_other_repositories_are_refused(running: Running) -> None:
    assert await code(running, "RepositoryIndex", pb.RepositoryIndexRequest(repository_name="s3://models")) == "INVALID_ARGUMENT"


def test_reflection_tells_of_it_and_of_the_others(running_in_thread: str) -> None:
    with grpc.insecure_channel(running_in_thread) as channel:
        told = ProtoReflectionDescriptorDatabase(channel)
        assert {"inference.GRPCInferenceService", "moeserve.v1.MoEService", "grpc.health.v1.Health"} <= set(told.get_services())
        for name, file in (
            ("inference.GRPCInferenceService", "inference/open_inference.proto"),
            ("moeserve.v1.MoEService", "moeserve/v1/moe_service.proto"),
            ("moeserve.v1.MoEService.Forward", "moeserve/v1/moe_service.proto"),
            ("moeserve.v1.ForwardRequest.hidden_states", "moeserve/v1/moe_service.proto"),
        ):
            assert ProtoReflectionDescriptorDatabase(channel).FindFileContainingSymbol(name).name == file
        with pytest.raises(KeyError):
            ProtoReflectionDescriptorDatabase(channel).FindFileContainingSymbol("moeserve.v1.MoEService.Backward")


@pytest.fixture
def running_in_thread() -> Any:
    from tests.support.engine import echo_engine

    with served(echo_engine()) as (target, _, _):
        yield target


def test_it_lives_in_one_process_with_other_packages_of_the_protocol() -> None:
    """protobuf lets only one of them have these names in the pool of all modules, whichever comes first."""
    from tritonclient.grpc import service_pb2

    theirs = Default().FindMessageTypeByName("inference.ModelInferRequest")
    assert (theirs, theirs.file.name) == (service_pb2.ModelInferRequest.DESCRIPTOR, "grpc_service.proto")
    assert pb.ModelInferRequest.DESCRIPTOR.file.name == "inference/open_inference.proto"
    with pytest.raises(KeyError):
        Default().FindFileByName("inference/open_inference.proto")


def test_field_numbers_and_types_are_those_of_the_protocol() -> None:
    """As the generated code of Triton's client has them."""
    from tritonclient.grpc import model_config_pb2, service_pb2

    def described(message: Any) -> Callable[[], dict[str, tuple[int, int, bool]]]:
        return {field.name: (field.number, field.type, field.is_repeated) for field in message.DESCRIPTOR.fields}

    for name, ours in vars(pb).items():
        theirs = getattr(service_pb2, name, None) or getattr(model_config_pb2, name, None)
        if hasattr(ours, "DESCRIPTOR"):
            assert described(ours).items() <= described(theirs).items(), name
            for nested in ours.DESCRIPTOR.nested_types_by_name:
                if not nested.endswith("Entry"):
                    assert described(getattr(ours, nested)).items() <= described(getattr(theirs, nested)).items(), nested
        else:
            assert model_config_pb2.DataType.Value(name) == ours
