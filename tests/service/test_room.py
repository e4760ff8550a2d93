"""A change for which a host has no room is refused before anything is read; one that fits is made."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeserve import Client, ConfigError, MoELayer
from moeserve.experts import ExpertShard
from moeserve.host.expert_store import ExpertStore
from tests.support.closeness import assert_close
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


def test_no_host_holds_more_than_it_may_at_any_moment_however_unequal_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of two sizes. While a host changes from one placement to the next, what it holds of both counts."""
    put, seen = ExpertStore.put, list[int]()

    def put_and_look(store: ExpertStore, *args: Any) -> None:
        put(store, *args)
        seen.append(store.nbytes)

    monkeypatch.setattr(ExpertStore, "put", put_and_look)
    small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 16, "seed": 3, "gating": {"top_k": 1}}
    large = {**small, "num_experts": 4, "intermediate_size": 32}
    one, limit = 3 * 16 * 8 * 4, 13 * 3 * 16 * 8 * 4
    config = {
        "layers": [small, large],
        "placement": {"num_hosts": 4, "memory_per_host_bytes": limit},
        "balancing": {"extra_copies": 0.5, "window_s": 1e6},
    }
    rows, layers, zipf = torch.randn(1000, 16), [MoELayer(**small), MoELayer(**large)], [rank**-1.2 for rank in range(1, 17)]
    with ServiceHarness(config, "local", tmp_path) as service, Client(service.target) as client:

        def ask(*shares: list[float]) -> None:
            for number, share in enumerate(shares):
                ids = torch.multinomial(torch.tensor(share).expand(1000, -1), 1)
                routed = {"topk_ids": ids, "topk_weights": torch.ones(1000, 1)}
                assert_close(client.forward(rows, layer=number, **routed).hidden_states, layers[number].run(rows, **routed).hidden_states)

        until(lambda: service.is_counting)
        asked = 0
        for times, of_small, of_large in ((1, zipf, [8.0, 4, 1, 1]), (3, zipf[::-1], [1.0, 1, 1, 9]), (9, zipf, [1.0, 9, 1, 1])):
            for _ in range(times):
                ask(of_small, of_large)
            asked += 1000 * times
            until(lambda: sum(service.controller.status().layers[1].demand_rows_per_s) * 1e6 / 3 > 0.99 * asked)  # noqa: B023
            with suppress(ConfigError):  # hosts may be too full to exchange all that should move
                service.call(service.controller.rebalance())
        moved = service.frontends.balancing.moved_experts
        sizes = zip((one, 4 * one), service.controller.state.release.placement.layers, strict=True)
        held = sum(size * np.bincount(layer.host_of_physical, minlength=4) for size, layer in sizes)
        assert moved > 5 and len(np.unique(held)) > 1, "hosts do not hold the same"
        assert max(seen) <= limit, "not even during a move"
        assert max(seen) > 0.8 * limit, "there was little room"
