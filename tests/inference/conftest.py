from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
import tritonclient.grpc as triton

from moeserve.v1 import moe_service_pb2_grpc as pb_grpc
from tests.inference.requests import Caller
from tests.support.engine import echo_engine
from tests.support.harness import ServiceHarness
from tests.support.servers import served
from tests.support.two_layers import CONFIG


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceHarness]:
    with ServiceHarness({**CONFIG, "server": {"max_tokens_per_request": 4096}}, "local", tmp_path_factory.mktemp("service")) as started:
        yield started


@pytest.fixture
def client(service: ServiceHarness) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(service.target) as made:
        yield made


@pytest.fixture(scope="module")
def caller() -> Iterator[Caller]:
    """Of a server with an engine that echoes, by our own messages: what a client of the protocol could send, and what it could not."""
    with served(echo_engine(), max_message_bytes=2**23) as (target, _, _), grpc.insecure_channel(target, options=Caller.OPTIONS) as channel:
        yield Caller(channel)


@pytest.fixture(scope="module")
def stub(service: ServiceHarness) -> Iterator[pb_grpc.MoEServiceStub]:
    with grpc.insecure_channel(service.target) as channel:
        yield pb_grpc.MoEServiceStub(channel)
