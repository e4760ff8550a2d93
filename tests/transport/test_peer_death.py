"""Real processes that die or never answer."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeserve.transport import ChannelClosed, connect, listen

from .rig import PATIENCE_S, connect_patiently, random_message, send

#: takes work and never answers
MUTE_HOST = """
import sys
from moeserve.transport import listen
listener = listen(*sys.argv[1:])
print(*listener.endpoints, flush=True)
while True:
    for work in listener.poll(10):
        print("got", work.id, flush=True)
"""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", MUTE_HOST, f"unix:{tmp_path}/host.sock", "tcp://127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


async def test_a_killed_host_is_noticed_on_every_channel_at_once(host: subprocess.Popen[str], tmp_path: Path) -> None:
    assert host.stdout is not None
    endpoints = (await asyncio.to_thread(host.stdout.readline)).split()
    assert endpoints[0] == f"unix:{tmp_path}/host.sock" and endpoints[1].startswith("tcp://127.0.0.1:")
    channels = [await connect_patiently(endpoint) for endpoint in endpoints]
    futures = [send(channel, random_message()) for channel in channels]
    for _ in channels:
        assert (await asyncio.to_thread(host.stdout.readline)).startswith("got")
    assert not any(future.done() for future in futures)
    host.kill()
    for channel, future in zip(channels, futures, strict=True):
        with pytest.raises(ChannelClosed, match=channel.endpoint):
            await asyncio.wait_for(future, PATIENCE_S)
        assert channel.closed.is_set()
        with pytest.raises(ChannelClosed, match=channel.endpoint):
            await connect(channel.endpoint, timeout_s=PATIENCE_S)


async def test_a_host_that_hangs_up_instead_of_greeting(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as listening:
        listening.bind(str(tmp_path / "host.sock"))
        listening.listen()
        connecting = asyncio.create_task(connect(f"unix:{tmp_path}/host.sock", timeout_s=PATIENCE_S))
        sock, _ = await asyncio.get_running_loop().sock_accept(listening)
        sock.close()
        with pytest.raises(ChannelClosed, match=r"host\.sock"):
            await connecting


@pytest.mark.parametrize("endpoint", ["unix:{}/nobody.sock", "tcp://127.0.0.1:9", "local:nobody"])
async def test_where_nobody_listens_the_endpoint_is_named(endpoint: str, tmp_path: Path) -> None:
    endpoint = endpoint.format(tmp_path)
    with pytest.raises(ChannelClosed, match=endpoint):
        await connect(endpoint, timeout_s=PATIENCE_S)


@pytest.mark.parametrize("endpoint", ["unix:{}/busy.sock", "tcp://127.0.0.1:0", "local:busy"])
async def test_a_host_that_never_polls_is_given_up_on(endpoint: str, tmp_path: Path) -> None:
    listener = listen(endpoint.format(tmp_path))
    with pytest.raises(ChannelClosed, match=r"within 0\.05 s"):
        await connect(listener.endpoints[0], timeout_s=0.05)
    listener.close()
