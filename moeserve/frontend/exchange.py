"""The messages of one layer: written to where they are sent from, and sent.

T tokens of a part, H hidden size, R rows of one message.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from moeserve.api.call_trace import mark_all
from moeserve.config import CommunicationConfig, LayerSpec
from moeserve.errors import InvalidRequest, Overloaded
from moeserve.frontend.compute import Compute
from moeserve.frontend.delivery import Delivery
from moeserve.frontend.parcel import Parcel, Sent, Way
from moeserve.frontend.patterns import DIRECT, PATTERNS, Message
from moeserve.frontend.routed import Part
from moeserve.layer.dispatch import HostWork
from moeserve.observe.metrics import Metrics
from moeserve.transport import Channel, Lease, PassOn, WorkShape


class Draft(NamedTuple):
    """A message in the memory its channel sends from."""

    message: Message
    channel: Channel
    lease: Lease


class Unsent(NamedTuple):
    """What is not under way, as its host is down, or, with the `error`, has no room for it."""

    work: HostWork
    error: Overloaded | None = None


class Exchange:
    """Brings parts of batches to the hosts: in the configured pattern first, directly to each host what is sent again.

    The first message is for speed, the second for certainty.
    """

    def __init__(self, layer: int, spec: LayerSpec, communication: CommunicationConfig, metrics: Metrics, compute: Compute) -> None:
        self.layer = layer
        self._spec = spec
        self._pattern = communication.pattern
        self._messages = {name: metrics.messages.labels(name) for name in {self._pattern, DIRECT}}
        self._compute = compute

    async def send(self, delivery: Delivery, part: Part) -> None:
        """All that is planned of a part, as far as its hosts are up and have room; the rest is lost. Raises InvalidRequest."""
        await self._send(delivery, part, part.planned.works, self._pattern)

    async def resend(self, delivery: Delivery, part: Part, works: Sequence[HostWork], again: Parcel | None = None) -> None:
        """`works` one by one; they were lost with the parcel `again`. Raises as `send`."""
        await self._send(delivery, part, works, DIRECT, again)

    async def second_way(self, delivery: Delivery, part: Part, works: Sequence[HostWork]) -> Way | None:
        """What is under way already, to other hosts; None when there is none, or one of them has no room, or has just gone."""
        try:
            drafts, unsent = await self._drafts(part, works, DIRECT)
        except InvalidRequest:
            return None  # the first way may still come to its end
        return None if unsent or not drafts else Way([self._transmit(delivery, part, draft) for draft in drafts])

    async def ask(self, part: Part, work: HostWork, channel: Channel, timeout_s: float) -> torch.Tensor:
        """What one host makes of `work`, [R, H] float32, whatever else it owes. Raises what it answers, Overloaded, InvalidRequest."""
        message = Message((work,), PassOn.NOTHING, work.rows, work.row_index)
        draft = await self._compute(part.num_elements, self._draft, part, message, channel)
        answer = channel.send(draft.lease, layer=self.layer, epoch=part.view.epoch, timeout_s=timeout_s)
        return (await answer).tensor

    async def _send(self, delivery: Delivery, part: Part, works: Sequence[HostWork], pattern: str, again: Parcel | None = None) -> None:
        drafts, unsent = await self._drafts(part, works, pattern)
        self._messages[pattern].inc(len(drafts))
        mark_all(delivery.traces, "write")
        for draft in drafts:
            delivery.send(part, draft.message.works, self._transmit(delivery, part, draft), again)
        mark_all(delivery.traces, "doorbell")
        for work, error in unsent:
            delivery.lose(part, work, again, error=error)

    async def _drafts(self, part: Part, works: Sequence[HostWork], pattern: str) -> tuple[list[Draft], list[Unsent]]:
        """What can be sent, and what cannot. All that threads need of the hosts is read here, on the loop."""
        links = {work.host: part.view.links[work.host] for work in works}
        channels = {host: channel for host, link in links.items() if (channel := link.channel_at(part.view.epoch)) is not None}
        nodes = {host: link.node for host, link in links.items()}
        reached = works if len(channels) == len(links) else [work for work in works if work.host in channels]
        drafts, full = await self._compute(part.num_elements, self._write, part, partial(PATTERNS[pattern], reached, nodes), channels)
        return drafts, full if reached is works else [*full, *(Unsent(work) for work in works if work.host not in channels)]

    def _write(
        self, part: Part, messages: Callable[[], list[Message]], channels: Mapping[int, Channel]
    ) -> tuple[list[Draft], list[Unsent]]:
        """Messages as far as there is room for them; what one that has none was to pass on can be sent directly."""
        drafts: list[Draft] = []
        unsent: list[Unsent] = []
        for message in messages():
            try:
                drafts.append(self._draft(part, message, channels[message.host]))
            except Overloaded as error:
                known = error.with_traceback(None)  # with its frames it would keep the memory of the others
                unsent += [Unsent(work, known if work.host == message.host else None) for work in message.works]
        return drafts, unsent

    def _draft(self, part: Part, message: Message, channel: Channel) -> Draft:
        """Rows go straight to where their channel sends from: the one copy of the data on this side."""
        destinations = message.destinations
        sizes = message.rows.numel(), self._spec.hidden_size, message.local_experts.numel()  # len() of a tensor is slow
        lease = channel.lease(WorkShape(*sizes, part.hidden_states.dtype, len(destinations)))
        lease.write(part.hidden_states, message.rows, message.row_index, message.local_experts, message.weights)
        if destinations:
            lease.address(destinations)
        return Draft(message, channel, lease)

    def _transmit(self, delivery: Delivery, part: Part, draft: Draft) -> Sent:
        message, view, now = draft.message, part.view, time.monotonic()
        timeout_s = max(0.0, delivery.deadline - now)
        draft.lease.is_timed = bool(delivery.traces)
        future = draft.channel.send(draft.lease, layer=self.layer, epoch=view.epoch, timeout_s=timeout_s, pass_on=message.pass_on)
        for work in message.works:
            view.links[work.host].count_until(future, work.rows.numel())
        return Sent(message.host, message.works, message.rows, future, now)
