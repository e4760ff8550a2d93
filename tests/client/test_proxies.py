"""Proxies of the environment: never asked for this machine, nor between processes of a service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from moeserve import errors
from moeserve.cli.app import main
from moeserve.client import AdminClient, Client, ControlClient
from tests.client.calls import Calls
from tests.support.engine import FakeEngine, X
from tests.support.listeners import Listener, listener
from tests.support.servers import served

VARIABLES = ("grpc_proxy", "http_proxy", "https_proxy", "all_proxy")
#: an address that is only there for documents to name it
ELSEWHERE = "198.51.100.1:50051"


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """Refuses whatever it is asked for."""
    with listener(b"HTTP/1.1 403 Forbidden\r\n\r\n") as proxy:
        for name in (*VARIABLES, *map(str.upper, VARIABLES)):
            monkeypatch.setenv(name, f"http://{proxy.target}")
        for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY", "NO_GRPC_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield proxy


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1", "0.0.0.0"])
async def test_this_machine_is_called_without_one(
    engine: FakeEngine, connect: Callable[..., Calls], proxy: Listener, tmp_path: Path, host: str
) -> None:
    (tmp_path / "token").write_text("secret")
    try:
        with served(engine, host=host, insecure=True) as (target, _, _):
            assert (await connect(target).forward(X)).hidden_states.tolist() == X.tolist()
            with AdminClient(target, "secret") as admin, pytest.raises(errors.MoEServeError, match="does not offer this method"):
                admin.status()
            async with ControlClient(target, "secret").follow() as stream:
                with pytest.raises(errors.PermissionDenied, match="does not accept frontends"):
                    await stream.read()
            assert await asyncio.to_thread(main, ["top", target, "--once"]) == 0
    except errors.ConfigError as error:
        pytest.skip(str(error))  # without IPv6
    assert proxy.asked == []


def test_a_socket_file_is_called_without_one(proxy: Listener, tmp_path: Path) -> None:
    with Client(f"unix:{tmp_path}/moe.sock") as client, pytest.raises(errors.ServiceUnreachable, match="No such file"):
        client.layers()
    assert proxy.asked == []


async def test_only_callers_of_other_machines_ask_one(connect: Callable[..., Calls], proxy: Listener) -> None:
    with AdminClient(ELSEWHERE, "secret") as admin, pytest.raises(errors.MoEServeError):
        admin.status(timeout=0.5)
    async with ControlClient(ELSEWHERE, "secret").follow() as stream:
        with suppress(errors.MoEServeError, TimeoutError):
            async with asyncio.timeout(0.5):
                await stream.read()
    assert proxy.asked == []
    with pytest.raises(errors.ServiceUnreachable):
        await connect(ELSEWHERE).layers()
    assert proxy.asked[0] == f"CONNECT {ELSEWHERE} HTTP/1.1\r\n"
