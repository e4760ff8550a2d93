"""What every test starts from: two threads, and no Ray unless it is marked `ray`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest

# Threads that spin while they wait make tiny matmuls ten times slower on a busy machine; read when torch is loaded.
os.environ["OMP_WAIT_POLICY"] = "passive"

import torch
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from moeserve.log_limit import LIMIT

# Tests start hundreds of processes. What these import, and what pytest rewrites, is compiled once, also where images ask for the contrary.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# How long something takes is measured in benchmarks/, not here.
settings.register_profile("moeserve", deadline=None)
settings.load_profile("moeserve")

# Programs that tests start are to get what a terminal sends, also where the tests themselves run under nohup.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

REPOSITORY = Path(__file__).parents[1]


class ByFile(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Where tests run side by side, those with Ray share one process and its Ray, and the tests of a file share what it has started."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if has_ray(file) else file


@cache
def has_ray(file: str) -> bool:
    return "pytest.mark.ray" in (REPOSITORY / file).read_text()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def as_many_threads_as_before() -> Iterator[None]:
    """A verb that runs in this process sets how many compute."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def quick_choices() -> Iterator[None]:
    """A kernel is chosen after it has been tried on one expert: measuring it well would take half of the time of all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moeserve.experts.choice._ALL_BYTES", 1)
        yield


@pytest.fixture(autouse=True)
def nothing_logged_yet() -> None:
    """Lines that are written once a minute are written in every test."""
    LIMIT.forget()


@pytest.fixture(autouse=True)
def no_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Unless the test is marked `ray`, there is none: `ray.init` raises, and the session's does not count. Ray is not loaded for this."""
    is_allowed = request.node.get_closest_marker("ray") is not None
    is_loaded = "ray" in sys.modules
    if is_loaded and not is_allowed:
        monkeypatch.setattr("ray.init", _refuse)
        monkeypatch.setattr("ray.is_initialized", lambda: False)
    yield
    if not is_loaded and not is_allowed and "ray" in sys.modules:
        assert not sys.modules["ray"].is_initialized(), "only a test marked `ray` may start Ray"


def _refuse(*args: object, **kwargs: object) -> NoReturn:
    raise AssertionError("only a test marked `ray` may start Ray")


@pytest.fixture(scope="session")
def tiny_moe() -> Path:
    """The checkpoint that ships with the project: Mixtral, 4 layers of 8 experts, bfloat16."""
    return REPOSITORY / "examples" / "tiny-moe"


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray for the whole session, with eight logical GPUs; a service started meanwhile uses it."""
    from moeserve.cluster.ray_runtime import RayRuntime
    from moeserve.config import PlacementConfig, RayConfig

    runtime = RayRuntime(RayConfig(num_cpus=8, num_gpus=8), PlacementConfig())
    runtime.start()
    yield
    runtime.stop()
