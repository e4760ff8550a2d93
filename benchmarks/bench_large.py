"""Memory of a service while many callers send it messages of 250 MB at once, and afterwards.

`python benchmarks/bench_large.py --help`. The service runs as `moeserve serve --cluster threads`; every call comes over a connection of its
own, from one process of callers that speak plain gRPC, never retry, and read their answers. `--kinds`: of one call each, `unary`, or in a
stream each, `stream`; `malformed` messages are as large and cannot be read; of `half` messages nothing more comes after 100 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from typing import Any

import grpc
import torch
from bench_overload import OPTIONS, Fleet, rss_mb, service
from bench_precision import cpu_model

from moeserve.api.wire import WireRequest, encode_forward_request

FORWARD, STREAM = "/moeserve.v1.MoEService/Forward", "/moeserve.v1.MoEService/ForwardStream"
HIDDEN, INTERMEDIATE = 4096, 64
MESSAGE_BYTES, HALF_BYTES = 250_000_000, 100_000_000
KINDS = ("unary", "stream", "malformed unary", "malformed stream", "half stream")
LOOK_S, LATER_S = 0.02, 10


async def send(target: str, kind: str, count: int, seconds: float) -> Counter[str]:
    """What became of `count` calls at once."""
    tokens = MESSAGE_BYTES // (4 * HIDDEN)
    message = bytes(MESSAGE_BYTES) if "malformed" in kind else encode_forward_request(WireRequest(torch.randn(tokens, HIDDEN)))
    target = throttled(target) if "half" in kind else target

    async def one() -> str:
        async with grpc.aio.insecure_channel(target, options=OPTIONS) as channel:
            try:
                if "unary" in kind:
                    forward: Any = channel.unary_unary(FORWARD)
                    await forward(message, timeout=seconds)
                else:
                    stream: Any = channel.stream_stream(STREAM)
                    await stream(iter([message]), timeout=seconds).read()
            except grpc.aio.AioRpcError as error:
                # INTERNAL is how gRPC's client says that a write was under way at the deadline.
                return "cut off at the deadline" if error.code() is grpc.StatusCode.INTERNAL else error.code().name
            return "answered"

    return Counter(await asyncio.gather(*(one() for _ in range(count))))


def throttled(target: str) -> str:
    """Where connections lead to `target`, of which it gets HALF_BYTES and then nothing more."""
    host, _, port = target.rpartition(":")
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)

    def passed_on(here: socket.socket, there: socket.socket, left: float) -> None:
        with suppress(OSError):
            while said := here.recv(2**18):
                if left > 0:
                    there.sendall(said)
                left -= len(said)

    def accept() -> None:
        while True:
            here, there = listening.accept()[0], socket.create_connection((host, int(port)))
            for ends in ((here, there, HALF_BYTES), (there, here, float("inf"))):
                threading.Thread(target=passed_on, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return f"127.0.0.1:{listening.getsockname()[1]}"


def measured(pid: int, target: str, kind: str, count: int, seconds: float) -> str:
    """One row."""
    idle = rss_mb(pid)
    command = [sys.executable, __file__, "--caller", json.dumps([target, kind, count, seconds])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as caller:
        most = idle
        while caller.poll() is None:
            most = max(most, rss_mb(pid))
            time.sleep(LOOK_S)
        assert caller.stdout is not None
        codes = json.loads(caller.stdout.read().splitlines()[-1])
    time.sleep(LATER_S)
    became = ", ".join(f"{name} {number}" for name, number in sorted(codes.items()))
    return f"| {count} x {kind} | {idle:.0f} | **{most:.0f}** | {rss_mb(pid):.0f} | {became} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=KINDS)
    parser.add_argument("--count", type=int, default=12, help="messages at once, each of which takes 250 MB of the callers' process, too")
    parser.add_argument("--seconds", type=float, default=30.0, help="deadline of the calls")
    parser.add_argument("--caller", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.caller:
        print(json.dumps(asyncio.run(send(*json.loads(options.caller)))))
        return
    print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores")
    print(", ".join(f"{name} {version(name)}" for name in ("moeserve", "torch", "grpcio")))
    print("\n| messages of 250 MB at once | idle, MB | at most | 10 s later | became |\n|---|--:|--:|--:|---|")
    for kind in options.kinds:
        with service(Fleet("threads", 1), [(HIDDEN, INTERMEDIATE)]) as (target, pid):
            print(measured(pid, target, kind, options.count, options.seconds), flush=True)


if __name__ == "__main__":
    main()
