"""A change for which a host has no room is refused before anything is read; one that fits is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeserve import Client, ConfigError
from moeserve.experts import ExpertShard
from tests.support.harness import ServiceHarness
from tests.support.seeded_folders import LAYER, configuration, folder, tokens
from tests.support.waiting import until


def test_a_swap_needs_room_for_what_it_reads(tmp_path: Path) -> None:
    old, new = folder(tmp_path / "old", 0), folder(tmp_path / "new", 1)
    config = configuration(old)
    with ServiceHarness(config, "local", tmp_path) as service, Client(service.target) as client:
        (source,) = service.sources
        share = max(until(lambda: all(held := [host.weights_bytes for host in client.stats().hosts]) and held))
    limited = {**config, "placement": {**config["placement"], "memory_per_host_bytes": share + source.nbytes(ExpertShard(0))}}
    with ServiceHarness(limited, "local", tmp_path) as service, Client(service.target) as client:
        with pytest.raises(ConfigError, match=r"host-\d would hold .* while this change happens, but placement.memory_per_host_bytes"):
            service.call(service.controller.swap(LAYER, new))
        assert client.forward(tokens(0)).model_revision == 1
        service.call(service.controller.swap(LAYER, new, [1]))
        service.call(service.controller.scale(3))
        assert client.forward(tokens(0)).model_revision == 2
