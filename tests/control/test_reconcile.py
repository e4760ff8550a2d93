"""Hosts find their nodes: examples, and a machine in which nodes and hosts come, go and die in any order."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moeserve.config import GatingConfig, LayerSpec, PlacementConfig
from moeserve.control import Assigned, Assignment, Node, Wanted, reconcile
from moeserve.placement import plan_placement
from tests.support.planning import renumbered

SPEC = LayerSpec("layer", 4, 4, 12, "swiglu", False, "float32", GatingConfig())


def node(id: str, cpus: float = 4, gpus: float = 0, used: float = 0, **labels: str) -> Node:
    return Node(id, id, {"CPU": cpus, "GPU": gpus}, {"CPU": cpus - used, "GPU": gpus}, labels)


def leaving(one: Node) -> Node:
    return replace(one, is_leaving=True)


def spread_of(assigned: Assigned) -> dict[str, int]:
    return dict(Counter(assignment.node for assignment in assigned.assignments))


def assignments(*nodes: str) -> tuple[Assignment, ...]:
    """Host i on the i-th node."""
    return tuple(Assignment(number, name) for number, name in enumerate(nodes))


@pytest.mark.parametrize(
    ("strategy", "number", "expected"),
    [
        ("spread", 4, {"a": 2, "b": 1, "c": 1}),
        ("spread", 10, {"a": 5, "b": 1, "c": 4}),
        ("pack", 4, {"a": 4}),
        ("pack", 7, {"a": 6, "c": 1}),
        ("strict_spread", 3, {"a": 1, "b": 1, "c": 1}),
    ],
)
def test_where_the_first_hosts_go(strategy: str, number: int, expected: dict[str, int]) -> None:
    assigned = reconcile([node("a", 6), node("b", 4, used=3), node("c", 4)], (), Wanted(number, strategy=strategy), 0)  # type: ignore[arg-type]
    assert (spread_of(assigned), assigned.shortage) == (expected, None)
    assert [assignment.number for assignment in assigned.assignments] == list(range(number))


@pytest.mark.parametrize(
    ("free", "each", "room"),
    [
        (1, 0.5, 2),
        (1, 0.3, 3),
        (1, 0.1, 10),
        (3, 0.7, 3),
        (2.5, 0.5, 5),
        (2.4, 0.5, 4),
        (1.2, 0.6, 1),
        (4, 2, 2),
        (3, 2, 1),
        (0.25, 0.5, 0),
    ],
)
def test_a_fraction_of_a_gpu_is_of_one_gpu(free: float, each: float, room: int) -> None:
    assigned = reconcile([node("a", 0, free)], (), Wanted("all", cpus=0, gpus=each, most=99, least=0), 0)
    assert len(assigned.assignments) == room


def test_only_nodes_with_the_labels_take_hosts() -> None:
    nodes = [node("a", pool="experts", zone="1"), node("b", pool="other"), node("c", pool="experts")]
    assigned = reconcile(nodes, (), Wanted(2, labels={"pool": "experts", "zone": "1"}), 0)
    assert spread_of(assigned) == {"a": 2}


def test_all_is_all_room_between_least_and_most() -> None:
    nodes = [node("a", 2), node("b", 3)]
    assert len(reconcile(nodes, (), Wanted("all"), 0).assignments) == 5
    assert len(reconcile(nodes, (), Wanted("all", most=4), 0).assignments) == 4
    assert len(reconcile(nodes, (), Wanted("all", cpus=0), 0).assignments) == 2, "of hosts that take nothing one on each node"
    few = reconcile(nodes, (), Wanted("all", cpus=2, least=3), 0)
    assert few.assignments == () and few.shortage is not None
    assert few.shortage.startswith("placement.num_hosts is 'all', and the experts need 3 hosts and each takes")


def test_a_node_that_joins_is_used_by_all_and_left_alone_otherwise() -> None:
    before = assignments("a", "a")
    nodes = [node("a", 2), node("b", 1)]
    assert reconcile(nodes, before, Wanted("all"), 7).assignments == (*before, Assignment(7, "b"))
    assert reconcile(nodes, before, Wanted(2), 7).assignments == before


def test_a_node_that_leaves_or_dies_is_left() -> None:
    before = assignments("a", "b", "a")
    for nodes in ([node("a"), leaving(node("b")), node("c")], [node("a"), node("c")]):
        assert reconcile(nodes, before, Wanted(3), 3).assignments == (Assignment(0, "a"), Assignment(2, "a"), Assignment(3, "c"))


def test_with_less_room_fewer_hosts_hold_the_experts_and_without_enough_all_stays() -> None:
    before, nodes = assignments("a", "a", "b", "b"), [node("a", 2), leaving(node("b", 2))]
    fewer = reconcile(nodes, before, Wanted(4, least=2), 4)
    assert fewer.assignments == before[:2] and fewer.shortage is not None and "b is leaving" in fewer.shortage
    stuck = reconcile(nodes, before, Wanted(4, least=3), 4)
    assert stuck.assignments == before and stuck.shortage == fewer.shortage


def test_a_host_that_is_given_up_is_replaced_on_its_node() -> None:
    assert reconcile([node("a", 2)], assignments("a", "a"), Wanted(2), 5, given_up={0}).assignments == (
        Assignment(1, "a"),
        Assignment(5, "a"),
    )


def test_hosts_stay_although_others_have_taken_what_is_left() -> None:
    before = assignments("a", "a", "a")
    assert reconcile([node("a", 4, used=3)], before, Wanted(3), 3) == Assigned(before)


def test_of_too_many_the_highest_numbers_on_the_fullest_nodes_go() -> None:
    before, nodes = assignments("a", "a", "b", "a", "b"), [node("a"), node("b")]
    assert reconcile(nodes, before, Wanted(3), 5).assignments == (Assignment(0, "a"), Assignment(1, "a"), Assignment(2, "b"))
    assert reconcile(nodes, before, Wanted(3, strategy="pack"), 5).assignments == (
        Assignment(0, "a"),
        Assignment(1, "a"),
        Assignment(3, "a"),
    )
    assert reconcile([leaving(node("a")), node("b")], before, Wanted(2), 5).assignments == (Assignment(2, "b"), Assignment(4, "b"))


def test_the_sentence_says_what_there_is_on_each_node_and_what_is_missing() -> None:
    nodes = [node("a", 2, 1, pool="x"), node("b", 4, 1, used=4, pool="x"), leaving(node("c", 4, 4, pool="x")), node("d")]
    assigned = reconcile(nodes, (), Wanted(5, cpus=1, gpus=0.5, labels={"pool": "x"}), 0)
    assert spread_of(assigned) == {"a": 2}
    assert assigned.shortage == (
        "placement.num_hosts is 5 and each takes placement.cpus_per_host = 1 and placement.gpus_per_host = 0.5, but there is room for 2: "
        "node a has room for 2 (2 of 2 CPUs free, 1 of 1 GPUs free); "
        "node b has room for 0 (0 of 4 CPUs free, 1 of 1 GPUs free); "
        "node c is leaving; node d does not have the labels pool=x. Missing: 3 CPUs and 1.5 GPUs on nodes with the labels pool=x"
    )
    strict = reconcile([node("a")], (), Wanted(3, strategy="strict_spread"), 0)
    assert strict.shortage is not None and "at most one" in strict.shortage and "Missing: 2 more nodes" in strict.shortage
    many = reconcile([node(f"n{number}", 0) for number in range(20)], (), Wanted(1), 0)
    assert many.shortage is not None and "and 12 more nodes" in many.shortage


class Cluster(RuleBasedStateMachine):
    """What a controller sees and does: every rule is an event, after each of which it takes its step."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: dict[str, Node] = {}
        self.wanted = Wanted(1, most=SPEC.num_experts)
        self.assigned = Assigned(())
        self.before: tuple[Assignment, ...] = ()
        self.given_up: set[int] = set()
        self.next_number = self.next_node = 0

    @initialize()
    def step(self) -> None:
        self.before = self.assigned.assignments
        self.assigned = reconcile(list(self.nodes.values()), self.before, self.wanted, self.next_number, self.given_up)
        self.new = [assignment for assignment in self.assigned.assignments if assignment not in self.before]
        assert all(assignment.number >= self.next_number for assignment in self.new), "numbers are never used again"
        self.next_number = max([self.next_number, *(assignment.number + 1 for assignment in self.new)])

    @rule(cpus=st.integers(0, 4), gpus=st.integers(0, 2), pool=st.sampled_from("xy"))
    def joins(self, cpus: int, gpus: int, pool: str) -> None:
        name = f"node-{self.next_node}"
        self.next_node += 1
        self.nodes[name] = node(name, cpus, gpus, pool=pool)
        self.step()

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def drains(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.nodes)))
        self.nodes[name] = leaving(self.nodes[name])
        self.step()

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def dies(self, data: st.DataObject) -> None:
        del self.nodes[data.draw(st.sampled_from(sorted(self.nodes)))]
        self.step()

    @precondition(lambda self: self.nodes)
    @rule(data=st.data(), used=st.integers(0, 4))
    def is_used_by_others(self, data: st.DataObject, used: int) -> None:
        one = self.nodes[data.draw(st.sampled_from(sorted(self.nodes)))]
        self.nodes[one.id] = replace(one, free={**one.total, "CPU": max(0, one.total["CPU"] - used)})
        self.step()

    @precondition(lambda self: self.assigned.assignments)
    @rule(data=st.data())
    def is_given_up(self, data: st.DataObject) -> None:
        self.given_up.add(data.draw(st.sampled_from(self.assigned.assignments)).number)
        self.step()

    @rule(
        num_hosts=st.one_of(st.just("all"), st.integers(1, SPEC.num_experts)),
        strategy=st.sampled_from(["spread", "pack", "strict_spread"]),
        labels=st.sampled_from([{}, {"pool": "x"}]),
        gpus=st.sampled_from([0, 0.5]),
        least=st.integers(1, 4),
    )
    def is_scaled(self, **num_hosts: object) -> None:
        self.wanted = Wanted(**num_hosts, most=SPEC.num_experts)
        self.step()

    def _usable(self) -> dict[str, Node]:
        labels = self.wanted.labels.items()
        return {name: one for name, one in self.nodes.items() if not one.is_leaving and labels <= one.labels.items()}

    def _room(self, one: Node, held: int) -> int:
        """By another way than the code: put hosts there until no more fit."""
        limit = 1 if self.wanted.strategy == "strict_spread" else 100
        gpus = [1.0] * int(one.free["GPU"])
        fit = 0
        while fit < limit and one.free["CPU"] - fit >= 1:
            if self.wanted.gpus:
                places = [index for index, left in enumerate(gpus) if left >= self.wanted.gpus]
                if not places:
                    break
                gpus[places[0]] -= self.wanted.gpus
            fit += 1
        return max(fit, held)

    @invariant()
    def hosts_are_as_desired_where_there_is_room(self) -> None:
        usable = self._usable()
        stay = [assignment for assignment in self.before if assignment.node in usable and assignment.number not in self.given_up]
        if self.wanted.strategy == "strict_spread":
            stay = [
                min((assignment for assignment in stay if assignment.node == name), key=lambda assignment: assignment.number)
                for name in {assignment.node for assignment in stay}
            ]
        held = Counter(assignment.node for assignment in stay)
        room = {name: self._room(one, held[name]) for name, one in usable.items()}
        fit, num_hosts = sum(room.values()), self.wanted.num_hosts
        number = max(self.wanted.least, min(fit, SPEC.num_experts)) if num_hosts == "all" else num_hosts
        assert (self.assigned.shortage is not None) == (fit < number)
        if fit < min(self.wanted.least, number):
            assert self.assigned.assignments == self.before, "nothing fits: those that live serve on"
            return
        assert len(self.assigned.assignments) == min(number, fit)
        assert all(assignment.node in usable and assignment.number not in self.given_up for assignment in self.assigned.assignments)
        assert all(count <= room[name] for name, count in Counter(assignment.node for assignment in self.assigned.assignments).items())
        moved = [assignment for assignment in stay if assignment not in self.assigned.assignments]
        assert not moved or (len(stay) > number and not self.new), "hosts are not moved without need"

    @invariant()
    def it_comes_to_rest(self) -> None:
        again = reconcile(list(self.nodes.values()), self.assigned.assignments, self.wanted, self.next_number, self.given_up)
        assert again == self.assigned

    @invariant()
    def every_expert_has_a_host(self) -> None:
        numbers = [assignment.number for assignment in self.assigned.assignments]
        assert numbers == sorted(set(numbers))
        if not numbers:
            return
        placement = renumbered(plan_placement([SPEC], PlacementConfig(num_hosts=len(numbers))), numbers, 1)
        assert list(placement.hosts) == numbers
        held = [shard.expert for number in numbers for shard in placement.layers[0].shards_on(number)]
        assert sorted(held) == list(range(SPEC.num_experts))


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
