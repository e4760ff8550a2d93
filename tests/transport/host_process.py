"""A host in a process of its own that does what a message's layer asks for: `python -m tests.transport.host_process ENDPOINT...`.

The first line that it prints names its endpoints without keys, then the one with keys and its public key; then one line follows for all
that happens. Its standard input brings the secret key and the public key of the frontend that may use the one with keys.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from functools import partial

import torch

from moeserve.experts import ExpertBank
from moeserve.transport import HostKeys, KeyPair, Listener, Work, listen
from tests.support.stacked import Stacked
from tests.transport.rig import answer

PASS_S = 2.0


class Order(IntEnum):
    """What layer means which."""

    ANSWER = 0
    KEEP = 1  # unanswered until the next ANSWER_ALL
    ANSWER_ALL = 2
    COUNT = 3  # answers with how many descriptors and threads it has
    PYTHON = 4  # computes for PASS_S in the interpreter, then answers
    TORCH = 5  # in one of torch's operators
    KERNEL = 6  # in the compiled kernels


def compute_in_python() -> None:
    """A loop that never waits and never calls anything that lets go of the interpreter's lock."""
    end, count = time.monotonic() + PASS_S, 0
    while time.monotonic() < end:
        count += 1


def grow(compute: Callable[[int], None]) -> None:
    """One call after the other, each twice as large, until one has lasted for PASS_S."""
    size, lasted = 256, 0.0
    while lasted < PASS_S:
        size, before = 2 * size, time.monotonic()
        compute(size)
        lasted = time.monotonic() - before


def compute_in_torch(rows: int) -> None:
    """One product."""
    width = 2048
    torch.rand(1, width).expand(rows, width) @ torch.rand(width, width)


def compute_in_kernel(rows: int) -> None:
    """One pass of a bank."""
    width = 1024
    bank = ExpertBank(Stacked(torch.rand(1, 2 * width, width), torch.rand(1, width, width)).experts("swiglu"), width, torch.float32)
    index = torch.arange(rows, dtype=torch.int32)
    bank.run(
        torch.rand(1, width).expand(rows, width).contiguous(), index, torch.zeros_like(index), torch.ones(rows), torch.empty(rows, width)
    )


COMPUTE = {
    Order.PYTHON: compute_in_python,
    Order.TORCH: partial(grow, compute_in_torch),
    Order.KERNEL: partial(grow, compute_in_kernel),
}


def obey(work: Work, kept: list[Work]) -> None:
    """Does what the work's layer says."""
    order = Order(work.layer)
    print("got", order.name, flush=True)
    if order is Order.KEEP:
        work.on_cancel = lambda: print("cancelled", flush=True)
        kept.append(work)
        return
    if order is Order.ANSWER_ALL:
        while kept:
            answer(kept.pop())
    if order in COMPUTE:
        COMPUTE[order]()
    if order is Order.COUNT:
        work.reply_buffer().copy_(torch.tensor([[len(os.listdir("/proc/self/fd")), threading.active_count()]]))
        work.reply()
    else:
        answer(work)


def main() -> None:
    """Until it is killed."""
    secret, public, frontend = sys.stdin.readline().split()
    torch.set_num_threads(1)
    listeners: list[Listener] = [
        listen(*sys.argv[1:]),
        listen("tcp://127.0.0.1:0", keys=HostKeys(KeyPair(public, secret), frozenset({frontend}))),
    ]
    print(*(endpoint for listener in listeners for endpoint in listener.endpoints), flush=True)
    kept: list[Work] = []
    while True:
        for listener in listeners:
            for work in listener.poll(0.01):
                obey(work, kept)


if __name__ == "__main__":
    main()
