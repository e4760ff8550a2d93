"""Actors that stay: what cannot start says why, and leaves nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import ray

from moeserve import ConfigError, ExpertUnavailable
from moeserve.cluster.ray_program import ProgramActor, start_program
from tests.support.waiting import until_async


class Broken:
    """Cannot start, and must not be asked to stop."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    async def start(self) -> None:
        self._tell("starting")
        raise ConfigError("the port is in use")

    async def stop(self) -> None:
        raise AssertionError("what has not started cannot be stopped")

    def describe(self) -> None:
        raise AssertionError("what has not started cannot be described")


@pytest.mark.ray
async def test_what_cannot_start_says_why_and_is_ended(local_ray: None) -> None:
    namespace = ray.get_runtime_context().namespace
    actor = start_program("frontend", "frontend-0", namespace, partial(Broken), {})
    told: list[str] = []
    with pytest.raises(ConfigError, match=r"^the port is in use$"):
        await actor.ready(told.append)
    assert told == ["starting"]
    await actor.stop(30)
    await until_async(lambda: ProgramActor.find("frontend-0", namespace) is None)  # Ray has been told; on a busy machine it takes a moment


@pytest.mark.ray
async def test_of_two_that_are_started_at_the_same_moment_one_is_told(local_ray: None) -> None:
    namespace = ray.get_runtime_context().namespace
    actor = start_program("frontend", "frontend-0", namespace, partial(Broken), {})
    with pytest.raises(ExpertUnavailable, match=f"^another frontend-0 has been started in namespace {namespace} at the same moment$"):
        start_program("frontend", "frontend-0", namespace, partial(Broken), {})
    await actor.stop(30)
    await until_async(lambda: ProgramActor.find("frontend-0", namespace) is None)
