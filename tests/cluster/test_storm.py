"""A storm on a real Ray: administrators, accidents and balancing, at once and at random, under load. Callers notice nothing.

MOESERVE_STORM_SEED, MOESERVE_STORM_S: another storm than the one of the test suite, or a longer one.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import moeserve
from moeserve import BackgroundService
from tests.cluster.storm_load import COPIES, StormLoad, Weights
from tests.cluster.storm_verbs import Storm
from tests.cluster.storm_weights import LAYERS, DenseLayer, versions
from tests.support.ray_service import metric
from tests.support.waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

#: of changes
STORM_S = float(os.environ.get("MOESERVE_STORM_S", "20"))
CLIENTS = 4
#: rounds of balancing in a row that move nothing after a storm, and within how many: some gains are certain only after more rows
STILL_ROUNDS, MOST_ROUNDS = 3, 20
TOKEN = "of the administrator"


@pytest.mark.timeout(240)
def test_callers_notice_nothing_of_a_storm(tiny_moe: Path, tmp_path: Path, local_ray: None) -> None:
    """No call fails, though none is made twice; every answer has weights that were served meanwhile; afterwards, nothing moves."""
    seed = int(os.environ.get("MOESERVE_STORM_SEED", "1"))
    (tmp_path / "admin").touch(mode=0o600)
    (tmp_path / "admin").write_text(TOKEN)
    config = {
        "model": {"checkpoint": tiny_moe, "dtype": "float32"},
        "placement": {"num_hosts": 3, "cpus_per_host": 0.1, "copies": COPIES},
        "server": {"port": 0, "metrics_port": 0, "admin_token_file": tmp_path / "admin"},
        "resilience": {"hang_after_ms": 20_000},  # nobody hangs here, but the machine may be busy
        "balancing": {"enabled": True, "extra_copies": 1.25, "min_gain": 0.15, "interval_s": 3.0, "window_s": 18.0},
    }
    paths, weights = versions(tiny_moe, tmp_path), Weights()
    layers = [DenseLayer(paths, layer) for layer in range(LAYERS)]
    with moeserve.serve(config) as service, Storm(service.target, TOKEN, paths, weights, seed) as storm:
        load = StormLoad(service.target, TOKEN, layers, weights)
        with load.of(CLIENTS):
            until(lambda: load.goes_on() and min(load.answered) > 0)
            end = time.monotonic() + STORM_S
            while time.monotonic() < end:
                storm.blow()
                assert load.goes_on()
            until(lambda: load.goes_on() and storm.whole())
            until(lambda: load.goes_on() and storm.admin.rebalance(dry_run=True).steps == 0)
            moved = [moves(service, storm, load) for _ in range(STILL_ROUNDS)]
            while any(moved[-STILL_ROUNDS:]):
                assert len(moved) < MOST_ROUNDS, f"the load is steady, but experts move on and on: {moved}"
                moved.append(moves(service, storm, load))
    print(f"answers {load.answered}")
    assert storm.done.total() > storm.refused.total()


def moves(service: BackgroundService, storm: Storm, load: StormLoad) -> bool:
    """Whether the next round of balancing that ends has moved anything."""
    made, epoch = rounds(service), storm.admin.status().epoch
    until(lambda: load.goes_on() and rounds(service) > made)
    return storm.admin.status().epoch > epoch


def rounds(service: BackgroundService) -> float:
    """Of balancing that have ended, whatever they found to do."""
    return metric(service, "moeserve_rebalances_total")
