"""A service that could not start, and whose deployer has gone, is in nobody's way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from moeserve import ConfigError, load_config
from moeserve.cluster.ray_program import ProgramActor, start_program
from moeserve.cluster.ray_where import on_head
from moeserve.programs.deploy import Deployer
from tests.support.waiting import until_async

pytestmark = pytest.mark.ray


class Broken:
    """As a service with a wrong configuration."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        pass

    async def start(self) -> None:
        raise ValueError("as it was configured")

    async def stop(self) -> None:
        raise AssertionError("what has not started cannot be stopped")

    def describe(self) -> None:
        raise AssertionError("what has not started cannot be described")


async def test_what_could_not_start_is_replaced_by_the_next(tmp_path: Path, local_ray: None) -> None:
    namespace = ray.get_runtime_context().namespace
    (tmp_path / "admin-token").write_text("secret")
    config = load_config(
        {
            "layers": [{"hidden_size": 16, "intermediate_size": 16, "num_experts": 128}],
            "placement": {"num_hosts": 100},
            "server": {"port": 0, "metrics_port": 0, "admin_token_file": tmp_path / "admin-token"},
            "controller": {"control_port": 0},
            "ray": {"address": "auto", "namespace": namespace},
        }
    )
    start_program("controller", "controller", namespace, Broken, on_head())
    told: list[str] = []
    with pytest.raises(ConfigError, match=r"^placement\.num_hosts is 100 .* but there is room for "):
        await Deployer(config).deploy(told.append)
    assert "it could not start, and is removed: controller failed: ValueError: as it was configured" in told
    await until_async(lambda: ProgramActor.find("controller", namespace) is None)
