from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from moeserve.client import AsyncClient, Client
from tests.client.calls import Calls
from tests.support.engine import EXPERTS, HIDDEN, FakeEngine, spec
from tests.support.servers import served


@pytest.fixture
def engine() -> FakeEngine:
    """Layer n multiplies by n + 1."""
    layers = [(spec(f"model.layers.{n}.mlp", HIDDEN, EXPERTS), lambda x, ids, weights, n=n: x * (n + 1)) for n in range(2)]
    return FakeEngine(layers)


@pytest.fixture
def target(engine: FakeEngine) -> Iterator[str]:
    with served(engine, max_message_bytes=4 * 2**20) as (target, _, _):
        yield target


@pytest.fixture(params=[Client, AsyncClient])
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Callable[..., Calls]]:
    opened: list[Calls] = []

    def connect(target: str, **options: Any) -> Calls:
        opened.append(Calls(request.param(target, **options)))
        return opened[-1]

    yield connect
    for calls in opened:
        await calls.close()


@pytest.fixture
def calls(connect: Callable[..., Calls], target: str) -> Calls:
    return connect(target)
