"""One batch through one layer: route, plan, deliver, finish.

T tokens, H hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from math import inf

from moeserve.api.output import ForwardOutput
from moeserve.config import CopyChoice
from moeserve.errors import CheckpointError, ExpertUnavailable, NonFiniteOutput
from moeserve.frontend.batch import Batch
from moeserve.frontend.compute import Compute
from moeserve.frontend.delivery import Delivery
from moeserve.frontend.exchange import Exchange
from moeserve.frontend.parcel import Answer
from moeserve.frontend.remedy import Remedy, Rules
from moeserve.frontend.routed import Part, RoutedBatch, micro_batches
from moeserve.frontend.settings import FrontendSettings
from moeserve.frontend.view import LayerView, Views
from moeserve.gating import Routing
from moeserve.layer.dispatch import HostLoads
from moeserve.layer.moe_layer import route_batch, to_output
from moeserve.log_limit import limited_logger
from moeserve.observe.metrics import Metrics, Stage

strangers = limited_logger(__name__)

#: of the request at a position of its batch
Output = tuple[int, Routing, ForwardOutput | NonFiniteOutput]


class Forward:
    """Runs batches of one layer. One view, hence one epoch, for a whole batch."""

    def __init__(self, layer: int, views: Views, settings: FrontendSettings, metrics: Metrics, compute: Compute) -> None:
        self.layer = layer
        self.spec = views.current.head.spec
        self.views = views
        self.exchange = Exchange(layer, self.spec, settings.communication, metrics, compute)
        self._copy_choice: CopyChoice = settings.copy_choice
        self._max_micro_batches = settings.batching.micro_batches
        rules = Rules(self.spec.name, settings.resilience_of(self.spec.name), self._copy_choice)
        self._avoids_late = rules.resilience.hedge == "auto"
        self._policy = rules.resilience.on_expert_failure
        self._remedy = Remedy(rules, self.exchange, metrics)
        self._metrics = metrics
        self._compute = compute
        self._deliveries: set[Delivery] = set()
        self._aux_loss = metrics.aux_loss.labels(self.spec.name)
        self._non_finite = metrics.non_finite_outputs.labels(self.spec.name)

    async def run(self, batch: Batch) -> None:
        """Answer every request of the batch; those that need no host that was lost are answered before the others.

        Requests that still need one when another view is published start anew with that one.
        """
        now = time.monotonic()
        batch.begin(now)
        spent: dict[Stage, float] = {"queue": now - batch.members[0].admitted_at}
        while waiting := batch.unanswered:
            batch = batch if len(waiting) == len(batch.members) else Batch(waiting, batch.place)
            with self.views.use() as view:
                await self._run(batch, view, spent)

    def hosts_changed(self) -> None:
        """A host was lost or is back, or another view was published: what waits for one looks again."""
        for delivery in self._deliveries:
            delivery.wake()

    async def _run(self, batch: Batch, view: LayerView, spent: dict[Stage, float]) -> None:
        """spent: seconds of the stages so far, which are not recorded before the hosts are at work."""
        await batch.go_on()
        width, start, end = self.spec.hidden_size, 0, await batch.turn(0)
        batch.mark("queue")
        for trace in batch.traces:
            trace.epoch, trace.batch_tokens = view.epoch, batch.num_tokens
        started = time.perf_counter()
        routed = await self._compute(batch.num_tokens * width, self._route_and_plan, batch, view, end, self._loads(view))
        parts, spent["route"] = list(routed.parts), time.perf_counter() - started
        while await self._bring(routed, parts, spent, is_last=end == batch.num_tokens):
            if end == batch.num_tokens:
                if batch.unanswered:
                    await self._finish(routed, range(len(batch.members)))
                return
            batch.end_turn(start)
            start, end = end, await batch.turn(end)
            batch.mark("queue")
            parts = await self._compute((end - start) * width, self._plan, routed, start, end, self._loads(view))

    def _loads(self, view: LayerView) -> HostLoads | None:
        """With hedging, a host that stands still gets nothing new before it answers again: each row would have to be hedged."""
        return view.loads(self._copy_choice, view.late_hosts() if self._avoids_late else ())

    def _route_and_plan(self, batch: Batch, view: LayerView, end: int, hosts: HostLoads | None) -> RoutedBatch:
        """The gate sees the whole batch, so that its answer does not depend on how the batch is cut. Its tokens up to `end` are planned."""
        routed = RoutedBatch(batch, view, route_batch(view.head.router, batch), [])
        batch.mark("route")
        self._plan(routed, 0, end, hosts)
        return routed

    def _plan(self, routed: RoutedBatch, first: int, last: int, hosts: HostLoads | None) -> list[Part]:
        """The tokens `first` to `last` in parts, which are added to those of the batch."""
        batch, view, routing = routed.batch, routed.view, routed.routing
        is_routed, parts = batch.topk_ids is not None, []
        for start, end in micro_batches(first, last, self._max_micro_batches):
            ids, weights, kept = (choice[start:end] for choice in (routing.topk_ids, routing.topk_weights, routing.kept))
            rows, used = batch.hidden_states[start:end], None if batch.used_token is None else batch.used_token[start:end]
            planned = view.head.plan(ids, weights, kept, rows, used, view.placement, hosts, is_routed=is_routed)
            parts.append(Part(slice(start, end), rows, view, planned))
        routed.parts += parts
        batch.mark("plan")
        return parts

    async def _bring(self, routed: RoutedBatch, parts: Sequence[Part], spent: dict[Stage, float], *, is_last: bool) -> bool:
        """Parts to the hosts, and their answers back. False: another view is the present one."""
        delivery = Delivery(routed.batch.deadline, routed.batch.traces)
        self._deliveries.add(delivery)
        try:
            started = time.perf_counter()
            for part in parts:
                await self.exchange.send(delivery, part)
            sent = time.perf_counter()
            self._record({**spent, "dispatch": sent - started}, routed.batch)
            spent.clear()
            if is_last and self._compute.is_small(self._num_elements(routed)):
                delivery.when_whole = partial(self._finish_at_once, routed, delivery)
            # The hosts are at work: counts and losses, which nobody needs before the answer, cost nothing now.
            await self._compute(self._num_elements(routed), routed.requests)
            is_whole = await self._deliver(routed, delivery)
            self._remedy.blame(routed.view, delivery)
            self._metrics.observe_stage("experts", time.perf_counter() - sent)
            return is_whole
        finally:
            self._deliveries.discard(delivery)
            delivery.cancel()

    def _record(self, spent: Mapping[Stage, float], batch: Batch) -> None:
        for stage, seconds in spent.items():
            self._metrics.observe_stage(stage, seconds)
        if "queue" in spent:
            self._metrics.batch_tokens.observe(batch.num_tokens)

    async def _deliver(self, routed: RoutedBatch, delivery: Delivery) -> bool:
        """Until hosts owe nothing any more, or, if a host is missing, another view is the present one: then False."""
        wake_at = self._remedy.first_look_at(routed, delivery)
        while delivery.is_under_way:
            await delivery.change(wake_at)
            await self._add_up(delivery, delivery.take_answers())
            if not delivery.is_under_way:
                break
            if delivery.has_lost and self.views.current is not routed.view:
                return False
            if delivery.needs_remedy(wake_at):
                routed.batch.mark("remedy")
                await self._answer_untouched(routed, delivery)
                wake_at = await self._remedy.apply(routed, delivery)
                if delivery.is_all_lost:
                    routed.batch.rest()
        return True

    async def _add_up(self, delivery: Delivery, answers: Mapping[Part, Sequence[Answer]]) -> None:
        """Sums that are not finite are left out, and are to be asked for again."""
        for part, of_part in answers.items():
            self._learn(delivery, of_part, await self._compute(part.num_elements, part.add, of_part))

    def _learn(self, delivery: Delivery, answers: Sequence[Answer], bad: Sequence[Answer]) -> None:
        delivery.refuse(bad)
        self._remedy.learn(answers, bad)

    def _finish_at_once(self, routed: RoutedBatch, delivery: Delivery) -> None:
        """A small batch, when its last answer comes: its callers do not wait until its task has its turn."""
        for part, answers in delivery.take_answers().items():
            self._learn(delivery, answers, part.add(answers))
        if not delivery.is_under_way and self._compute.is_small(self._num_elements(routed)):
            started = time.perf_counter()
            self._answer(routed.batch, _outputs(routed, range(len(routed.batch.members))))
            self._metrics.observe_stage("combine", time.perf_counter() - started)
            routed.batch.mark("combine")

    async def _answer_untouched(self, routed: RoutedBatch, delivery: Delivery) -> None:
        """Requests of several that nothing is owed to any more; a single one may have turns to come."""
        members = routed.batch.members
        if len(members) == 1:
            return
        touched = routed.members(delivery.owed)
        untouched = [index for index, member in enumerate(members) if index not in touched and not member.answer.done()]
        if not untouched:
            return
        await self._add_up(delivery, delivery.take_all_answers())
        # Sums that are not finite are owed again.
        touched = routed.members(delivery.owed)
        if untouched := [index for index in untouched if index not in touched]:
            await self._finish(routed, untouched)

    async def _finish(self, routed: RoutedBatch, members: Sequence[int]) -> None:
        started = time.perf_counter()
        self._answer(routed.batch, await self._compute(self._num_elements(routed), _outputs, routed, members))
        self._metrics.observe_stage("combine", time.perf_counter() - started)
        routed.batch.mark("combine")

    def _num_elements(self, routed: RoutedBatch) -> float:
        """How many numbers the batch has; more than any has where the shared expert must be read first."""
        must_read = any(routed.view.head.must_read(part.planned) for part in routed.parts)
        return inf if must_read else routed.batch.num_tokens * self.spec.hidden_size

    def _answer(self, batch: Batch, outputs: Sequence[Output]) -> None:
        for index, routing, output in outputs:
            answer = batch.members[index].answer
            if answer.done():
                continue
            if isinstance(output, NonFiniteOutput):
                strangers.warning("%s", output, extra={"kind": self.spec.name})
                self._non_finite.inc()
                answer.set_exception(output)
                continue
            self._metrics.experts.add(self.layer, routing.used_tokens, output.processed, routing.dropped_by_reason)
            self._aux_loss.set(output.aux_loss)
            if routing.is_partial:
                self._metrics.partial_answers.labels(self._policy).inc()
            answer.set_result(output)


def _outputs(routed: RoutedBatch, members: Sequence[int]) -> list[Output]:
    """Of each of `members`; a request that experts could not compute is at nobody else's expense."""
    head, batch, view = routed.view.head, routed.batch, routed.view
    try:
        total = routed.finished()
        rows = (total,) if len(batch.sizes) == 1 else total.split(batch.sizes)
    except CheckpointError as error:  # of the shared expert, which is read when it is needed here for the first time
        raise ExpertUnavailable(str(error)) from None
    outputs: list[Output] = []
    routings = routed.requests()
    for index in members:
        request, routing = batch.members[index].request, routings[index]
        try:
            hidden_states = head.rounded(rows[index], request, routing)
            outputs.append((index, routing, to_output(routing, hidden_states, request.return_routing, view.revision)))
        except NonFiniteOutput as error:
            outputs.append((index, routing, error))
    return outputs
