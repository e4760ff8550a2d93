"""Load on a service, and the measured results.

Closed loop: a fixed number of requests is in progress at any time. Open loop: requests start by the clock, finished or not, and
latency counts from the time when a request should have started, so a service that stalls cannot hide it by slowing the load down
("coordinated omission"; Tene, How NOT to Measure Latency, 2013; as wrk2 does).
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from moeserve.api.output import ForwardOutput
from moeserve.api.tensors import is_finite
from moeserve.errors import MoEServeError

# Without it, a closed loop would spin on a service that refuses at once.
_PAUSE_AFTER_FAILURE_S = 0.05
_MS = 1000.0

#: sends the request with that number
Send = Callable[[int], Awaitable[ForwardOutput]]
#: raises WrongAnswer
Check = Callable[[ForwardOutput], None]
#: receives the fraction that is done
Progress = Callable[[float], None]


class WrongAnswer(MoEServeError):
    """An answer of another shape or dtype than the request, or with values that are not finite."""


@dataclass(frozen=True)
class Load:
    """One of concurrency and rate (requests/s), and one of duration_s and num_requests."""

    tokens: int
    concurrency: int | None
    rate: float | None
    duration_s: float | None
    num_requests: int | None


@dataclass
class Measured:
    """The results of one load. Times in seconds; requested and dropped count (token, expert) pairs."""

    load: Load
    latencies_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    requested: int = 0
    dropped: int = 0
    elapsed_s: float = 0.0
    #: how late the latest request left; a large value = this machine could not keep up with the rate
    send_lag_s: float = 0.0

    @property
    def failed(self) -> int:
        """Requests that ended in an error, of any kind."""
        return self.errors.total()

    def as_json(self) -> dict[str, Any]:
        """Latencies and rates count answered requests."""
        ordered, load = sorted(self.latencies_s), self.load
        quantiles = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
        return {
            "tokens_per_request": load.tokens,
            **({"concurrency": load.concurrency} if load.rate is None else {"rate": load.rate}),
            "requests": len(ordered) + self.failed,
            "failed": self.failed,
            "errors": dict(self.errors),
            "elapsed_s": self.elapsed_s,
            "requests_per_s": len(ordered) / self.elapsed_s,
            "tokens_per_s": len(ordered) * load.tokens / self.elapsed_s,
            "latency_ms": {name: _MS * _ranked(ordered, q) if ordered else None for name, q in quantiles.items()},
            "requested_pairs": self.requested,
            "dropped_pairs": self.dropped,
            "send_lag_ms": _MS * self.send_lag_s,
        }


async def run(load: Load, send: Send, check: Check, progress: Progress) -> Measured:
    """Put `load` on the service; returns once every request has been answered or has failed."""
    measured = Measured(load)
    start = time.perf_counter()
    numbers = _numbers(load, start, progress)
    async with asyncio.TaskGroup() as tasks:
        if load.rate is None:
            for _ in range(load.concurrency or 1):
                tasks.create_task(_one_after_another(numbers, send, check, measured))
        else:
            for number in numbers:
                intended = start + number / load.rate
                await asyncio.sleep(intended - time.perf_counter())
                tasks.create_task(_one(number, intended, send, check, measured))
    measured.elapsed_s = time.perf_counter() - start
    return measured


def _numbers(load: Load, start: float, progress: Progress) -> Iterator[int]:
    """0, 1, … until the load is over: by the clock or, at a rate, by when requests should start."""
    for number in itertools.count():
        if load.num_requests is not None:
            done = number / load.num_requests
        else:
            assert load.duration_s is not None
            done = (time.perf_counter() - start if load.rate is None else number / load.rate) / load.duration_s
        progress(min(done, 1.0))
        if done >= 1.0:
            return
        yield number


async def _one_after_another(numbers: Iterator[int], send: Send, check: Check, measured: Measured) -> None:
    for number in numbers:
        if not await _one(number, time.perf_counter(), send, check, measured):
            await asyncio.sleep(_PAUSE_AFTER_FAILURE_S)


async def _one(number: int, intended: float, send: Send, check: Check, measured: Measured) -> bool:
    measured.send_lag_s = max(measured.send_lag_s, time.perf_counter() - intended)
    try:
        answer = await send(number)
        latency_s = time.perf_counter() - intended
        check(answer)
    except WrongAnswer:
        measured.errors["WRONG_ANSWER"] += 1
        return False
    except MoEServeError as error:
        measured.errors[error.code.name] += 1
        return False
    measured.latencies_s.append(latency_s)
    measured.requested += int(answer.requested.sum())
    measured.dropped += int(answer.dropped.sum())
    return True


def check_answer(answer: ForwardOutput, like: torch.Tensor) -> None:
    """Raises WrongAnswer unless the answer is finite, has the shape and dtype of `like` [T, H], and accounts for every pair."""
    rows = answer.hidden_states
    if rows.shape != like.shape or rows.dtype != like.dtype:
        raise WrongAnswer(f"the answer is {list(rows.shape)} {rows.dtype}; expected {list(like.shape)} {like.dtype}")
    if not is_finite(rows):
        raise WrongAnswer("the answer is not finite")
    if not torch.equal(answer.requested, answer.processed + answer.dropped):
        raise WrongAnswer("requested is not processed + dropped")


def _ranked(ordered: list[float], q: float) -> float:
    """The nearest-rank quantile: one of the measured latencies."""
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]
