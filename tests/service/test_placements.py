"""Copies, shards, stages and every kind of expert: the service is the layer in one process, wherever its experts stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve import Client, MoELayer
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness
from tests.support.kinds_of_experts import EXPERTS, HIDDEN, KINDS, SUMMED

PLACEMENTS: dict[str, dict[str, Any]] = {
    "one host": {"num_hosts": 1},
    "three hosts": {"num_hosts": 3},
    "two copies": {"num_hosts": 4, "copies": 2},
    "copies of hot experts": {"num_hosts": 3, "copies": {"default": 1, "layers.1": {"0": 3, "2": 2}}, "copy_choice": "round_robin"},
    "three shards": {"num_hosts": 3, "tensor_parallel": 3},
    "two shards of two copies": {"num_hosts": 4, "copies": 2, "tensor_parallel": 2},
    "two stages": {"num_hosts": 4, "pipeline_stages": 2, "tensor_parallel": 2},
    "as many as it takes": {"experts_per_host": 4, "copies": 2},
}
GATING: dict[str, Any] = {"top_k": 2, "capacity_factor": 0.7}


@pytest.mark.parametrize(
    ("kind", "placement"),
    [(kind, name) for kind in KINDS for name in PLACEMENTS if not ("expert" in KINDS[kind] and "tensor_parallel" in PLACEMENTS[name])],
)
def test_the_service_is_the_layer(kind: str, placement: str, tmp_path: Path) -> None:
    layers = [{"hidden_size": HIDDEN, "num_experts": EXPERTS, "gating": GATING, "seed": seed, **KINDS[kind]} for seed in (0, 1)]
    with (
        ServiceHarness({"layers": layers, "placement": PLACEMENTS[placement]}, "local", tmp_path) as service,
        Client(service.target) as client,
    ):
        for number, layer in enumerate(layers):
            reference = MoELayer(**layer)
            for num_tokens in (0, 1, 7, 300):
                rows = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(num_tokens))
                used = torch.arange(num_tokens) % 4 != 1
                out, expected = client.forward(rows, layer=number, used_token=used), reference.run(rows, used_token=used)
                assert_close(out.hidden_states, expected.hidden_states, SUMMED)
                for name in ("requested", "processed", "dropped", "dropped_tokens"):
                    assert torch.equal(getattr(out, name), getattr(expected, name)), name
