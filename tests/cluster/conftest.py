"""One service on one real Ray for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moeserve import BackgroundService, serve
from tests.support.ray_service import NUM_HOSTS


@pytest.fixture(scope="package")
def service(local_ray: None, tiny_moe: Path) -> Iterator[BackgroundService]:
    """All four layers of the tiny checkpoint on four hosts, one logical GPU each."""
    config = {
        "model": {"checkpoint": tiny_moe, "dtype": "float32"},
        "placement": {"num_hosts": NUM_HOSTS, "gpus_per_host": 1, "cpus_per_host": 0.5},
        "server": {"port": 0, "metrics_port": 0},
    }
    with serve(config) as running:
        yield running
