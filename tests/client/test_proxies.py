"""Proxies of the environment: never asked for this machine, nor between processes of a service."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from moeserve import errors
from moeserve.cli.app import main
from moeserve.client import AdminClient, Client, ControlClient

from .conftest import Calls
from .engine import FunctionEngine, X, served

VARIABLES = ("grpc_proxy", "http_proxy", "https_proxy", "all_proxy")
#: an address that is only there for documents to name it
ELSEWHERE = "198.51.100.1:50051"


class Proxy:
    """Remembers what it was asked for, and refuses it."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.asked: list[str] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection, connection.makefile("rb") as lines:
                first = lines.readline().decode()
                if first == "end\n":
                    return
                self.asked.append(first)
                with suppress(OSError):
                    connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")

    def stop(self) -> None:
        with socket.create_connection(self._socket.getsockname()) as last:
            last.sendall(b"end\n")
        self._thread.join()
        self._socket.close()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy()
    for name in VARIABLES:
        monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv(name.upper(), proxy.url)
        for without in ("no_proxy", "no_grpc_proxy"):
            monkeypatch.delenv(without, raising=False)
            monkeypatch.delenv(without.upper(), raising=False)
    yield proxy
    proxy.stop()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1", "0.0.0.0"])
async def test_this_machine_is_called_without_one(
    engine: FunctionEngine, connect: Callable[..., Calls], proxy: Proxy, tmp_path: Path, host: str
) -> None:
    (tmp_path / "token").write_text("secret")
    try:
        with served(engine, host=host, insecure=True) as (target, _, _):
            assert (await connect(target).forward(X)).hidden_states.tolist() == X.tolist()
            with AdminClient(target, "secret") as admin, pytest.raises(errors.MoEServeError, match="does not answer this"):
                admin.status()
            async with ControlClient(target, "secret").follow() as stream:
                with pytest.raises(errors.PermissionDenied, match="lets no frontend follow"):
                    await stream.read()
            assert await asyncio.to_thread(main, ["top", target, "--once"]) == 0
    except errors.ConfigError as error:
        pytest.skip(str(error))  # without IPv6
    assert proxy.asked == []


def test_a_socket_file_is_called_without_one(proxy: Proxy, tmp_path: Path) -> None:
    with Client(f"unix:{tmp_path}/moe.sock") as client, pytest.raises(errors.ServiceUnreachable, match="No such file"):
        client.layers()
    assert proxy.asked == []


async def test_only_callers_of_other_machines_ask_one(connect: Callable[..., Calls], proxy: Proxy) -> None:
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
