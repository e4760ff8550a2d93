"""Two networks and a wire between them that a test may slow down or cut: Linux network namespaces, TUN devices, and this in between.

`python -m tests.support.wire` is the wire. The networks have no names and no files; they end with the wire and the processes in them.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

ADDRESSES = ("10.203.0.1", "10.203.0.2")
REPOSITORY = Path(__file__).parents[2]
_MTU = 9000
#: a router drops what it could not send within this time
_BUFFER_S = 0.05
_CLONE_NEWNET = 0x40000000
_IFF_UP = 1
_IFF_TUN_NO_PI = 0x1001
_TUNSETIFF, _SIOCSIFADDR, _SIOCSIFDSTADDR, _SIOCSIFMTU, _SIOCSIFFLAGS = 0x400454CA, 0x8916, 0x8918, 0x8922, 0x8914
_libc = ctypes.CDLL(None, use_errno=True)


class NoWire(Exception):
    """This machine or this user has no network namespaces or no TUN devices; says why."""


@dataclass(frozen=True)
class Link:
    """What the wire does: delay of each packet, shares lost to the second network and back (1 = cut), and what it carries each way."""

    delay_s: float = 0.0
    loss: tuple[float, float] = (0.0, 0.0)
    bytes_per_s: float = 1e12


CUT = Link(loss=(1.0, 1.0))


class Wire:
    """`with Wire() as wire: wire.enter(0)`. Raises NoWire."""

    def __init__(self) -> None:
        command, pipe = [sys.executable, "-m", "tests.support.wire"], subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=REPOSITORY)
        said = self._said()
        if not said.startswith("ready "):
            self._end()
            raise NoWire(said)
        self._networks = [os.open(f"/proc/{self._process.pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC) for fd in said.split()[1:]]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for network in self._networks:
            os.close(network)
        self._end()

    def set(self, link: Link) -> None:
        """From now on; what is on its way arrives as it would have."""
        assert self._process.stdin is not None
        print(json.dumps(asdict(link)), file=self._process.stdin, flush=True)
        assert self._said() == "set"

    def enter(self, side: int) -> None:
        """This thread, and the threads and processes that it starts, are in the first or second network from now on."""
        _checked(_libc.setns(self._networks[side], _CLONE_NEWNET))

    @contextmanager
    def inside(self, side: int) -> Iterator[None]:
        """This thread is in the other network for a while."""
        with open("/proc/thread-self/ns/net") as before:
            self.enter(side)
            try:
                yield
            finally:
                _checked(_libc.setns(before.fileno(), _CLONE_NEWNET))

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()


class Direction:
    """Packets on their way to one of the networks."""

    def __init__(self, into: int) -> None:
        self._into = into
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._free_at = self._last_due = 0.0

    def take(self, packet: bytes, link: Link, loss: float) -> None:
        now = time.monotonic()
        begins = max(now, self._free_at)
        if random.random() < loss or begins - now > _BUFFER_S:
            return
        self._free_at = begins + len(packet) / link.bytes_per_s
        self._last_due = max(self._last_due, self._free_at + link.delay_s)
        self._waiting.append((self._last_due, packet))

    def deliver(self) -> float:
        """What is due; seconds until the next is, at most one."""
        while self._waiting:
            pause_s = self._waiting[0][0] - time.monotonic()
            if pause_s > 0:
                return min(pause_s, 1.0)
            with suppress(OSError):  # a full device drops it, as a router would
                os.write(self._into, self._waiting.popleft()[1])
        return 1.0


def _checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _network(mine: str, theirs: str) -> tuple[int, int]:
    """A new network with this thread in it: its TUN device, and the network itself."""
    _checked(_libc.unshare(_CLONE_NEWNET))
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"wire", _IFF_TUN_NO_PI))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for request, address in ((_SIOCSIFADDR, mine), (_SIOCSIFDSTADDR, theirs)):
            fcntl.ioctl(sock, request, struct.pack("16sHH4s16x", b"wire", socket.AF_INET, 0, socket.inet_aton(address)))
        fcntl.ioctl(sock, _SIOCSIFMTU, struct.pack("16si20x", b"wire", _MTU))
        for name in (b"wire", b"lo"):
            fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", name, _IFF_UP))
    return device, os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def main() -> None:
    """Until it is killed, or nobody is left to say anything."""
    try:
        (first, one), (second, two) = _network(*ADDRESSES), _network(*reversed(ADDRESSES))
    except OSError as error:
        print(f"network namespaces with TUN devices need root and a kernel that has them: {error}", flush=True)
        return
    print("ready", one, two, flush=True)
    link = Link()
    ways = {first: (Direction(second), 0), second: (Direction(first), 1)}
    while True:
        pause_s = min(direction.deliver() for direction, _ in ways.values())
        for fd in select.select([sys.stdin, *ways], [], [], pause_s)[0]:
            if fd is sys.stdin:
                line = sys.stdin.readline()
                if not line:
                    return
                link = Link(**json.loads(line))
                print("set", flush=True)
                continue
            direction, way = ways[fd]
            with suppress(BlockingIOError):
                for _ in range(32):
                    direction.take(os.read(fd, 65536), link, link.loss[way])


if __name__ == "__main__":
    main()
