"""One batch through one layer: route, dispatch, experts, combine.

T tokens, H hidden size, R rows sent to one host.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moeserve.config import ResilienceConfig
from moeserve.dispatch import HostWork, combine, permute
from moeserve.errors import ExpertUnavailable
from moeserve.frontend.batch import Batch
from moeserve.frontend.compute import Compute
from moeserve.frontend.link import HostLink
from moeserve.gating import BatchRouting, Routing
from moeserve.head import LayerHead, Planned
from moeserve.layer import route_batch, to_output
from moeserve.metrics import Metrics
from moeserve.output import ForwardOutput
from moeserve.placement import Placement
from moeserve.transport import Channel, ChannelClosed, Lease, Partial, WorkShape


@dataclass(frozen=True)
class _Message:
    """Work for one host, written into its channel's buffer; `channel` and `lease` are None while the host is down."""

    work: HostWork
    channel: Channel | None
    lease: Lease | None


class _Sent(NamedTuple):
    """A message under way; `at` is when it left."""

    work: HostWork
    answer: asyncio.Future[Partial]
    at: float


class Forward:
    """Runs batches of one layer. One placement, hence one epoch, for a whole batch."""

    def __init__(
        self,
        layer: int,
        head: LayerHead,
        placement: Placement,
        links: Sequence[HostLink],
        resilience: ResilienceConfig,
        metrics: Metrics,
        compute: Compute,
    ) -> None:
        self.layer = layer
        self.spec = head.spec
        self._head = head
        self._placement = placement
        self._links = links
        self._resilience = resilience
        self._metrics = metrics
        self._compute = compute
        self._aux_loss = metrics.aux_loss.labels(head.spec.name)

    async def run(self, batch: Batch) -> None:
        """Answer every request of the batch.

        Requests that need a host that died wait for it (or fail, as `resilience.on_expert_failure` says); the others are answered at once.
        Raises ExpertUnavailable for those that are still without an answer.
        """
        size = batch.num_tokens * self.spec.hidden_size
        partials: dict[int, Partial] = {}
        routing, planned, messages = await self._compute(size, self._prepare, batch)
        sent = self._send_all(batch, messages)
        # The hosts are at work: counts and losses, which nobody needs before the answer, cost nothing now.
        routings = await self._compute(size, _by_request, routing)
        lost = await self._collect(sent, partials)
        lost += [message.work for message in messages if message.channel is None]
        if lost:
            await self._answer(batch, routings, planned, partials, _untouched(batch, lost))
            await self._retry(batch, lost, partials)
        await self._answer(batch, routings, planned, partials, range(len(batch.members)))

    def _prepare(self, batch: Batch) -> tuple[BatchRouting, Planned, list[_Message]]:
        started = time.perf_counter()
        self._metrics.observe_stage("queue", time.monotonic() - batch.members[0].admitted_at)
        self._metrics.batch_tokens.observe(batch.num_tokens)
        routing = route_batch(
            self._head.router,
            batch.hidden_states,
            batch.sizes,
            batch.used_token,
            batch.topk_ids,
            batch.topk_weights,
            batch.token_ids,
            batch.overrides,
        )
        placement, is_routed = self._placement.layers[self.layer], batch.topk_ids is not None
        planned = self._head.plan(routing, batch.hidden_states, batch.used_token, placement, is_routed=is_routed)
        routed = time.perf_counter()
        messages = [self._write(batch, work) for work in planned.works]
        self._metrics.observe_stage("route", routed - started)
        self._metrics.observe_stage("dispatch", time.perf_counter() - routed)
        return routing, planned, messages

    def _write(self, batch: Batch, work: HostWork) -> _Message:
        """Put a host's rows where its channel sends from: the one copy of the data on this side."""
        channel = self._links[work.host].channel
        if channel is None:
            return _Message(work, None, None)
        lease = channel.lease(WorkShape(len(work.rows), self.spec.hidden_size, len(work.slots), batch.hidden_states.dtype))
        permute(batch.hidden_states, work.rows, out=lease.hidden_states)
        lease.row_index.copy_(work.row_index)
        lease.slots.copy_(work.slots)
        lease.weights.copy_(work.weights)
        return _Message(work, channel, lease)

    def _send_all(self, batch: Batch, messages: Sequence[_Message]) -> list[_Sent]:
        """Every message whose host is up, all in flight; they are settled by `_collect`."""
        timeout_s = max(0.0, batch.deadline - time.monotonic())
        sent = []
        for message in messages:
            if message.channel is not None and message.lease is not None:
                self._links[message.work.host].queue_tokens.inc(len(message.work.rows))
                epoch = self._placement.epoch
                future = message.channel.send(message.lease, layer=self.layer, epoch=epoch, timeout_s=timeout_s)
                sent.append(_Sent(message.work, future, time.perf_counter()))
        return sent

    async def _collect(self, sent: Sequence[_Sent], partials: dict[int, Partial]) -> list[HostWork]:
        """The answers by host; returns the work whose host died."""
        lost = []
        try:
            for one in sent:
                try:
                    partials[one.work.host] = await one.answer
                except ChannelClosed:
                    lost.append(one.work)
        finally:
            for one in sent:
                self._links[one.work.host].queue_tokens.dec(len(one.work.rows))
                one.answer.cancel()  # tells the host, unless the answer is here
        if sent:
            self._metrics.observe_stage("experts", time.perf_counter() - sent[0].at)
        return lost

    async def _retry(self, batch: Batch, lost: list[HostWork], partials: dict[int, Partial]) -> None:
        """Wait for the hosts to come back and ask them again, until the deadline."""
        names = ", ".join(self._links[work.host].name for work in lost)
        if self._resilience.on_expert_failure == "fail":
            raise ExpertUnavailable(f"experts of layer {self.spec.name} were lost with {names}")
        try:
            async with asyncio.timeout(batch.deadline - time.monotonic()):
                while lost:
                    self._metrics.expert_retries.labels("host_lost").inc(len(lost))
                    for work in lost:
                        await self._links[work.host].connected()
                    messages = [self._write(batch, work) for work in lost]
                    down = [message.work for message in messages if message.channel is None]
                    lost = down + await self._collect(self._send_all(batch, messages), partials)
        except TimeoutError:
            raise ExpertUnavailable(f"experts of layer {self.spec.name} on {names} did not come back before the deadline") from None

    async def _answer(
        self, batch: Batch, routings: Sequence[Routing], planned: Planned, partials: dict[int, Partial], members: Sequence[int]
    ) -> None:
        started = time.perf_counter()
        size = batch.num_tokens * self.spec.hidden_size
        outputs = await self._compute(size, self._outputs, batch, routings, planned, partials, members)
        for index, output in outputs:
            answer = batch.members[index].answer
            if not answer.done():
                tokens = routings[index].used_tokens
                self._metrics.experts.add(self.layer, tokens, output.processed, output.dropped)
                self._aux_loss.set(output.aux_loss)
                answer.set_result(output)
        self._metrics.observe_stage("combine", time.perf_counter() - started)

    def _outputs(
        self, batch: Batch, routings: Sequence[Routing], planned: Planned, partials: dict[int, Partial], members: Sequence[int]
    ) -> list[tuple[int, ForwardOutput]]:
        answers = [(work.rows, partials[work.host].tensor) for work in planned.works if work.host in partials]
        total = combine(answers, batch.num_tokens, self.spec.hidden_size)
        rows = self._head.finish(total, batch.hidden_states, planned).split(batch.sizes)
        outputs = []
        for index in members:
            request = batch.members[index].request
            hidden_states = rows[index].to(request.hidden_states.dtype)
            outputs.append((index, to_output(routings[index], hidden_states, request.return_routing)))
        return outputs


def _by_request(routing: BatchRouting) -> list[Routing]:
    return [routing.request(index) for index in range(len(routing.request_sizes))]


def _untouched(batch: Batch, lost: Sequence[HostWork]) -> list[int]:
    """Positions of the requests none of whose rows went to a lost host."""
    ends = torch.tensor(batch.sizes).cumsum(0)
    touched = {int(index) for work in lost for index in torch.searchsorted(ends, work.rows, right=True).unique()}
    return [index for index in range(len(batch.members)) if index not in touched]
