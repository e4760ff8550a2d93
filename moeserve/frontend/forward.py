"""One batch through one layer: route, plan, deliver, finish.

T tokens, H hidden size.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import torch

from moeserve.api.output import ForwardOutput
from moeserve.errors import CheckpointError, ExpertUnavailable, NonFiniteOutput
from moeserve.frontend.batch import Batch
from moeserve.frontend.compute import Compute
from moeserve.frontend.exchange import Exchange
from moeserve.frontend.part import Part, micro_batches
from moeserve.frontend.view import LayerView, Views
from moeserve.gating import BatchRouting, Routing
from moeserve.layer.moe_layer import route_batch, to_output
from moeserve.log_limit import limited_logger
from moeserve.observe.metrics import Metrics

strangers = limited_logger(__name__)


class Forward:
    """Runs batches of one layer. A whole batch uses one view, so one epoch."""

    def __init__(self, layer: int, views: Views, exchange: Exchange, max_micro_batches: int, metrics: Metrics, compute: Compute) -> None:
        self.layer = layer
        self.spec = views.current.head.spec
        self.views = views
        self._exchange = exchange
        self._max_micro_batches = max_micro_batches
        self._metrics = metrics
        self._compute = compute
        self._aux_loss = metrics.aux_loss.labels(self.spec.name)
        self._non_finite = metrics.non_finite_outputs.labels(self.spec.name)

    async def run(self, batch: Batch) -> None:
        """Answer every request of the batch.

        Requests that need a dead host go to other copies, or wait for it (or fail, as `resilience.on_expert_failure` says); the
        others are answered at once. Raises ExpertUnavailable for the unanswered requests.
        """
        is_answered = False
        while not is_answered:
            with self.views.use() as view:
                is_answered = await self._run(batch, view)

    async def try_out(self, view: LayerView, deadline: float) -> None:
        """One row through every expert on the hosts of a view that is not published yet. Raises any failure."""
        ids = torch.arange(view.head.spec.num_hosted_experts)[:, None]
        weights, kept = torch.ones(ids.shape), torch.ones(ids.shape, dtype=torch.bool)
        rows = torch.zeros(len(ids), self.spec.hidden_size)
        hosts = self._exchange.hosts(view)
        part = Part(0, rows, view, view.head.plan(ids, weights, kept, rows, None, view.placement, hosts, is_routed=True))
        try:
            await self._exchange.send(part, deadline)
            await self._exchange.collect(part)
            if part.lost and (why := await self._exchange.retry([part], deadline)):
                raise ExpertUnavailable(why)
        finally:
            part.give_up()

    async def _run(self, batch: Batch, view: LayerView) -> bool:
        """False when hosts were lost and another view was published before they came back: then the batch starts again with that view."""
        size = batch.num_tokens * self.spec.hidden_size
        routing, parts = await self._compute(size, self._route, batch, view)
        try:
            started = time.perf_counter()
            for part in parts:
                await self._exchange.send(part, batch.deadline)
            sent = time.perf_counter()
            self._metrics.observe_stage("dispatch", sent - started)
            # The hosts are busy: counts and losses cost no time now.
            routings = await self._compute(size, _by_request, routing)
            for part in parts:
                await self._exchange.collect(part)
                if part is not parts[-1]:
                    await self._compute(part.num_elements, part.combined)  # while the hosts compute the next
            self._metrics.observe_stage("experts", time.perf_counter() - sent)
            if any(part.lost for part in parts):
                await self._answer(batch, routings, parts, _untouched(batch, parts))
                why = await self._retry(parts, batch.deadline, view)
                if why is None:
                    return False
                if why:
                    await self._answer(batch, routings, parts, _untouched(batch, parts))
                    raise ExpertUnavailable(why)
            await self._answer(batch, routings, parts, range(len(batch.members)))
            return True
        finally:
            for part in parts:
                part.give_up()

    async def _retry(self, parts: Sequence[Part], deadline: float, view: LayerView) -> str | None:
        """The result of `Exchange.retry`; None when `view` is not the current one any more. Raises ExpertUnavailable."""
        retrying = asyncio.ensure_future(self._exchange.retry(parts, deadline))
        superseded = asyncio.ensure_future(self.views.superseded(view))
        try:
            await asyncio.wait({retrying, superseded}, return_when=asyncio.FIRST_COMPLETED)
            if not retrying.done():
                return None
            return await retrying
        finally:
            for task in (retrying, superseded):
                task.cancel()
            await asyncio.gather(retrying, superseded, return_exceptions=True)

    def _route(self, batch: Batch, view: LayerView) -> tuple[BatchRouting, list[Part]]:
        """Routes the whole batch, so the result does not depend on micro-batches."""
        started = time.perf_counter()
        self._metrics.observe_stage("queue", time.monotonic() - batch.members[0].admitted_at)
        self._metrics.batch_tokens.observe(batch.num_tokens)
        routing = route_batch(view.head.router, batch)
        hosts, is_routed = self._exchange.hosts(view), batch.topk_ids is not None
        parts = []
        for start, end in micro_batches(batch.num_tokens, self._max_micro_batches):
            ids, weights, kept = (choice[start:end] for choice in (routing.topk_ids, routing.topk_weights, routing.kept))
            rows, used = batch.hidden_states[start:end], None if batch.used_token is None else batch.used_token[start:end]
            planned = view.head.plan(ids, weights, kept, rows, used, view.placement, hosts, is_routed=is_routed)
            parts.append(Part(start, rows, view, planned))
        self._metrics.observe_stage("route", time.perf_counter() - started)
        return routing, parts

    async def _answer(self, batch: Batch, routings: Sequence[Routing], parts: Sequence[Part], members: Sequence[int]) -> None:
        started = time.perf_counter()
        size = batch.num_tokens * self.spec.hidden_size
        outputs = await self._compute(size, _outputs, batch, routings, parts, members)
        for index, output in outputs:
            answer = batch.members[index].answer
            if answer.done():
                continue
            if isinstance(output, NonFiniteOutput):
                strangers.warning("%s", output, extra={"kind": self.spec.name})
                self._non_finite.inc()
                answer.set_exception(output)
            else:
                tokens = routings[index].used_tokens
                self._metrics.experts.add(self.layer, tokens, output.processed, output.dropped)
                self._aux_loss.set(output.aux_loss)
                answer.set_result(output)
        self._metrics.observe_stage("combine", time.perf_counter() - started)


def _outputs(
    batch: Batch, routings: Sequence[Routing], parts: Sequence[Part], members: Sequence[int]
) -> list[tuple[int, ForwardOutput | NonFiniteOutput]]:
    """The output of each of `members`; a request that experts could not compute does not affect the others."""
    try:
        totals = [part.view.head.finish(part.combined(), part.hidden_states, part.planned) for part in parts]
    except CheckpointError as error:  # of the shared expert, which is read when it is first needed here
        raise ExpertUnavailable(str(error)) from None
    rows = (totals[0] if len(totals) == 1 else torch.cat(totals)).split(batch.sizes)
    view = parts[0].view
    outputs: list[tuple[int, ForwardOutput | NonFiniteOutput]] = []
    for index in members:
        request, routing = batch.members[index].request, routings[index]
        try:
            hidden_states = view.head.rounded(rows[index], request, routing)
            outputs.append((index, to_output(routing, hidden_states, request.return_routing, view.revision)))
        except NonFiniteOutput as error:
            outputs.append((index, error))
    return outputs


def _by_request(routing: BatchRouting) -> list[Routing]:
    return [routing.request(index) for index in range(len(routing.request_sizes))]


def _untouched(batch: Batch, parts: Sequence[Part]) -> list[int]:
    """Positions of the requests without rows on a lost host."""
    ends = torch.tensor(batch.sizes).cumsum(0)
    lost = [work.rows + part.start for part in parts for work in part.lost]
    touched = {int(index) for rows in lost for index in torch.searchsorted(ends, rows, right=True).unique()}
    return [index for index in range(len(batch.members)) if index not in touched]
