"""One pass for all works that wait for a layer, on the thread that may answer them or on another.

R rows, N (row, expert) pairs, H hidden size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Final, NamedTuple

import torch

from moeserve.api.call_trace import PassTimes
from moeserve.errors import CheckpointError, MoEServeError
from moeserve.experts import LayerBank
from moeserve.log_limit import limited_logger
from moeserve.transport import Work

log = logging.getLogger(__name__)
_files = limited_logger(__name__)

#: of a pass; an expert of a user's own may call sys.exit
_FAULTS: Final = (Exception, SystemExit)


class Merged(NamedTuple):
    """The works of a pass laid end to end, as `LayerBank.run` takes them. sizes: how many of the rows each work has."""

    hidden_states: torch.Tensor
    row_index: torch.Tensor
    local_experts: torch.Tensor
    weights: torch.Tensor
    sizes: Sequence[int]


class SlowPass(NamedTuple):
    """A pass that has waited for experts: the sums [R, H] of each work, or why there are none."""

    works: Sequence[Work]
    sums: Sequence[torch.Tensor]
    failure: MoEServeError | None = None
    times: PassTimes | None = None


def compute(bank: LayerBank, works: Sequence[Work]) -> list[MoEServeError | None]:
    """Fills the reply buffers; returns the error of each work."""
    try:
        if len(works) == 1:
            bank.run(works[0].hidden_states, works[0].row_index, works[0].local_experts, works[0].weights, out=works[0].reply_buffer())
            return [None]
        sums = _run(bank, _merged(bank, works))
    except _FAULTS as error:  # a failing kernel must not end the host: callers get the error
        return [_as_user_error(error, works[0].layer)] * len(works)
    return written(works, sums)


def slow_pass(bank: LayerBank, works: Sequence[Work]) -> Callable[[], SlowPass]:
    """A pass for another thread than the one that may answer, with copies of what is in the messages."""
    try:
        whole = _merged(bank, works)
    except Exception as error:  # as above
        failed = SlowPass(works, (), _as_user_error(error, works[0].layer))
        return lambda: failed
    return partial(_compute_slowly, bank, works, whole)


def _compute_slowly(bank: LayerBank, works: Sequence[Work], whole: Merged) -> SlowPass:
    began_ns = time.monotonic_ns()
    try:
        return SlowPass(works, _run(bank, whole), times=PassTimes(began_ns, time.monotonic_ns()))
    except _FAULTS as error:  # as above, and what cannot be read
        return SlowPass(works, (), _as_user_error(error, works[0].layer))


def written(works: Sequence[Work], sums: Sequence[torch.Tensor]) -> list[MoEServeError | None]:
    """Fills the reply buffers; returns the error of each work."""
    errors: list[MoEServeError | None] = [None] * len(works)
    for index, (work, part) in enumerate(zip(works, sums, strict=True)):
        try:
            work.reply_buffer().copy_(part)
        except MoEServeError as error:
            errors[index] = error
    return errors


def _merged(bank: LayerBank, works: Sequence[Work]) -> Merged:
    """Copies of what is in the messages."""
    sizes = [len(work.hidden_states) for work in works]
    starts = [0, *accumulate(sizes)]
    row_index = torch.cat([work.row_index + start for work, start in zip(works, starts, strict=False)])
    local_experts, order = torch.cat([work.local_experts for work in works]).sort(stable=True)
    weights = torch.cat([work.weights for work in works])[order]
    hidden_states = torch.cat([work.hidden_states.to(bank.dtype) for work in works])
    return Merged(hidden_states, row_index[order], local_experts, weights, sizes)


def _run(bank: LayerBank, whole: Merged) -> Sequence[torch.Tensor]:
    """One pass; the answers [R, H] of each work."""
    out = torch.empty(len(whole.hidden_states), bank.hidden_size, dtype=torch.float32)
    bank.run(whole.hidden_states, whole.row_index, whole.local_experts, whole.weights, out=out)
    parts: Sequence[torch.Tensor] = out.split(whole.sizes)
    return parts


def _as_user_error(error: BaseException, layer: int) -> MoEServeError:
    if isinstance(error, CheckpointError):
        _files.warning("an expert of layer %d cannot be read: %s", layer, error)
        return error
    log.exception("layer %d failed", layer)
    if isinstance(error, MoEServeError):
        return error
    return MoEServeError(f"the expert host failed to compute layer {layer}: {type(error).__name__}")
