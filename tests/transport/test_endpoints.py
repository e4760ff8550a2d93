"""Where a host may listen, and what is left there."""

from __future__ import annotations

import errno
import math
import os
import resource
import socket
import stat
import time
from contextlib import AsyncExitStack, closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from moeserve.errors import ConfigError
from moeserve.memory import create_shared
from moeserve.transport import ChannelClosed, Limits, choose_endpoint, connect, listen, local, shm_source
from moeserve.transport.wire import VERSION, Kind, kind_of, pack_note
from tests.support.descriptors import no_free_descriptors

from .rig import PATIENCE_S, Rig, random_message


def test_the_socket_is_private_and_goes_with_the_listener(tmp_path: Path) -> None:
    path = tmp_path / "host.sock"
    listener = listen(f"unix:{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    listener.close()
    listener.close()
    assert not path.exists()


def test_a_stale_socket_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "host.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(str(path))
    listen(f"unix:{path}").close()
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        listen(f"unix:{path}")
    assert path.read_text() == "precious"


def test_the_folder_must_be_private_and_the_path_short(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="107 bytes"):
        listen(f"unix:{tmp_path}/{'x' * 107}")
    with pytest.raises(ConfigError, match="0700"):
        listen(f"unix:{tmp_path}/missing/host.sock")
    tmp_path.chmod(0o750)
    with pytest.raises(ConfigError, match="0700"):
        listen(f"unix:{tmp_path}/host.sock")


def test_addresses_that_make_no_sense_are_named(tmp_path: Path) -> None:
    for endpoint in ("udp://127.0.0.1:1", "tcp://0.0.0.0:0", "tcp://127.0.0.1:port", "tcp://some.host:0"):
        with pytest.raises(ConfigError, match=endpoint):
            listen(f"unix:{tmp_path}/host.sock", endpoint)
        assert list(tmp_path.iterdir()) == []
    with closing(listen("local:twice")), pytest.raises(ConfigError, match="local:twice"):
        listen("local:twice")


async def test_a_channel_to_an_address_that_makes_no_sense_is_refused() -> None:
    for endpoint in ("udp://127.0.0.1:1", "tcp://127.0.0.1:port"):
        with pytest.raises(ConfigError, match=endpoint):
            await connect(endpoint)


def test_who_finds_a_host_of_this_process_as_it_closes_rings_no_bell_of_others() -> None:
    """Numbers of files that are closed are used again at once."""
    with closing(listen("local:leaving")):
        found = local._sources["local:leaving"]
    others = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(8)]
    with pytest.raises(ChannelClosed, match="no host listens at local:leaving"):
        found.dial()
    for other in others:
        with pytest.raises(BlockingIOError):
            os.eventfd_read(other)
        os.close(other)


@pytest.mark.parametrize("endpoint", ["local:host", "unix:{}/host.sock"])
async def test_a_process_without_free_descriptors_may_try_again(endpoint: str, tmp_path: Path) -> None:
    where = endpoint.format(tmp_path)
    with closing(listen(where)), no_free_descriptors(), pytest.raises(ChannelClosed, match="Too many open files"):
        await connect(where)


async def test_a_connection_over_tcp_that_cannot_be_watched_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last descriptor was that of the connection: what its kernel hears decides whether a host that computes is silent."""

    def refuse(_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with closing(listen("tcp://127.0.0.1:0")) as listener:
        monkeypatch.setattr(os, "dup", refuse)
        with pytest.raises(ChannelClosed, match="Too many open files"):
            await connect(listener.endpoints[0], timeout_s=PATIENCE_S)


def test_a_host_without_a_free_descriptor_waits_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm_source, "ACCEPT_RETRY_S", math.inf)
    path, limits = tmp_path / "host.sock", Limits(2**16, 2**20)
    fd, _ = create_shared(limits.max_pool_bytes)
    with closing(listen(f"unix:{path}", limits=limits)) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        with no_free_descriptors():
            sock.connect(str(path))
            socket.send_fds(sock, [pack_note(Kind.HELLO, code=VERSION, value=limits.max_pool_bytes)], [fd])
            listener.poll(0)
            began = time.monotonic()
            listener.poll(0.1)
            assert time.monotonic() - began > 0.05, "it does not turn in circles"
        os.close(fd)
        monkeypatch.setattr(shm_source, "time", SimpleNamespace(monotonic=lambda: math.inf))
        for _ in range(2):
            listener.poll(0)
        assert kind_of(sock.recv(100, socket.MSG_DONTWAIT)) is Kind.ACCEPT


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this system has no IPv6")
async def test_a_host_may_have_an_address_of_ipv6() -> None:
    limits = Limits(2**16, 2**16)
    with closing(listen("tcp://[::1]:0", limits=limits)) as listener:
        assert listener.endpoints[0].startswith("tcp://[::1]:")
        rig = Rig(listener, limits, None)
        async with rig.frontend() as channel:
            await rig.forward(channel, random_message())


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2**12, reason="as many files may not be open here")
async def test_a_frontend_reaches_hundreds_of_hosts_over_tcp() -> None:
    """Each channel has three sockets, and by itself libzmq has room for 1023."""
    limits = Limits(2**16, 2**16)
    with closing(listen("tcp://127.0.0.1:0", limits=limits)) as listener:
        async with AsyncExitStack() as channels:
            for _ in range(350):
                await channels.enter_async_context(Rig(listener, limits, None).frontend())


def test_memory_within_a_node_and_tcp_between_nodes() -> None:
    unix, tcp = "unix:/private/host.sock", "tcp://127.0.0.1:1"
    for endpoints in ((unix, tcp), (tcp, unix)):
        assert choose_endpoint(endpoints, is_same_node=True) == unix
        assert choose_endpoint(endpoints, is_same_node=False) == tcp
    assert choose_endpoint((tcp,), is_same_node=True) == tcp
    with pytest.raises(ChannelClosed, match="from another node"):
        choose_endpoint((unix,), is_same_node=False)
