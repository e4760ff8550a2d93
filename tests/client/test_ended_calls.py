"""A service that ends cancels the calls that it has not answered: not what the caller wanted, so they are made again."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from moeserve import Client, errors
from moeserve.client.failures import to_error
from moeserve.v1 import moe_service_pb2_grpc as pb_grpc


class Ending(pb_grpc.MoEServiceServicer):
    def ListLayers(self, request: Any, context: grpc.ServicerContext) -> Any:
        context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")


@pytest.fixture
def target() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1))
    pb_grpc.add_MoEServiceServicer_to_server(Ending(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_it_is_the_service_that_has_ended_the_call(target: str) -> None:
    with Client(target) as client, pytest.raises(errors.ServiceUnreachable, match=f"{target} has ended the call") as caught:
        client.layers()
    assert caught.value.may_return


@pytest.mark.parametrize(("number", "may_return"), [(errno.ECONNREFUSED, True), (errno.EHOSTUNREACH, True), (errno.EACCES, False)])
def test_the_system_speaks_the_language_of_the_program(number: int, may_return: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "strerror", lambda number: f"Fehler {number}")
    said = f"last error: UNKNOWN: ipv4:127.0.0.1:1: Failed to connect to remote host: Fehler {number}"
    failure = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), said)
    error = to_error(failure, "127.0.0.1:1", 1.0)
    assert isinstance(error, errors.ServiceUnreachable)
    assert error.may_return is may_return
