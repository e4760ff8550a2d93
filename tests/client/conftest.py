from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from moeserve.client import AsyncClient, Client

from .engine import EXPERTS, HIDDEN, FunctionEngine, served, spec


@pytest.fixture
def engine() -> FunctionEngine:
    """Layer n multiplies by n + 1."""
    layers = [(spec(f"model.layers.{n}.mlp", HIDDEN, EXPERTS), lambda x, ids, weights, n=n: x * (n + 1)) for n in range(2)]
    return FunctionEngine(layers)


@pytest.fixture
def target(engine: FunctionEngine) -> Iterator[str]:
    with served(engine, max_message_bytes=4 * 2**20) as (target, _, _):
        yield target


class Calls:
    """`await calls.forward(...)`, whichever client it is: a blocking one is called from a thread of its own."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            method = getattr(self.client, name)
            if inspect.isasyncgenfunction(method):
                return [answer async for answer in method(*args, **kwargs)]
            if inspect.iscoroutinefunction(method):
                return await method(*args, **kwargs)
            if inspect.isgeneratorfunction(method):
                return await asyncio.to_thread(lambda: list(method(*args, **kwargs)))
            return await asyncio.to_thread(method, *args, **kwargs)

        return call


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
