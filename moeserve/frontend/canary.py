"""Rows that nobody asked for, and a look at what comes back: of hosts that were lost or have erred, and of releases before they are used.

E experts that live on hosts, N experts of one host, H hidden size.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

import torch

from moeserve.api.tensors import is_finite
from moeserve.errors import ConfigError, ExpertUnavailable, MoEServeError
from moeserve.frontend import timing
from moeserve.frontend.delivery import Delivery
from moeserve.frontend.exchange import Exchange
from moeserve.frontend.parcel import Parcel, ParcelState
from moeserve.frontend.routed import Part
from moeserve.frontend.view import LayerView
from moeserve.layer.dispatch import Dispatch, HostWork, plan_again
from moeserve.layer.head import Planned
from moeserve.transport import Channel

#: new weights that answer with numbers so many times as large as the old ones are not meant
_IMPLAUSIBLE: Final = 1e4
#: of each expert; a gate that is closed for one of them lets another through
_ROWS: Final = 8
#: for weights in use to answer: where hosts that have them are gone, new weights may be what brings them back
_PRESENT_S: Final = 5.0

log = logging.getLogger(__name__)


class Canary:
    """Of one layer.

    spills: hosts have not all of their experts in memory. Reading all would take too long, and drive out those in demand: one of each host
    answers.
    """

    def __init__(self, exchange: Exchange, spills: bool = False) -> None:
        self._exchange = exchange
        self._spills = spills

    async def try_host(self, view: LayerView, host: int, channel: Channel, timeout_s: float) -> None:
        """One row through each expert of a host. Raises what it answers, ExpertUnavailable when that is NaN or Inf."""
        spec, count = view.head.spec, 1 if self._spills else int(view.placement.shared_local_expert[host])
        numbers, rows = torch.arange(count), _rows(count, spec.hidden_size)
        kept = torch.ones(count, 1, dtype=torch.bool)
        part = Part(slice(0, count), rows, view, Planned(numbers[:, None], kept.float(), kept, Dispatch([], numbers), None))
        work = HostWork(host, numbers, numbers, numbers.int(), torch.ones(count, dtype=torch.float32))
        partial = await self._exchange.ask(part, work, channel, timeout_s)
        if not is_finite(partial):
            raise ExpertUnavailable(f"it answers layer {view.head.spec.name} with sums that are not finite")

    async def try_release(self, view: LayerView, before: LayerView, deadline: float) -> None:
        """A few rows through each expert of a view that is not used yet, and, where weights were swapped, through what they replace.

        Raises what goes wrong, and ConfigError when new weights make numbers that are not finite, or implausibly large.
        """
        tried = self._tried(view)
        new = await self._sums(view, tried, deadline)
        name = view.head.spec.name
        if not is_finite(new):
            experts = tried[(~new.isfinite()).flatten(1).any(dim=1)].tolist()
            raise ConfigError(f"experts {experts[:8]} of layer {name} answer with NaN or Inf at epoch {view.epoch}")
        if view.revision == before.revision:
            return
        try:
            old = _largest(await self._sums(before, tried, min(deadline, time.monotonic() + _PRESENT_S)))
        except MoEServeError as error:
            log.warning("new weights of layer %s are not compared with those in use: %s", name, error)
            return
        sizes, usual = _largest(new), old.maximum(old.median())
        if (where := (sizes > _IMPLAUSIBLE * usual) & (usual > 0)).any():
            index = int(where.nonzero()[0])
            expert = int(tried[index])
            raise ConfigError(
                f"expert {expert} of layer {name} answers a random row with a vector of length {sizes[index]:.3g} at epoch {view.epoch}; "
                f"it is {usual[index]:.3g} at present, and {_IMPLAUSIBLE:g} times that is allowed"
            )

    def _tried(self, view: LayerView) -> torch.Tensor:
        """The experts [E] that answer: all, or the first of each host."""
        if not self._spills:
            return torch.arange(view.head.spec.num_hosted_experts)
        return torch.tensor(sorted({shards[0].expert for _, shards in view.placement.by_host()}))

    async def _sums(self, view: LayerView, tried: torch.Tensor, deadline: float) -> torch.Tensor:
        """[E, _ROWS, H] float32: what each expert of `tried` makes of rows of its own. Raises ExpertUnavailable at the `deadline`."""
        spec = view.head.spec
        ids = tried.repeat_interleave(_ROWS)[:, None]
        weights, kept = torch.ones(ids.shape), torch.ones(ids.shape, dtype=torch.bool)
        rows = _rows(len(ids), spec.hidden_size)
        planned = view.head.plan(ids, weights, kept, rows, None, view.placement, view.loads("least_outstanding"), is_routed=True)
        part, delivery = Part(slice(0, len(rows)), rows, view, planned), Delivery(deadline)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await self._exchange.send(delivery, part)
                while delivery.owed:
                    await delivery.change(time.monotonic() + timing.RETRY_S)
                    for parcel in delivery.owed:
                        await self._again(parcel, delivery)
        except TimeoutError:
            raise ExpertUnavailable(f"layer {spec.name} did not answer a canary before the deadline") from None
        finally:
            delivery.cancel()
        for answers in delivery.take_all_answers().values():
            part.add([answer._replace(is_final=True) for answer in answers])
        return part.so_far().view(-1, _ROWS, spec.hidden_size)

    async def _again(self, parcel: Parcel, delivery: Delivery) -> None:
        """What was lost, as soon as some host can be asked. Raises what a host has answered instead of sums."""
        if parcel.error is not None:
            raise parcel.error.with_traceback(None)
        view, works = parcel.part.view, parcel.works
        # A host that had nothing of the epoch answers at once, and would be asked without a pause.
        behind = parcel.erred if time.monotonic() < parcel.since + timing.BEHIND_S else ()
        if parcel.state is ParcelState.LOST and (hosts := view.loads("least_outstanding", parcel.erred)) is not None:
            works = plan_again(works, len(parcel.part.hidden_states), view.placement, hosts)
        there = (work.host for work in works if view.links[work.host].channel_at(view.epoch) is not None)
        if parcel.state is ParcelState.LOST and any(host not in behind for host in there):
            delivery.close(parcel, ParcelState.GIVEN_UP)
            await self._exchange.resend(delivery, parcel.part, works, parcel)


def _largest(sums: torch.Tensor) -> torch.Tensor:
    """[E]: the length of each expert's longest answer."""
    lengths: torch.Tensor = sums.norm(dim=2)
    return lengths.amax(dim=1)


def _rows(count: int, hidden_size: int) -> torch.Tensor:
    """[count, H] float32, always the same."""
    return torch.randn(count, hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
