"""The port of a name with several addresses."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

import pytest

from moeserve.errors import ConfigError
from moeserve.server import ports
from tests.support.ports import kept_port

KEYS = ("server.host", "server.port")


@pytest.fixture(autouse=True)
async def two_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(host: str, port: int, **_: object) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port)) for address in ("127.0.0.1", "127.0.0.2")]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)


async def test_a_port_that_is_chosen_is_the_same_at_all() -> None:
    port = await ports.free_port("both", 0, *KEYS)
    for address in ("127.0.0.1", "127.0.0.2"):
        with socket.create_server((address, port)):
            pass


async def test_a_port_that_is_taken_at_one_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    bind = ports._bind

    def second_is_taken(family: int, address: tuple[str, int]) -> int:
        chosen.append(port := bind(family, address))
        if len(chosen) <= 4 and len(chosen) % 2 == 0:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return port

    monkeypatch.setattr(ports, "_bind", second_is_taken)
    assert await ports.free_port("both", 0, *KEYS) == chosen[4] == chosen[5]


async def test_a_given_port_must_be_free_at_all() -> None:
    with socket.create_server(("127.0.0.2", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"server.host, server.port: cannot listen on both:{port}: Address already in use"):
            await ports.free_port("both", port, *KEYS)


async def test_an_address_of_another_machine_is_refused_unless_the_name_has_one_of_this(monkeypatch: pytest.MonkeyPatch) -> None:
    """192.0.2.0/24 is nobody's (RFC 5737)."""
    hosts = {"elsewhere": ["192.0.2.1"], "both": ["192.0.2.1", "127.0.0.1"]}

    async def getaddrinfo(host: str, port: int, **_: object) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port)) for address in hosts[host]]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    port = kept_port()
    assert await ports.free_port("both", port, *KEYS) == port
    with pytest.raises(ConfigError, match=f"cannot listen on elsewhere:{port}: Cannot assign requested address"):
        await ports.free_port("elsewhere", port, *KEYS)
