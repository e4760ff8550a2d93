"""Both clients called alike."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from moeserve import AsyncClient, Client


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
