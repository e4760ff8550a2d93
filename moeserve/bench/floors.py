"""What the stages of a call would take if nothing were done but what cannot be left out, measured on this machine.

T tokens of a call, H hidden size, I intermediate size, E experts, K choices per token.
"""

from __future__ import annotations

import asyncio
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import grpc
import numpy as np
import torch

from moeserve.bench import floor_process
from moeserve.bench.stages import CallTraffic
from moeserve.client import LayerInfo
from moeserve.errors import MoEServeError
from moeserve.experts.activations import is_gated
from moeserve.programs.interpreter import interpreter

_TIMES: Final = 20
_PINGS: Final = 50
#: as after a pause, when caches have been used for something else
_PAUSE_S: Final = 0.001
#: longer reads take as many times as long
_MOST_READ_BYTES: Final = 2**27
#: of weights, where they are known by their type
_WEIGHT_TYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class HostPart(NamedTuple):
    """What one host computes of a call: experts whose weights are read, and their rows."""

    experts: int
    rows: int


class Floors:
    """`with Floors() as floors: floors.of(...)`: seconds, the best of what computes, medians of what wakes up. Its process ends with it."""

    def __enter__(self) -> Self:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [*interpreter(), "-m", floor_process.__name__, str(theirs.fileno())]
        pipe, fds = subprocess.PIPE, [theirs.fileno()]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, pass_fds=fds)  # noqa: S603 - this very program
        theirs.close()
        assert self._process.stdout is not None
        port = self._process.stdout.readline().decode().strip()
        if not port:
            self.__exit__(None, None, None)
            raise MoEServeError("the process that floors are measured with has ended")
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=[*floor_process.UNBOUNDED, ("grpc.enable_http_proxy", 0)])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if hasattr(self, "_channel"):
            self._channel.close()
        self._socket.close()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def of(self, layer: LayerInfo, tokens: int, sent: CallTraffic, busiest: HostPart, threads: int) -> dict[str, float | None]:
        """Seconds by stage; None = cannot be told: the layer's experts are modules, or in few bits."""
        with _threads(1):  # as a frontend has: on busy cores, two wait for each other
            return self._of(layer, tokens, sent, _kernel_s(layer, busiest, threads))

    def _of(self, layer: LayerInfo, tokens: int, sent: CallTraffic, kernel_s: float | None) -> dict[str, float | None]:
        grpc_in, grpc_out = self._echo(sent)
        doorbell, wake_up, reply = self._ping()
        rows_bytes = sent.rows * layer.hidden_size * 4
        return {
            "client_encode": _copy_s(sent.request_bytes),
            "grpc_in": grpc_in,
            "decode": _read_s(sent.request_bytes),
            "queue": asyncio.run(_turn_s()),
            "route": _gate_s(tokens, layer),
            "plan": _sort_s(tokens * layer.top_k),
            # Rows travel in the dtype that was sent: as many bytes each as in the request.
            "write": _copy_s(sent.rows * sent.request_bytes // tokens),
            "doorbell": doorbell * sent.messages,
            "wake_up": wake_up,
            "kernel": kernel_s,
            "reply": reply,
            "combine": _copy_s(rows_bytes),
            "encode": _copy_s(sent.reply_bytes),
            "grpc_out": grpc_out,
            "client_decode": 0.0,
            "other": 0.0,
        }

    def _echo(self, sent: CallTraffic) -> tuple[float, float]:
        """A message of the same bytes to the bare server, and its answer back."""
        call: Any = self._channel.unary_unary(floor_process.METHOD)
        message = bytes(sent.request_bytes)
        there, back = [], []
        for _ in range(_PINGS):
            began = time.monotonic_ns()
            metadata = ((floor_process.REPLY_BYTES, str(sent.reply_bytes)),)
            _, ended = call.with_call(message, metadata=metadata, wait_for_ready=True)
            done = time.monotonic_ns()
            here, left = map(int, str(dict(ended.trailing_metadata())[floor_process.TIMES]).split(","))
            there.append((here - began) / 1e9)
            back.append((done - left) / 1e9)
        return statistics.median(there), statistics.median(back)

    def _ping(self) -> tuple[float, float, float]:
        """To send 56 bytes to a process that sleeps, until it runs, and until its answer is here."""
        found = []
        for _ in range(_PINGS):
            time.sleep(_PAUSE_S)
            began = time.monotonic_ns()
            self._socket.send(bytes(56))
            sent = time.monotonic_ns()
            woken = int.from_bytes(self._socket.recv(8), "little")
            done = time.monotonic_ns()
            rung = min(sent, woken)
            found.append((rung - began, woken - rung, done - woken))
        doorbell, wake_up, reply = (statistics.median(each) / 1e9 for each in zip(*found, strict=True))
        return doorbell, wake_up, reply


def busiest_part(rows: Sequence[int], host_of: Mapping[int, int]) -> HostPart:
    """Of the host with most rows; rows [E] of each expert, and the host of its first copy."""
    parts: dict[int, HostPart] = {}
    for expert, asked in enumerate(rows):
        if asked and expert in host_of:
            had = parts.get(host_of[expert], HostPart(0, 0))
            parts[host_of[expert]] = HostPart(had.experts + 1, had.rows + asked)
    return max(parts.values(), key=lambda part: part.rows, default=HostPart(0, 0))


def _least_s(function: Callable[[], object]) -> float:
    function()
    found = []
    for _ in range(_TIMES):
        began = time.perf_counter()
        function()
        found.append(time.perf_counter() - began)
    return min(found)


def _copy_s(nbytes: int) -> float:
    if not nbytes:
        return 0.0
    source, to = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
    return _least_s(lambda: np.copyto(to, source))


def _read_s(nbytes: int) -> float:
    """To read so many bytes once, as often as they fit into the cache from there."""
    read = min(nbytes, _MOST_READ_BYTES)
    numbers = torch.ones(max(1, read // 4))
    return _least_s(numbers.sum) * max(1.0, nbytes / _MOST_READ_BYTES)


def _gate_s(tokens: int, layer: LayerInfo) -> float:
    rows, weight = torch.randn(tokens, layer.hidden_size), torch.randn(layer.hidden_size, layer.num_experts)
    return _least_s(lambda: (rows @ weight).topk(layer.top_k))


def _sort_s(pairs: int) -> float:
    experts = np.random.default_rng(0).integers(0, 256, pairs, dtype=np.int32)
    return _least_s(lambda: experts.argsort(kind="stable"))


def _kernel_s(layer: LayerInfo, part: HostPart, threads: int) -> float | None:
    """The longer of: to read the weights of its experts, and one dense product of as many operations, on as many threads.

    The product is in the type of the weights or in float32, whichever is faster: many CPUs multiply no 16-bit numbers.
    """
    dtype, matrices = _WEIGHT_TYPES.get(layer.dtype), 3 if is_gated(layer.activation) else 2
    if dtype is None or not layer.intermediate_size:
        return None
    if not part.rows:
        return 0.0
    wide = matrices * layer.intermediate_size
    with _threads(max(1, threads)):
        rows, weight = torch.randn(part.rows, layer.hidden_size), torch.randn(layer.hidden_size, wide)
        products = [(rows.to(kind), weight.to(kind)) for kind in {dtype, torch.float32}]
        product_s = min(_least_s(partial(torch.matmul, *product)) for product in products)
        return max(_read_s(part.experts * layer.hidden_size * wide * dtype.itemsize), product_s)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch computes on so many meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


async def _turn_s() -> float:
    """A task that starts and ends on an idle event loop."""
    found = []
    for _ in range(_TIMES):
        began = time.perf_counter()
        await asyncio.create_task(asyncio.sleep(0))
        found.append(time.perf_counter() - began)
    return min(found)
