"""The messages of one layer: written, sent, collected, and sent again after the loss of a host.

T tokens of a part, H hidden size, R rows of one message.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moeserve.config import CommunicationConfig, CopyChoice, LayerSpec, ResilienceConfig
from moeserve.errors import ExpertUnavailable
from moeserve.frontend.compute import Compute
from moeserve.frontend.link import HostLink
from moeserve.frontend.part import Answer, Part, Sent
from moeserve.frontend.patterns import DIRECT, PATTERNS, Message
from moeserve.frontend.view import LayerView
from moeserve.layer.dispatch import HostLoads, HostWork, permute, plan_again
from moeserve.observe.metrics import Metrics
from moeserve.observe.stats import host_name
from moeserve.transport import Channel, ChannelClosed, Lease, PeerLost, WorkShape


class Draft(NamedTuple):
    """A message in the memory its channel sends from."""

    message: Message
    channel: Channel
    lease: Lease


class Exchange:
    """Sends parts of batches to the hosts, in the configured pattern, and collects the answers.

    Lost rows are always sent again directly, to each host its own share: the first message is for speed, the second for
    certainty.
    """

    def __init__(
        self,
        layer: int,
        spec: LayerSpec,
        communication: CommunicationConfig,
        resilience: ResilienceConfig,
        copy_choice: CopyChoice,
        metrics: Metrics,
        compute: Compute,
    ) -> None:
        self._layer = layer
        self._spec = spec
        self._pattern = communication.pattern
        self._resilience = resilience
        self._copy_choice = copy_choice
        self._retries = metrics.expert_retries.labels("host_lost")
        self._messages = {name: metrics.messages.labels(name) for name in {self._pattern, DIRECT}}
        self._compute = compute

    async def send(self, part: Part, deadline: float) -> None:
        """Sends all works of live hosts at once; the other works are lost. Raises Overloaded, InvalidRequest."""
        await self._send(part, part.planned.works, self._pattern, deadline)

    async def collect(self, part: Part) -> None:
        """Waits for the answers; works that were lost with a host are in `part.lost` then. Raises a host's error."""
        for sent in part.sent:
            try:
                partial = await sent.future
                part.answers.append(Answer(sent.works[0].host, sent.rows, partial.tensor))
            except (ChannelClosed, PeerLost):
                part.lost += sent.works
        part.sent.clear()

    def hosts(self, view: LayerView) -> HostLoads | None:
        """The loads of the hosts, for a plan; None if experts have one copy each, so there is no choice."""
        if view.placement.copies.shape[1] == 1:
            return None
        is_live = np.zeros(view.placement.num_hosts, dtype=np.bool_)
        load = np.zeros(view.placement.num_hosts, dtype=np.int64)
        for number, link in view.links.items():
            is_live[number], load[number] = link.channel_at(view.epoch) is not None, link.queue_tokens
        return HostLoads(is_live, load, self._copy_choice)

    async def retry(self, parts: Sequence[Part], deadline: float) -> str:
        """Sends lost works again, to other copies or when the hosts are back, until nothing is lost. Then it returns "".

        If all remaining lost works need failing hosts, it returns the reason. Raises ExpertUnavailable at the
        deadline, or at once if that is the policy and no other copy is alive.
        """
        names = _names({work.host for part in parts for work in part.lost})
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                while any(part.lost for part in parts):
                    self._move(parts)
                    if gone := self._gone(parts):
                        if why := self._why_not(gone):
                            return why
                        await self._some_host_is_back(gone)
                    for part in parts:
                        works, part.lost = part.lost, []
                        self._retries.inc(len(works))
                        await self._send(part, works, DIRECT, deadline)
                    for part in parts:
                        await self.collect(part)
                return ""
        except TimeoutError:
            raise ExpertUnavailable(f"experts of layer {self._spec.name} on {names} did not come back before the deadline") from None

    def _move(self, parts: Sequence[Part]) -> None:
        """Moves lost works to other live copies of the same experts."""
        for part in parts:
            hosts = self.hosts(part.view)
            if part.lost and hosts is not None:
                part.lost = plan_again(part.lost, len(part.hidden_states), part.view.placement, hosts)

    def _gone(self, parts: Sequence[Part]) -> dict[int, HostLink]:
        """The lost hosts, if all of them are down. Raises ExpertUnavailable if the policy says so."""
        hosts = {work.host: (part.view, part.view.links[work.host]) for part in parts for work in part.lost}
        gone = {host: link for host, (view, link) in hosts.items() if link.channel_at(view.epoch) is None}
        if gone and self._resilience.on_expert_failure == "fail":
            raise ExpertUnavailable(f"experts of layer {self._spec.name} were lost with {_names(gone)}")
        return gone if len(gone) == len(hosts) else {}

    def _why_not(self, gone: Mapping[int, HostLink]) -> str:
        """Why waiting for any of these hosts cannot help; "" = it can, for at least one."""
        whys = dict.fromkeys(link.why_not for link in gone.values())
        return "" if "" in whys else f"experts of layer {self._spec.name} on {_names(gone)} are not available: {' '.join(whys)}"

    async def _some_host_is_back(self, gone: Mapping[int, HostLink]) -> None:
        """Returns when one of these hosts is back, or fails for good."""
        # A host that has left, or has no experts at this epoch, will not be back: another view follows, or the deadline.
        down = [link for link in gone.values() if link.channel is None and not link.why_not]
        waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(link.decided()) for link in down] or [asyncio.Future()]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _send(self, part: Part, works: Sequence[HostWork], pattern: str, deadline: float) -> None:
        drafts = await self._compute(part.num_elements, self._write, part, works, pattern)
        self._messages[pattern].inc(len(drafts))
        timeout_s = max(0.0, deadline - time.monotonic())
        for message, channel, lease in drafts:
            future = channel.send(lease, layer=self._layer, epoch=part.view.epoch, timeout_s=timeout_s, pass_on=message.pass_on)
            for work in message.works:
                part.view.links[work.host].count_until(future, len(work.rows))
            part.sent.append(Sent(tuple(message.works), message.rows, future))

    def _write(self, part: Part, works: Sequence[HostWork], pattern: str) -> list[Draft]:
        """Copies rows straight into the memory that their channel sends from."""
        links = part.view.links
        channels = {work.host: links[work.host].channel_at(part.view.epoch) for work in works}
        part.lost += [work for work in works if channels[work.host] is None]
        nodes = {number: link.node for number, link in links.items()}
        drafts = []
        for message in PATTERNS[pattern]([work for work in works if channels[work.host] is not None], nodes):
            channel = channels[message.host]
            assert channel is not None
            destinations = message.destinations
            shape = WorkShape(
                len(message.rows), self._spec.hidden_size, len(message.local_experts), part.hidden_states.dtype, len(destinations)
            )
            lease = channel.lease(shape)
            permute(part.hidden_states, message.rows, out=lease.hidden_states)
            lease.row_index.copy_(message.row_index)
            lease.local_experts.copy_(message.local_experts)
            lease.weights.copy_(message.weights)
            if destinations:
                lease.address(destinations)
            drafts.append(Draft(message, channel, lease))
        return drafts


def _names(hosts: Iterable[int]) -> str:
    return ", ".join(host_name(host) for host in sorted(hosts))
