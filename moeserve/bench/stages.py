"""Calls whose stages are told, one after the other, as `Client.forward` makes them.

T tokens of a call, E experts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch

from moeserve.api.call_trace import TIMING_KEY
from moeserve.api.wire import WireRequest
from moeserve.bench.load import check_answer
from moeserve.client.answers import decode_answer, encode_request, output_of
from moeserve.client.connection import Reach
from moeserve.client.line import Line
from moeserve.client.stubs import ServiceStubs
from moeserve.errors import MoEServeError

#: all that can take time, in the order of a call; the pairs of `APART` are told together where their ends have different clocks
STAGES: Final = (
    *("client_encode", "grpc_in", "network", "decode", "queue", "route", "plan", "write", "doorbell", "wake_up", "host_network", "kernel"),
    *("reply", "remedy", "combine", "encode", "grpc_out", "client_decode", "other"),
)
#: shown instead of two others
APART: Final = {"network": ("grpc_in", "grpc_out"), "host_network": ("wake_up", "reply")}
_WARM_UP: Final = 5


class CallTraffic(NamedTuple):
    """What a call has moved: bytes of its messages, messages and rows to hosts, rows [E] of each expert."""

    request_bytes: int
    reply_bytes: int
    messages: int
    rows: int
    experts: Sequence[int]


class TimedCall(NamedTuple):
    """Seconds of a call and of its stages, by name; together they are the whole."""

    whole_s: float
    stages_s: Mapping[str, float]
    sent: CallTraffic


class Told(NamedTuple):
    """What the service says of a call: when it had read the message, on its clock; seconds of its stages; what it sent to hosts."""

    received_s: float
    stages_s: Mapping[str, float]
    messages: int
    rows: int


def timed_calls(reach: Reach, requests: Sequence[WireRequest], calls: int) -> list[TimedCall]:
    """`calls` requests one after the other, after a few that do not count. Raises what the service raises."""
    line = Line(reach, ServiceStubs)
    try:
        found = [_timed_call(line, requests[number % len(requests)]) for number in range(_WARM_UP + calls)]
    finally:
        if (channel := line.close()) is not None:
            channel.close()
    return found[_WARM_UP:]


def _timed_call(line: Line, request: WireRequest) -> TimedCall:
    began = time.monotonic()
    message = encode_request(request)
    encoded = time.monotonic()
    with line.call(None) as call:
        metadata = (*line.reach.metadata, (TIMING_KEY, "1"))
        data, ended = call.stubs.forward.with_call(message, timeout=call.timeout_s, metadata=metadata)
    received = time.monotonic()
    output = output_of(decode_answer(data, torch.device("cpu")))
    decoded = time.monotonic()
    check_answer(output, request.hidden_states)
    told = read_told(dict(ended.trailing_metadata() or ()).get(TIMING_KEY), line.reach.target)
    stages = {"client_encode": encoded - began, **told.stages_s, **_ways(encoded, received, told), "client_decode": decoded - received}
    stages["other"] = stages.get("other", 0.0) + (decoded - began) - sum(stages.values())
    return TimedCall(decoded - began, stages, CallTraffic(len(message), len(data), told.messages, told.rows, output.processed.tolist()))


def _ways(encoded: float, received: float, told: Told) -> dict[str, float]:
    """From here to the service and back. Its clock is ours if what it says lies between: those of two machines differ by more."""
    inside_s = sum(told.stages_s.values())
    if encoded <= told.received_s and told.received_s + inside_s <= received:
        return {"grpc_in": told.received_s - encoded, "grpc_out": received - told.received_s - inside_s}
    return {"network": received - encoded - inside_s}


def read_told(text: Any, target: str) -> Told:
    """What came with the answer. Raises MoEServeError where it is not what a service says."""
    if text is None:
        raise MoEServeError(f"the service at {target} does not say where the time of a call goes: it is older than this command")
    try:
        said = json.loads(text)
        stages = {str(name): float(us) / 1e6 for name, us in said["stages_us"].items() if name in STAGES}
        return Told(int(said["received_ns"]) / 1e9, stages, int(said["messages"]), int(said["rows"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise MoEServeError(f"the service at {target} says {text!r:.100} of a call, which cannot be read") from None
