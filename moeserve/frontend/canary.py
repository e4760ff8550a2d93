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
#: so many experts are named in an error
_NAMED: Final = 8

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
        """One row through each expert of a host, also the shared one. Raises what it answers, ExpertUnavailable when that is NaN or Inf."""
        spec, shared = view.head.spec, int(view.placement.shared_local_expert[host])
        local_experts = torch.arange(1 if self._spills else shared)
        if spec.shared_mixing is not None:
            local_experts = torch.cat([local_experts, torch.tensor([shared])])
        rows, planned = _rows(len(local_experts), spec.hidden_size), _planned(host, local_experts)
        part = Part(slice(0, len(rows)), rows, view, planned)
        partial = await self._exchange.ask(part, planned.works[0], channel, timeout_s)
        if not is_finite(partial):
            raise ExpertUnavailable(f"it answers layer {view.head.spec.name} with sums that are not finite")

    async def try_release(self, view: LayerView, before: LayerView, deadline: float) -> None:
        """A few rows through each expert of a view that is not used yet, and, where weights were swapped, through what they replace.

        Raises what goes wrong, and ConfigError when new weights make numbers that are not finite, or implausibly large.
        """
        tried = self._tried(view)
        new = await self._sums(view, tried, deadline)
        name = view.head.spec.name
        experts = [*(f"expert {expert}" for expert in tried.tolist()), "the shared expert"]
        if not is_finite(new):
            bad = (~new.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
            named = ", ".join([experts[index] for index in bad[:_NAMED]])
            raise ConfigError(f"{named} of layer {name} answer{'s' * (len(bad) == 1)} with NaN or Inf at epoch {view.epoch}")
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
            raise ConfigError(
                f"{experts[index]} of layer {name} answers a random row with a vector of length {sizes[index]:.3g} at epoch {view.epoch}; "
                f"it is {usual[index]:.3g} at present, and {_IMPLAUSIBLE:g} times that is allowed"
            )

    def _tried(self, view: LayerView) -> torch.Tensor:
        """The experts [E] that answer: all, or the first of each host."""
        if not self._spills:
            return torch.arange(view.head.spec.num_hosted_experts)
        return torch.tensor(sorted({shards[0].expert for _, shards in view.placement.by_host()}))

    async def _sums(self, view: LayerView, tried: torch.Tensor, deadline: float) -> torch.Tensor:
        """[E, _ROWS, H] float32: what each expert of `tried`, and the shared one, makes of rows of its own.

        Raises ExpertUnavailable at the `deadline`.
        """
        spec = view.head.spec
        ids = tried.repeat_interleave(_ROWS)[:, None]
        weights, kept = torch.ones(ids.shape), torch.ones(ids.shape, dtype=torch.bool)
        rows, hosts = _rows(len(ids), spec.hidden_size), view.loads("least_outstanding")
        planned = view.head.plan(ids, weights, kept, rows, None, view.placement, hosts, is_routed=True)
        sums = [await self._sum(Part(slice(0, len(rows)), rows, view, planned), deadline)]
        if spec.shared_mixing is not None:
            able = view.placement.shared_local_expert.nonzero()[0].tolist()
            host = next((host for host in able if view.links[host].is_live_at(view.epoch)), able[0])
            planned = _planned(host, torch.full((_ROWS,), int(view.placement.shared_local_expert[host])))
            sums.append(await self._sum(Part(slice(0, _ROWS), _rows(_ROWS, spec.hidden_size), view, planned), deadline))
        return torch.cat(sums).view(-1, _ROWS, spec.hidden_size)

    async def _sum(self, part: Part, deadline: float) -> torch.Tensor:
        """[R, H] float32: what hosts make of the rows [R, H] of a part. Raises as `_sums`."""
        spec, delivery = part.view.head.spec, Delivery(deadline)
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
        return part.so_far()

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


def _planned(host: int, local_experts: torch.Tensor) -> Planned:
    """A row for each of the local experts [R] of a host, ascending."""
    numbers = torch.arange(len(local_experts))
    ones = torch.ones(len(numbers), 1, dtype=torch.bool)
    work = HostWork(host, numbers, numbers.int(), local_experts.int(), torch.ones(len(numbers), dtype=torch.float32))
    return Planned(numbers[:, None], ones.float(), ones, Dispatch([work], numbers[:0]), None)


def _largest(sums: torch.Tensor) -> torch.Tensor:
    """[E]: the length of each expert's longest answer."""
    lengths: torch.Tensor = sums.norm(dim=2)
    return lengths.amax(dim=1)


def _rows(count: int, hidden_size: int) -> torch.Tensor:
    """[count, H] float32, always the same."""
    return torch.randn(count, hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
