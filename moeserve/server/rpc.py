"""gRPC's types by short names, in quotes where they are generic only in the stubs; reads and writes that are never cut off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

import grpc

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
#: what answers: a coroutine function, or an asynchronous generator function
Behavior = Callable[[Any, Context], Any]


def to_its_end(transfer: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """A read or write as a task that is not to be cancelled: gRPC never frees what it needs for one that is. It ends with the call."""
    task = asyncio.ensure_future(transfer)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # its reader may have gone
    return task
