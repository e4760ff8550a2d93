"""What was lost or is late is seen to: `policy` decides, this carries it out.

T tokens of the batch, K choices per token, R rows of a parcel, A tokens that are computed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moeserve.api.tensors import is_finite
from moeserve.config import CopyChoice, ResilienceConfig
from moeserve.errors import ExpertUnavailable
from moeserve.frontend import policy, timing
from moeserve.frontend.delivery import Delivery
from moeserve.frontend.exchange import Exchange
from moeserve.frontend.giving_up import GivingUp, missing_choices
from moeserve.frontend.hedges import Hedges
from moeserve.frontend.parcel import Answer, Parcel, ParcelState
from moeserve.frontend.policy import Accept, Action, Decision, Fail, GiveUp, Hedge, Owed, Resend, Split
from moeserve.frontend.routed import RoutedBatch
from moeserve.frontend.view import LayerView
from moeserve.layer.dispatch import HostWork, experts_of, is_shared_alone, plan_again
from moeserve.observe.metrics import Metrics

#: so many experts are named in an error
_NAMED_EXPERTS = 8


@dataclass(frozen=True)
class Rules:
    """Of one layer: its name, what happens to choices that are lost, and how copies are chosen."""

    layer: str
    resilience: ResilienceConfig
    copy_choice: CopyChoice


class Remedy:
    """Sees to the parcels of a layer's batches that nobody computes, or that are late."""

    def __init__(self, rules: Rules, exchange: Exchange, metrics: Metrics) -> None:
        self._rules = rules
        self._exchange = exchange
        self._hedges = Hedges(metrics)
        self._retries = {reason: metrics.expert_retries.labels(reason) for reason in ("host_lost", "error", "non_finite")}

    def first_look_at(self, routed: RoutedBatch, delivery: Delivery) -> float:
        """When something of a batch that has just been sent may be late, monotonic seconds; inf = that makes no difference."""
        rules = self._rules.resilience
        if rules.hedge == "off" and rules.on_expert_failure not in policy.PARTIAL:
            return float("inf")
        self._hedges.sent(sum(parcel.num_rows for parcel in delivery.owed))
        return self._late_at(routed, delivery.owed)

    def _late_at(self, routed: RoutedBatch, parcels: Sequence[Parcel]) -> float:
        """When the first of these that are sent now may be late."""
        rules, now = self._rules.resilience, time.monotonic()
        healths = (routed.view.health(parcel.host, parcel.num_rows) for parcel in parcels)
        return min((policy.late_at(health, rules, now) for health in healths), default=float("inf"))

    def learn(self, answers: Sequence[Answer], bad: Sequence[Answer]) -> None:
        """Answers have come, the `bad` of them with sums that are not finite: which hosts err, and who was faster."""
        for parcel in {answer.parcel: None for answer in answers if answer.parcel.suspects or len(answer.parcel.ways) > 1}:
            if len(parcel.ways) > 1:
                self._hedges.ended(has_won=parcel.has_hedge_won)
            if all(answer.parcel is not parcel for answer in (*bad, *(answer for answer in answers if answer.is_final))):
                for suspicion in parcel.suspects:
                    suspicion.confirmed += 1

    def blame(self, view: LayerView, delivery: Delivery) -> None:
        """All has come: hosts have erred that answered with an error, or with sums that are not finite where others' are, also added up."""
        self._count_errors(view, delivery)
        for suspicion in delivery.suspicions:
            is_at_fault = suspicion.confirmed and not suspicion.is_cleared and is_finite(suspicion.part.so_far())
            for _ in range(suspicion.confirmed if is_at_fault else 0):
                view.links[suspicion.host].erred(self._exchange.layer)

    async def apply(self, routed: RoutedBatch, delivery: Delivery) -> float:
        """Does what is to be done now; says when to ask again, monotonic seconds, unless something changes before."""
        self._count_errors(routed.view, delivery)
        _close_unwanted(routed, delivery)
        parcels = delivery.owed
        decision = self._decide(parcels, routed, delivery)
        giving_up = GivingUp(routed, self._rules.resilience)
        for index, parcel in enumerate(parcels):
            action = decision.actions.get(index)
            if not delivery.is_owed(parcel):
                continue  # it was answered while those before it were seen to
            if isinstance(action, GiveUp):
                giving_up.add(parcel, action.reason)
            elif action is not None:
                await self._do(action, parcel, routed, delivery)
            elif parcel.state is ParcelState.LOST:
                host = routed.view.links[parcel.host].name
                why = f"on {host} did not come back before the deadline"
                routed.wait_for(parcel, f"{host}: {parcel.behind}" if parcel.behind else self._sentence(parcel, why))
        for part in giving_up.carry_out(delivery, self._rules.copy_choice):
            await routed.batch.go_on()
            await self._exchange.resend(delivery, part, part.planned.works)
        # A shared expert that travels alone: its tokens are computed again elsewhere, and nothing else would end it.
        _close_unwanted(routed, delivery)
        # What was sent just now may be late as well, also to a second copy.
        seen = {parcel for index, parcel in enumerate(parcels) if not isinstance(decision.actions.get(index), Hedge)}
        return min(decision.wake_at, self._late_at(routed, [parcel for parcel in delivery.owed if parcel not in seen]))

    def _count_errors(self, view: LayerView, delivery: Delivery) -> None:
        while delivery.errors:
            host, error = delivery.errors.pop()
            if policy.is_fault(error):
                view.links[host].erred(self._exchange.layer)

    def _decide(self, parcels: Sequence[Parcel], routed: RoutedBatch, delivery: Delivery) -> Decision:
        health = {parcel.host: routed.view.health(parcel.host, parcel.num_rows) for parcel in parcels}
        is_optional = self._optional(parcels, routed)
        owed = [self._owed(parcel, delivery, is_optional(parcel)) for parcel in parcels]
        return policy.decide(owed, health, self._rules.resilience, int(self._hedges.spare_rows), time.monotonic())

    def _optional(self, parcels: Sequence[Parcel], routed: RoutedBatch) -> Callable[[Parcel], bool]:
        """Whether requests can be answered without a parcel: without all that must be waited for, or without one that need not."""
        k_min = self._rules.resilience.k_min
        if self._rules.resilience.on_expert_failure not in policy.PARTIAL:
            return lambda parcel: False
        musts = [parcel for parcel in parcels if parcel.is_must]
        spared = missing_choices(routed, musts).can_lack(k_min) if musts else None

        def is_optional(parcel: Parcel) -> bool:
            can_lack = missing_choices(routed, [parcel]).can_lack(k_min)
            return bool((can_lack if spared is None or not parcel.is_must else can_lack & spared).any())

        return is_optional

    def _owed(self, parcel: Parcel, delivery: Delivery, is_optional: bool) -> Owed:
        is_lost = parcel.state is ParcelState.LOST
        return Owed(
            host=parcel.host,
            rows=parcel.num_rows,
            since=parcel.since,
            is_lost=is_lost,
            has_copy=bool(self._elsewhere(parcel)),
            is_hedged=len(parcel.ways) > 1,
            error=parcel.error,
            is_refused=bool(parcel.refused),
            not_before=parcel.since + (timing.BEHIND_S if parcel.host in parcel.erred else 0.0),
            is_optional=is_optional,
            others_at=delivery.first_answer_at,
            is_passed_on=len(parcel.works) > 1,
        )

    def _elsewhere(self, parcel: Parcel) -> list[HostWork]:
        """The same pairs for other hosts: if it is lost, as many as can be had; if it is late, all or none, on hosts that are not late.

        Where all copies are equally busy, all are late. How much each owes says less: a host that stands still is sent nothing more.
        """
        view, is_lost = parcel.part.view, parcel.state is ParcelState.LOST
        without = parcel.erred if is_lost else {*parcel.erred, *(work.host for work in parcel.works), *view.late_hosts()}
        is_everywhere = all(is_shared_alone(work, view.placement) for work in parcel.works)
        hosts = (view.all_loads if is_everywhere else view.loads)(self._rules.copy_choice, without)
        if hosts is None:
            return []
        works = plan_again(parcel.works, len(parcel.part.hidden_states), view.placement, hosts)
        is_enough = any if is_lost else all
        return works if is_enough(hosts.is_live[work.host] for work in works) else []

    async def _do(self, action: Action, parcel: Parcel, routed: RoutedBatch, delivery: Delivery) -> None:
        match action:
            case Resend():
                await routed.batch.go_on()
                works = self._elsewhere(parcel) or parcel.works
                self._retries["error" if parcel.error else "non_finite" if parcel.refused else "host_lost"].inc(len(works))
                delivery.close(parcel, ParcelState.GIVEN_UP)
                await self._exchange.resend(delivery, parcel.part, works, parcel)
            case Hedge():
                if (way := await self._exchange.second_way(delivery, parcel.part, self._elsewhere(parcel))) is not None:
                    self._hedges.hedged(parcel.num_rows)
                    delivery.hedge(parcel, way)
            case Split():
                self._hedges.hedged(parcel.num_rows)
                delivery.close(parcel, ParcelState.GIVEN_UP)
                await self._exchange.resend(delivery, parcel.part, parcel.works, parcel)
            case Accept():
                delivery.accept(parcel)
            case Fail(why, error):
                routed.fail(parcel, error or ExpertUnavailable(self._sentence(parcel, why)))
                delivery.close(parcel, ParcelState.GIVEN_UP)

    def _sentence(self, parcel: Parcel, why: str) -> str:
        placement = parcel.part.view.placement
        experts = sorted({int(expert) for work in parcel.works for expert in experts_of(work, placement) if expert >= 0})
        more = f" and {len(experts) - _NAMED_EXPERTS} more" if len(experts) > _NAMED_EXPERTS else ""
        named = ", ".join(map(str, experts[:_NAMED_EXPERTS]))
        return f"{f'experts {named}{more}' if experts else 'copies of the shared expert'} of layer {self._rules.layer} {why}"


def _close_unwanted(routed: RoutedBatch, delivery: Delivery) -> None:
    for parcel in delivery.owed:
        if not routed.waiting(parcel):
            delivery.close(parcel, ParcelState.GIVEN_UP)
