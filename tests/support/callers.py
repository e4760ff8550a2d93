"""Clients that keep a service busy while a test disturbs it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from operator import ge
from types import TracebackType
from typing import Any, Self

import torch

from moeserve import Client, MoELayer
from tests.support.closeness import assert_close
from tests.support.waiting import until

CALLERS = 4
#: of a caller between two questions: what goes on meanwhile needs the processors, too
PAUSE_S = 0.01


class Callers:
    """Each asks again and again until the end, and checks every answer."""

    def __init__(self, target: str, layer: Mapping[str, Any]) -> None:
        """layer: arguments of the MoELayer that gives the same answers."""
        self.slowest_s = 0.0
        self._target, self._layer, self._ending, self._answered = target, MoELayer(**layer), threading.Event(), [0] * CALLERS
        self._pool = ThreadPoolExecutor(CALLERS)
        self._running = [self._pool.submit(self._call, caller) for caller in range(CALLERS)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ending.set()
        for running in self._running:
            running.result()

    def until_each(self, count: int) -> None:
        """Every one of them has got that many answers from now on, or one of them an error."""
        enough = [answered + count for answered in self._answered]
        until(lambda: all(map(ge, self._answered, enough)) or any(running.done() for running in self._running))

    def _call(self, caller: int) -> None:
        with Client(self._target, timeout=60) as client:
            while not self._ending.wait(PAUSE_S):
                hidden_states, begun = torch.randn(8, self._layer.spec.hidden_size), time.monotonic()
                answer = client.forward(hidden_states).hidden_states
                self.slowest_s = max(self.slowest_s, time.monotonic() - begun)
                assert_close(answer, self._layer(hidden_states))
                self._answered[caller] += 1
