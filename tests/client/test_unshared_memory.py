"""Memory that cannot be shared at the moment, and memory that never can."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest
import torch

from moeserve.client.memory import CallerMemory
from tests.support.descriptors import no_free_descriptors

LARGE = torch.zeros(2**18)  # 1 MiB


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """By the client: what earlier tests have left in this process may log, too."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("moeserve.client")]


def test_what_passes_is_no_reason_never_to_share_memory(caplog: pytest.LogCaptureFixture) -> None:
    """A process has no descriptor left for a while, or a service as many callers as may wait to be accepted."""
    name = f"moeserve-test-{os.getpid()}".encode()
    memory = CallerMemory("127.0.0.1:1")
    with contextlib.ExitStack() as waiting:
        listening = waiting.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listening.bind(b"\0" + name)
        listening.listen(0)
        with no_free_descriptors():
            memory.open(name, 1.0)
        with pytest.raises(BlockingIOError):
            while True:
                sock = waiting.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK))
                sock.connect(b"\0" + name)
        memory.open(name, 1.0)
    assert memory.is_wanted(LARGE) and not said(caplog)
    memory.open(name, 1.0)  # nobody listens: the service is on another machine
    assert said(caplog) == [
        "no memory is shared with the service at 127.0.0.1:1, so large tensors travel in messages: [Errno 111] Connection refused"
    ]
