"""Hosts read what they do not have, and say what they hold, when a service is scaled and swapped."""

from __future__ import annotations

from pathlib import Path

import torch

from moeserve import Client, MoELayer
from moeserve.placement import Placement
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness
from tests.support.seeded_folders import LAYER, configuration, folder, tokens
from tests.support.waiting import until


def placed(placement: Placement) -> dict[int, set[int]]:
    """The experts of each host."""
    return {host: {shard.expert for shard in placement.layers[0].shards_on(host)} for host in placement.hosts}


def test_a_change_reads_what_hosts_do_not_have(tmp_path: Path) -> None:
    old, new = folder(tmp_path / "old", 0), folder(tmp_path / "new", 1)
    expected = MoELayer.from_checkpoint(old, dtype=torch.float32)(tokens(0))
    with ServiceHarness(configuration(old), "local", tmp_path) as service, Client(service.target) as client:

        def read() -> dict[int, int]:
            return {host.number: host.host.holdings.experts_read for host in service.hosts}

        before = placed(service.placement)
        assert read() == {host: len(experts) for host, experts in before.items()}
        service.call(service.controller.scale(3))
        after = placed(service.controller.state.release.placement)
        at_scale = read()
        assert at_scale == {host: len(before.get(host, set()) | experts) for host, experts in after.items()}
        assert_close(client.forward(tokens(0)).hidden_states, expected)
        until(lambda: {host.number: host.experts_held for host in client.stats().hosts} == {host: len(after[host]) for host in after})
        service.call(service.controller.swap(LAYER, new, [2]))
        assert {host: count - at_scale[host] for host, count in read().items()} == {host: 2 in after[host] for host in after}
        assert client.forward(tokens(0)).model_revision == 2
