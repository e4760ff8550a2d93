"""What the cluster's autoscaler is asked for, and that it is not asked for longer than there is need."""

from __future__ import annotations

from typing import Any

import pytest

from moeserve import ConfigError, load_config
from moeserve.control import Node, Wanted
from moeserve.control.controller import Controller
from moeserve.control.first_state import first_state
from moeserve.control.frontends import Frontends
from tests.support.planning import planner_of

LAYER = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 6}


class Asked:
    """One node with room for two hosts, and what was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    async def list(self) -> list[Node]:
        return [Node("node", "node", {"CPU": 2}, {"CPU": 2})]

    def ask_for(self, wanted: Wanted, num_hosts: int) -> None:
        self.asked.append(num_hosts)


def configuration(**placement: object) -> Any:
    return load_config({"layers": [LAYER], "placement": placement})


async def test_nodes_that_did_not_come_are_not_asked_for_any_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeserve.control.timing.STALE_S", 0.0)
    config, nodes = configuration(num_hosts=3, wait_for_nodes_s=0.01), Asked()
    with pytest.raises(ConfigError, match="there is room for 2"):
        await first_state(planner_of(config), nodes)
    assert nodes.asked[0] == 3 and nodes.asked[-1] == 0


@pytest.mark.parametrize(("wait_s", "asked"), [(600.0, [0]), (0.0, [])])
async def test_at_its_end_nodes_may_go(wait_s: float, asked: list[int]) -> None:
    config, nodes = configuration(num_hosts=2, wait_for_nodes_s=wait_s), Asked()
    planner = planner_of(config)
    state = await first_state(planner, nodes)
    no_hosts: Any = None

    async def admit(keys: frozenset[str]) -> None:
        pass

    controller = Controller(planner, state, nodes, no_hosts, Frontends("id", config, 1.0, admit), lambda _: None)
    await controller.end()
    assert nodes.asked == asked
