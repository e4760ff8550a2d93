"""gRPC's types by short names, in quotes where they are generic only in the stubs; reads and writes that are never cut off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import grpc

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
#: what answers: a coroutine function, or an asynchronous generator function
Behavior = Callable[[Any, Context], Any]
