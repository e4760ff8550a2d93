"""The doors of a service, and how each is knocked at by strangers: what comes back is counted, what should not is told."""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import re
import socket
import struct
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import grpc
from hostile import Hostile
from hostile_inference import HostileInference
from running import Running

from moeserve.addresses import parse_target
from moeserve.transport.wire import VERSION, Kind, pack_note

ADMIN: Final = (("authorization", "Bearer of-the-administrator"),)
FOLLOW: Final = (("authorization", "Bearer of-a-frontend"),)
#: what nobody may be told whatever he sends: these are our mistakes, or others were kept from being served
MISTAKES: Final = ("INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED", "UNAVAILABLE")
_TIMEOUT_S: Final = 30
_INFERENCE: Final = "inference.GRPCInferenceService"
_POOL_BYTES: Final = 2**20

#: sends one message, or as many as it says, and tells what came of each
Knock = Callable[[], Coroutine[Any, Any, list[str]]]


class Grpc:
    """The services of gRPC, those of administrators and followers with their tokens: the messages are what is wrong."""

    def __init__(self, running: Running, hostile: Hostile) -> None:
        self._hostile, self._inference = hostile, HostileInference(hostile)
        self._channel = grpc.aio.insecure_channel(running.target, options=[("grpc.max_send_message_length", -1)])

    def knocks(self) -> dict[str, Knock]:
        return {
            "Forward": lambda: self._one("moeserve.v1.MoEService/Forward", self._hostile.forward()),
            "ForwardStream": self._stream,
            "ModelInfer": lambda: self._one(f"{_INFERENCE}/ModelInfer", self._inference.infer()),
            "ModelStreamInfer": self._inferred,
            "GRPCInferenceService, others": lambda: self._one(*self._inference.asked()),
            "MoEService, others": self._others,
            "AdminService": self._change,
            "ControlService": self._follow,
            "health, reflection": self._told,
        }

    async def close(self) -> None:
        await self._channel.close()

    def _unary(self, method: str) -> Any:
        return self._channel.unary_unary(f"/{method}")

    def _streamed(self, method: str) -> Any:
        return self._channel.stream_stream(f"/{method}")

    async def _one(self, method: str, message: bytes, metadata: Sequence[tuple[str, str]] = ()) -> list[str]:
        try:
            await self._unary(method)(message, metadata=metadata, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            return [error.code().name]
        return ["OK"]

    async def _many(self, method: str, messages: Sequence[bytes], metadata: Sequence[tuple[str, str]] = (), answers: int = 1) -> list[str]:
        """`answers` of them are waited for."""
        call = self._streamed(method)(iter(messages), metadata=metadata, timeout=_TIMEOUT_S)
        try:
            for _ in range(answers):
                if await call.read() is grpc.aio.EOF:
                    break
            call.cancel()
        except grpc.aio.AioRpcError as error:
            # A client of asyncio says so when the call has ended before it has sent everything.
            ended_before = error.details() == "Internal error from Core"
            return ["ended before" if ended_before else error.code().name] * len(messages)
        return ["answered"] * len(messages)

    async def _stream(self) -> list[str]:
        return await self._many("moeserve.v1.MoEService/ForwardStream", [self._hostile.forward() for _ in range(20)], answers=20)

    async def _inferred(self) -> list[str]:
        return await self._many(f"{_INFERENCE}/ModelStreamInfer", [self._inference.infer() for _ in range(20)], answers=20)

    async def _others(self) -> list[str]:
        method = self._hostile.chance.choice(("ListLayers", "GetStats"))
        return await self._one(f"moeserve.v1.MoEService/{method}", self._hostile.noise(0, 3, 50))

    async def _change(self) -> list[str]:
        method, message = self._hostile.change()
        return await self._one(f"moeserve.v1.AdminService/{method}", message, ADMIN)

    async def _follow(self) -> list[str]:
        reports = [self._hostile.report() for _ in range(self._hostile.chance.choice((1, 3)))]
        return await self._many("moeserve.v1.ControlService/Follow", reports, FOLLOW)

    async def _told(self) -> list[str]:
        method = self._hostile.chance.choice(
            ("grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch", "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        )
        return await self._many(method, [self._hostile.noise(0, 3, 50, 2000)])


class Sockets:
    """The metrics port; with hosts in processes of their own also their unix sockets and TCP ports."""

    def __init__(self, running: Running, hostile: Hostile) -> None:
        self._hostile, self._chance = hostile, hostile.chance
        ((host, port),) = parse_target(re.sub(r"^http://|/metrics$", "", running.metrics)).hosts
        self._metrics = host, port
        self._unix, self._tcp = [], []
        for name, pid in running.processes.items():
            if name != "service":
                inodes = _inodes(pid)
                self._unix += list(_listening_unix(inodes))
                self._tcp += list(_listening_tcp(inodes))

    def knocks(self) -> dict[str, Knock]:
        found: dict[str, Knock] = {"metrics port": lambda: self._say(self._metrics, self._http())}
        if self._unix:
            found["unix socket of a host"] = self._ring
        if self._tcp:
            found["TCP port of a host"] = lambda: self._say(self._chance.choice(self._tcp), self._zmtp())
        return found

    async def close(self) -> None:
        """Nothing stays open."""

    async def _say(self, address: tuple[str, int], said: bytes) -> list[str]:
        """Some are reset in the middle, some are left without a word."""
        reader, writer = await asyncio.open_connection(*address)
        try:
            writer.write(said)
            if self._chance.random() < 0.2:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                return ["left"]
            await writer.drain()
            async with asyncio.timeout(0.2):
                answer = await reader.read(100)
            return [answer.split(b"\r\n")[0][:12].decode("latin-1") if answer.startswith(b"HTTP") else "bytes" if answer else "closed"]
        except TimeoutError:
            return ["silence"]
        except OSError:
            return ["closed"]
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def _http(self) -> bytes:
        noise = self._hostile.noise(1, 30, 300)
        return self._chance.choice(
            (
                noise,
                b"GET /metrics HTTP/1.1\r\n\r\n",
                b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
                b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
                b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 1000 + b"\r\n",
                b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n" + noise,
                b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\n\r\n",
                b"GET /metrics?name[]=" + noise.hex().encode() + b" HTTP/1.1\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01" + noise,
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            )
        )

    def _zmtp(self) -> bytes:
        noise = self._hostile.noise(1, 10, 64, 5000)
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01"
        return self._chance.choice(
            (noise, greeting + b"NULL" + bytes(48), greeting + b"CURVE" + bytes(47) + noise, b"GET / HTTP/1.1\r\n\r\n")
        )

    async def _ring(self) -> list[str]:
        """In a thread: asyncio has no unix sockets of packets."""
        return await asyncio.to_thread(self._ring_now, self._chance.choice(self._unix), self._chance.randrange(2**32))

    def _ring_now(self, path: str, seed: int) -> list[str]:
        hostile = Hostile(seed)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as doorbell:
            doorbell.settimeout(0.5)
            try:
                doorbell.connect(path)
                _greet(doorbell, hostile)
                for _ in range(hostile.chance.choice((0, 1, 5))):
                    kind, size = (
                        hostile.chance.choice((Kind.HELLO, Kind.WORK, Kind.CANCEL)),
                        hostile.chance.choice((1, 15, 16, 55, 56, 1000)),
                    )
                    doorbell.send(bytes([kind]) + hostile.chance.randbytes(size - 1))
                return ["answered" if doorbell.recv(2000) else "closed"]
            except TimeoutError:
                return ["silence"]
            except OSError:
                return ["closed"]


def _greet(doorbell: socket.socket, hostile: Hostile) -> None:
    """As a frontend does, or with memory that is too small, may shrink, is a file, or is none."""
    chance, sealed = hostile.chance, hostile.chance.random() < 0.7
    fd = os.open("/dev/zero", os.O_RDWR) if chance.random() < 0.1 else os.memfd_create("stranger", os.MFD_ALLOW_SEALING)
    try:
        with suppress(OSError):
            os.ftruncate(fd, chance.choice((0, 4096, _POOL_BYTES, _POOL_BYTES)))
            if sealed:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        size = chance.choice((_POOL_BYTES, _POOL_BYTES, _POOL_BYTES, 0, 2**31, 2**63))
        hello = chance.choice((pack_note(Kind.HELLO, code=VERSION, value=size), chance.randbytes(16)))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd] * chance.choice((0, 1, 1, 1, 2))))]
        doorbell.sendmsg([hello], rights if rights[0][2] else [])
    finally:
        os.close(fd)


def _inodes(pid: int) -> set[str]:
    links = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            links.append(os.readlink(path))
    return {found[1] for link in links if (found := re.match(r"socket:\[(\d+)\]", link))}


def _listening_unix(inodes: set[str]) -> Iterator[str]:
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) == 8 and fields[6] in inodes and fields[4] == "0005" and "moeserve" in fields[7]:
            yield fields[7]


def _listening_tcp(inodes: set[str]) -> Iterator[tuple[str, int]]:
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[9] in inodes and fields[3] == "0A":
            address, port = fields[1].split(":")
            yield socket.inet_ntoa(struct.pack("<I", int(address, 16))), int(port, 16)
