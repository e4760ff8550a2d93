"""Where the time of one call goes, recorded while it runs.

Times are seconds on this machine's monotonic clock, which all of its processes share.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Final, NamedTuple

#: metadata of a call that asks for its stages, and of the end of its answer that tells them
TIMING_KEY: Final = "moeserve-timing"


class PassTimes(NamedTuple):
    """When a host began and ended to compute, in nanoseconds on its own clock."""

    began_ns: int
    ended_ns: int


class HostTimes(NamedTuple):
    """A message of `rows` rows to a host, and its answer: sent and heard on this clock, its pass on the host's."""

    host: int
    rows: int
    sent: float
    began: float
    ended: float
    heard: float

    @property
    def is_same_clock(self) -> bool:
        """Whether the host is on this machine: the clocks of two machines differ by more than a call takes."""
        return self.sent <= self.began <= self.ended <= self.heard


class TimedStage(NamedTuple):
    """A stage of a call, from `start` to `end`."""

    name: str
    start: float
    end: float


class CallTrace:
    """A call in the service. Every mark names the stage that ends with it, so stages follow each other without gaps."""

    __slots__ = ("batch_tokens", "began", "ended", "epoch", "hosts", "layer", "marks", "tokens")

    def __init__(self) -> None:
        self.began = self.ended = time.monotonic()
        self.marks: list[tuple[str, float]] = []
        self.hosts: list[HostTimes] = []
        self.layer, self.tokens, self.epoch, self.batch_tokens = "", 0, 0, 0

    def mark(self, stage: str) -> None:
        """The stage has ended, and the next one begins."""
        self.marks.append((stage, time.monotonic()))

    def end(self) -> None:
        """The call has ended."""
        self.ended = time.monotonic()

    def stages(self) -> list[TimedStage]:
        """In their order. The wait for hosts is split into wake-up, kernel and reply by the times of the one that was heard last."""
        stages: list[TimedStage] = []
        start = self.began
        for name, end in list(self.marks):
            if name == "hosts":
                _split_hosts(stages, start, end, self.hosts)
            else:
                stages.append(TimedStage(name, start, end))
            start = end
        return stages

    def report(self) -> str:
        """JSON of bounded size, for the caller: microseconds of each stage, when the message was here, and what hosts were sent."""
        sums: defaultdict[str, float] = defaultdict(float)
        for name, start, end in self.stages():
            sums[name] += (end - start) * 1e6
        stages_us = {name: round(us, 1) for name, us in sums.items()}
        sent = {"hosts": len({one.host for one in self.hosts}), "messages": len(self.hosts), "rows": sum(one.rows for one in self.hosts)}
        facts = {"received_ns": round(self.began * 1e9), "epoch": self.epoch, "batch_tokens": self.batch_tokens}
        return json.dumps({**facts, **sent, "stages_us": stages_us}, separators=(",", ":"))


def mark_all(traces: Sequence[CallTrace], stage: str) -> None:
    """As `CallTrace.mark`, of calls that run together."""
    for trace in traces:
        trace.mark(stage)


def _split_hosts(stages: list[TimedStage], start: float, end: float, hosts: Sequence[HostTimes]) -> None:
    """Appends what the time from `start` to `end` was spent on. A host may have begun before the last message to others was sent."""
    heard = [one for one in hosts if start < one.heard <= end]
    if not heard:
        stages.append(TimedStage("host_network", start, end))
        return
    last = max(heard, key=lambda one: one.heard)
    if not last.is_same_clock:
        legs_s = max(0.0, end - start - (last.ended - last.began))
        stages += [TimedStage("host_network", start, start + legs_s / 2), TimedStage("kernel", start + legs_s / 2, end - legs_s / 2)]
        stages.append(TimedStage("host_network", end - legs_s / 2, end))
        return
    if stages and stages[-1].name == "doorbell" and last.began < start:
        ringing = stages.pop()
        start = max(ringing.start, last.began)
        stages.append(ringing._replace(end=start))
    began, ended = (min(max(at, start), end) for at in (last.began, last.ended))
    stages += [TimedStage("wake_up", start, began), TimedStage("kernel", began, ended), TimedStage("reply", ended, end)]
