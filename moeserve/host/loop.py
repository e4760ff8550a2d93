"""The loop of an expert host."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from moeserve.api.call_trace import PassTimes
from moeserve.errors import ExpertUnavailable, InvalidRequest, MoEServeError
from moeserve.experts import LayerBank
from moeserve.host.bank_table import BankTable
from moeserve.host.expert_cache import ExpertCache
from moeserve.host.lane import Lane
from moeserve.host.pass_clock import PassClock
from moeserve.host.passes import SlowPass, compute, slow_pass, written
from moeserve.host.relay import Relay, Relayed
from moeserve.transport import Listener, Loads, Work

_POLL_S = 1.0
#: between two times that frontends are told that an expert is still being read
_TELL_S = 0.5


class HostLoop:
    """Takes work from a listener and answers it with the experts on `bank_table` until stopped.

    All work that is waiting for the same experts, from any frontend, is computed in one pass (continuous merging as in EaaS,
    arXiv 2509.17863): an expert's weights are read once for all of it. Between two passes the frontends are listened to, so that work
    which they have given up meanwhile, or whose deadline has passed, is dropped before it begins. What belongs to other hosts goes to the
    `relay` first, so that they compute at the same time; without one, nothing is passed on.

    What needs experts that the `cache` has to read first is computed in a lane of its own, one pass after the other. Work that came later,
    for experts in memory, is not held up by it.
    """

    def __init__(self, bank_table: BankTable, listener: Listener, relay: Relay | None = None, cache: ExpertCache | None = None) -> None:
        self._bank_table = bank_table
        self._listener = listener
        self._relay = relay
        self._relayed: dict[Work, Relayed] = {}
        self.clock = PassClock()
        self._waiting: OrderedDict[tuple[int, LayerBank | None], list[Work]] = OrderedDict()
        self._lane: Lane[SlowPass] = Lane(listener.wake)
        self._cache, self._told, self._told_at = cache, Loads(), 0.0
        if cache is not None:
            cache.on_read = listener.wake
        self._stopping = False

    def run(self) -> None:
        """Blocks until `stop`; failed work is answered with an error and does not affect other work.

        The listener is closed when it returns or raises.
        """
        try:
            self._run()
        finally:
            self._lane.close()
            self._listener.close()
            if self._relay is not None:
                self._relay.close()

    def _run(self) -> None:
        is_idle = True
        while not self._stopping:
            for work in self._listener.poll(0 if not is_idle else _TELL_S if self._lane.is_busy else _POLL_S):
                self._waiting.setdefault((work.layer, self._bank_table.bank(work.layer, work.epoch)), []).append(work)
            self._finish_slow()
            turn = self._next()
            if turn is not None:
                self.clock.begin()
                self._serve(turn)
                if turn.bank is not None:
                    turn.bank.let_go()
                self.clock.end()
            is_idle = turn is None or not self._waiting
            self._finish_relayed()
            self._tell_loads()

    def stop(self) -> None:
        """From any thread: finish the pass that is running, then return from `run`."""
        self._stopping = True
        self._listener.wake()

    def hold(self, until: threading.Event) -> None:
        """As `Listener.hold`."""
        self._listener.hold(until)

    def _next(self) -> NextPass | None:
        """What has waited longest of what can be begun now."""
        for (layer, bank), works in self._waiting.items():
            ready = [work for work in works if bank is None or bank.claim(work.local_experts)]
            if ready or not self._lane.is_busy:
                rest = [work for work in works if work not in ready] if len(ready) < len(works) else []
                del self._waiting[layer, bank]
                if rest and self._lane.is_busy:  # behind the others: more may always come for what is in memory here
                    self._waiting[layer, bank], rest = rest, []
                return NextPass(layer, bank, _in_time(ready), _in_time(rest))
        return None

    def _serve(self, turn: NextPass) -> None:
        bank, valid, slow = turn.bank, self._begun(turn, turn.works), self._begun(turn, turn.slow)
        if bank is not None and valid:
            began_ns = time.monotonic_ns()
            failures = compute(bank, valid)
            times = PassTimes(began_ns, time.monotonic_ns())
            for work, failure in zip(valid, failures, strict=True):
                work.times = times
                self._finish(work, failure)
        if bank is not None and slow:
            self.clock.begin()
            self._lane.start(slow_pass(bank, slow))

    def _begun(self, turn: NextPass, works: Sequence[Work]) -> list[Work]:
        """Those that can be computed here; what belongs to other hosts is on its way."""
        valid = []
        for work in works:
            try:
                _check(work, turn.layer, turn.bank)
                self._pass_on(work)
                valid.append(work)
            except MoEServeError as error:
                work.fail(error)
        return valid

    def _finish_slow(self) -> None:
        done = self._lane.take()
        if done is not None:
            self.clock.end()
            failures = [done.failure] * len(done.works) if done.failure is not None else written(done.works, done.sums)
            for work, failure in zip(done.works, failures, strict=True):
                work.times = done.times
                self._finish(work, failure)

    def _tell_loads(self) -> None:
        """At once when experts were read, and now and then while one is: a host that waits for a disk is not stuck."""
        if self._cache is None:
            return
        loads, now = self._cache.loads, time.monotonic()
        if loads != self._told or (now >= self._told_at + _TELL_S and self._cache.reads(now)):
            self._told, self._told_at = loads, now
            self._listener.tell(loads)

    def _pass_on(self, work: Work) -> None:
        if not work.destinations:
            return
        if self._relay is None or work.destinations[0].host != self._relay.number:
            raise InvalidRequest(f"this host does not pass on what is addressed to host {work.destinations[0].host}")
        self._relayed[work] = self._relay.pass_on(work, self._listener.wake)

    def _finish(self, work: Work, error: MoEServeError | None) -> None:
        """Call it when this host's own part is computed or has failed: answers the work, unless other hosts still read it."""
        relayed = self._relayed.get(work)
        if relayed is None:
            _reply(work, error)
            return
        relayed.is_own_done = True
        if error is not None:
            relayed.own_error = error
            relayed.cancel()

    def _finish_relayed(self) -> None:
        """Answers the works whose other hosts have answered, and whose own parts are in the reply buffers."""
        for relayed in [relayed for relayed in self._relayed.values() if relayed.is_done and relayed.is_own_done]:
            work, error = relayed.work, relayed.own_error or relayed.error
            del self._relayed[work]
            work.on_cancel = None  # both would keep each other, and all that was lent, for the garbage collector
            for rows, partial in relayed.helped if error is None else ():
                work.reply_buffer().index_add_(0, rows, partial)
            _reply(work, error)


class NextPass(NamedTuple):
    """Works of a layer that are computed together, and beside them, after experts have been read, those that are `slow`."""

    layer: int
    bank: LayerBank | None
    works: Sequence[Work]
    slow: Sequence[Work]


def _in_time(works: Sequence[Work]) -> list[Work]:
    return [work for work in works if not work.drop_if_late()]


def _check(work: Work, layer: int, bank: LayerBank | None) -> None:
    """The checks that the transport cannot do: which experts and widths are here."""
    if bank is None:
        # Its frontend is behind; the caller may try again, or use another frontend.
        raise ExpertUnavailable(f"this host holds no experts of layer {layer} at epoch {work.epoch}")
    if work.hidden_states.shape[1] != bank.hidden_size:
        raise InvalidRequest(f"rows of layer {layer} are {bank.hidden_size} wide, got {work.hidden_states.shape[1]}")
    if int(work.local_experts[-1]) >= bank.num_experts:
        raise InvalidRequest(
            f"a pair names local expert {int(work.local_experts[-1])} of layer {layer}; this host has 0..{bank.num_experts - 1}"
        )


def _reply(work: Work, error: MoEServeError | None) -> None:
    if error is None:
        work.reply()
    else:
        work.fail(error)
