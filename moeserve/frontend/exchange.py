"""The messages of one layer: written, sent, collected, and sent again when a host was lost.

T tokens of a part, H hidden size, R rows of one message.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

from moeserve.config import CommunicationConfig, LayerSpec, ResilienceConfig
from moeserve.dispatch import HostWork, permute
from moeserve.errors import ExpertUnavailable
from moeserve.frontend.compute import Compute
from moeserve.frontend.link import HostLink
from moeserve.frontend.part import Answer, Part, Sent
from moeserve.frontend.patterns import DIRECT, PATTERNS, Message
from moeserve.metrics import Metrics
from moeserve.transport import Channel, ChannelClosed, Lease, PeerLost, WorkShape


class Draft(NamedTuple):
    """A message in the memory its channel sends from."""

    message: Message
    channel: Channel
    lease: Lease


class Exchange:
    """Brings parts of batches to the hosts, in the configured pattern, and their answers back.

    What is lost with a host is always sent again directly, each host its own share: the first message is for speed, the second for
    certainty.
    """

    def __init__(
        self,
        layer: int,
        spec: LayerSpec,
        epoch: int,
        links: Sequence[HostLink],
        communication: CommunicationConfig,
        resilience: ResilienceConfig,
        metrics: Metrics,
        compute: Compute,
    ) -> None:
        self._layer = layer
        self._spec = spec
        self._epoch = epoch
        self._links = links
        self._pattern = communication.pattern
        self._resilience = resilience
        self._retries = metrics.expert_retries.labels("host_lost")
        self._messages = {name: metrics.messages.labels(name) for name in {self._pattern, DIRECT}}
        self._compute = compute

    async def send(self, part: Part, deadline: float) -> None:
        """Everything whose host is up leaves, all in flight; the rest is lost already. Raises Overloaded, InvalidRequest."""
        await self._send(part, part.works, self._pattern, deadline)

    async def collect(self, part: Part) -> None:
        """Waits for the answers to what was sent; what was lost with a host is in `part.lost` then. Raises what a host raised."""
        for sent in part.sent:
            try:
                partial = await sent.future
                part.answers.append(Answer(sent.works[0].host, sent.rows, partial.tensor))
            except (ChannelClosed, PeerLost):
                part.lost += sent.works
        part.sent.clear()

    async def retry(self, parts: Sequence[Part], deadline: float) -> None:
        """Sends what was lost again, when its hosts are back, until nothing is lost. Raises ExpertUnavailable at the deadline,
        or at once when that is the policy and a host is gone."""
        names = self._names([work for part in parts for work in part.lost])
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                while any(part.lost for part in parts):
                    self._check_policy(parts)
                    for part in parts:
                        await self._send_again(part, deadline)
                    for part in parts:
                        await self.collect(part)
        except TimeoutError:
            raise ExpertUnavailable(f"experts of layer {self._spec.name} on {names} did not come back before the deadline") from None

    async def _send_again(self, part: Part, deadline: float) -> None:
        works, part.lost = part.lost, []
        self._retries.inc(len(works))
        for work in works:
            await self._links[work.host].connected()
        await self._send(part, works, DIRECT, deadline)

    async def _send(self, part: Part, works: Sequence[HostWork], pattern: str, deadline: float) -> None:
        drafts = await self._compute(part.num_elements, self._write, part, works, pattern)
        self._messages[pattern].inc(len(drafts))
        timeout_s = max(0.0, deadline - time.monotonic())
        for message, channel, lease in drafts:
            future = channel.send(lease, layer=self._layer, epoch=self._epoch, timeout_s=timeout_s, pass_on=message.pass_on)
            for work in message.works:
                self._links[work.host].count_until(future, len(work.rows))
            part.sent.append(Sent(tuple(message.works), message.rows, future))

    def _write(self, part: Part, works: Sequence[HostWork], pattern: str) -> list[Draft]:
        """Rows go straight to where their channel sends from: the one copy of the data on this side."""
        channels = [link.channel for link in self._links]
        part.lost += [work for work in works if channels[work.host] is None]
        nodes = [link.node for link in self._links]
        drafts = []
        for message in PATTERNS[pattern]([work for work in works if channels[work.host] is not None], nodes):
            channel = channels[message.host]
            assert channel is not None
            destinations = message.destinations
            shape = WorkShape(len(message.rows), self._spec.hidden_size, len(message.slots), part.hidden_states.dtype, len(destinations))
            lease = channel.lease(shape)
            permute(part.hidden_states, message.rows, out=lease.hidden_states)
            lease.row_index.copy_(message.row_index)
            lease.slots.copy_(message.slots)
            lease.weights.copy_(message.weights)
            if destinations:
                lease.address(destinations)
            drafts.append(Draft(message, channel, lease))
        return drafts

    def _check_policy(self, parts: Sequence[Part]) -> None:
        gone = [work for part in parts for work in part.lost if self._links[work.host].channel is None]
        if gone and self._resilience.on_expert_failure == "fail":
            raise ExpertUnavailable(f"experts of layer {self._spec.name} were lost with {self._names(gone)}")

    def _names(self, works: Sequence[HostWork]) -> str:
        return ", ".join(self._links[host].name for host in sorted({work.host for work in works}))
