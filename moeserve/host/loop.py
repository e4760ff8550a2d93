"""The loop of an expert host.

R rows, N (row, expert) pairs, H hidden size.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate

import torch

from moeserve.errors import ExpertUnavailable, InvalidRequest, MoEServeError
from moeserve.experts import ExpertBank
from moeserve.host.bank_table import BankTable
from moeserve.host.pass_clock import PassClock
from moeserve.host.relay import Relay, Relayed
from moeserve.transport import Listener, Work

log = logging.getLogger(__name__)

_POLL_S = 1.0


class HostLoop:
    """Takes work from a listener and answers it with the experts on `bank_table` until stopped.

    All work that is waiting for the same experts, from any frontend, is computed in one pass (continuous merging as in EaaS,
    arXiv 2509.17863): an expert's weights are read once for all of it. Between two passes the frontends are listened to, so that work
    which they have given up meanwhile, or whose deadline has passed, is dropped before it begins. What belongs to other hosts goes to the
    `relay` first, so that they compute at the same time; without one, nothing is passed on.
    """

    def __init__(self, bank_table: BankTable, listener: Listener, relay: Relay | None = None) -> None:
        self._bank_table = bank_table
        self._listener = listener
        self._relay = relay
        self._relayed: dict[Work, Relayed] = {}
        self.clock = PassClock()
        self._stopping = False

    def run(self) -> None:
        """Blocks until `stop`; failed work is answered with an error and does not affect other work.

        The listener is closed when it returns or raises.
        """
        try:
            self._run()
        finally:
            self._listener.close()
            if self._relay is not None:
                self._relay.close()

    def _run(self) -> None:
        waiting: OrderedDict[tuple[int, ExpertBank | None], list[Work]] = OrderedDict()
        while not self._stopping:
            for work in self._listener.poll(0 if waiting else _POLL_S):
                waiting.setdefault((work.layer, self._bank_table.bank(work.layer, work.epoch)), []).append(work)
            if waiting:
                (layer, bank), works = waiting.popitem(last=False)
                self.clock.begin()
                self._serve(layer, bank, [work for work in works if not work.drop_if_late()])
                self.clock.end()
            self._finish_relayed()

    def stop(self) -> None:
        """From any thread: finish the pass that is running, then return from `run`."""
        self._stopping = True
        self._listener.wake()

    def hold(self, until: threading.Event) -> None:
        """As `Listener.hold`."""
        self._listener.hold(until)

    def _serve(self, layer: int, bank: ExpertBank | None, works: Sequence[Work]) -> None:
        valid = []
        for work in works:
            try:
                _check(work, layer, bank)
                self._pass_on(work)
                valid.append(work)
            except MoEServeError as error:
                work.fail(error)
        if bank is not None and valid:
            for work, failure in zip(valid, _compute(bank, valid), strict=True):
                self._finish(work, failure)

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
        elif error is not None:
            relayed.own_error = error
            relayed.cancel()

    def _finish_relayed(self) -> None:
        """Answers the works whose other hosts have answered; own parts are in the reply buffers by now."""
        for relayed in [relayed for relayed in self._relayed.values() if relayed.is_done]:
            work, error = relayed.work, relayed.own_error or relayed.error
            del self._relayed[work]
            for rows, partial in relayed.helped if error is None else ():
                work.reply_buffer().index_add_(0, rows, partial)
            _reply(work, error)


def _check(work: Work, layer: int, bank: ExpertBank | None) -> None:
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


def _compute(bank: ExpertBank, works: Sequence[Work]) -> list[MoEServeError | None]:
    """Fills the reply buffers; returns the error of each work."""
    try:
        if len(works) == 1:
            bank.run(works[0].hidden_states, works[0].row_index, works[0].local_experts, works[0].weights, out=works[0].reply_buffer())
            parts: Sequence[torch.Tensor] = ()
        else:
            parts = _merged(bank, works)
    except Exception as error:  # a failing kernel must not end the host: callers get the error
        log.exception("layer %d failed", works[0].layer)
        return [_as_user_error(error, works[0].layer)] * len(works)
    errors: list[MoEServeError | None] = [None] * len(works)
    for index, (work, part) in enumerate(zip(works, parts, strict=False)):
        try:
            work.reply_buffer().copy_(part)
        except MoEServeError as error:
            errors[index] = error
    return errors


def _reply(work: Work, error: MoEServeError | None) -> None:
    if error is None:
        work.reply()
    else:
        work.fail(error)


def _merged(bank: ExpertBank, works: Sequence[Work]) -> Sequence[torch.Tensor]:
    """One pass over the rows of all works laid end to end; the answers [R, H] of each."""
    sizes = [len(work.hidden_states) for work in works]
    starts = [0, *accumulate(sizes)]
    row_index = torch.cat([work.row_index + start for work, start in zip(works, starts, strict=False)])
    local_experts, order = torch.cat([work.local_experts for work in works]).sort(stable=True)
    weights = torch.cat([work.weights for work in works])[order]
    hidden_states = torch.cat([work.hidden_states.to(bank.dtype) for work in works])
    out = torch.empty(len(hidden_states), bank.hidden_size)
    bank.run(hidden_states, row_index[order], local_experts, weights, out=out)
    parts: Sequence[torch.Tensor] = out.split(sizes)
    return parts


def _as_user_error(error: Exception, layer: int) -> MoEServeError:
    if isinstance(error, MoEServeError):
        return error
    return MoEServeError(f"the expert host failed to compute layer {layer}: {type(error).__name__}")
