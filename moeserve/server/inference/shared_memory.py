"""The protocol's extension for system shared memory: who may use it, and how much; tensors are read from it and written to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import torch

from moeserve.api.tensors import raw, view
from moeserve.config import ServerConfig
from moeserve.errors import InvalidRequest, PermissionDenied
from moeserve.loops import in_thread
from moeserve.server.byte_budget import ByteBudget
from moeserve.server.inference.decoding import InferRequest, WantedOutput
from moeserve.server.inference.messages import pb
from moeserve.server.inference.peers import runs_as_this_user
from moeserve.server.inference.regions import Regions
from moeserve.server.rpc import Context


class SharedMemory:
    """Of one server. What is read counts among the bytes of messages, in `budget` and against server.max_message_bytes."""

    def __init__(self, budget: ByteBudget, config: ServerConfig) -> None:
        self._why_off = _why_off(config)
        self._budget, self._max_bytes = budget, config.max_message_bytes
        self._regions = Regions()

    @property
    def is_on(self) -> bool:
        """Whether anybody may use it."""
        return not self._why_off

    def methods(self) -> dict[str, tuple[Any, Any]]:
        """The methods of the extension, with the classes of their requests."""
        return {
            "SystemSharedMemoryStatus": (self._status, pb.SystemSharedMemoryStatusRequest),
            "SystemSharedMemoryRegister": (self._register, pb.SystemSharedMemoryRegisterRequest),
            "SystemSharedMemoryUnregister": (self._unregister, pb.SystemSharedMemoryUnregisterRequest),
        }

    @asynccontextmanager
    async def tensors(self, request: InferRequest, context: Context, own: int) -> AsyncIterator[dict[str, torch.Tensor]]:
        """Copies of the inputs that are in shared memory, by name; outputs that are wanted there are checked.

        `own`: the bytes of the request's message, which are counted already.
        """
        outputs = [wanted.where for wanted in request.wanted if wanted.where is not None]
        if not outputs and not request.shared:
            yield {}
            return
        self._let_in(context)
        for where in outputs:
            self._regions.find(where.region).require(where.offset, where.nbytes)
        nbytes = sum(each.where.nbytes for each in request.shared.values())
        if nbytes > self._max_bytes:
            raise InvalidRequest(f"the inputs in shared memory have {nbytes} bytes; server.max_message_bytes is {self._max_bytes}")
        regions = {name: self._regions.find(each.where.region) for name, each in request.shared.items()}
        for name, each in request.shared.items():
            regions[name].require(each.where.offset, each.where.nbytes)
        self._budget.take(nbytes, own)
        try:
            found = {}
            for name, each in request.shared.items():
                data = await in_thread(regions[name].read, each.where.offset, each.where.nbytes)
                found[name] = view(data, each.shape, each.datatype.dtype, name)
            yield found
        finally:
            self._budget.add(-nbytes)

    async def write(self, answer: Sequence[tuple[WantedOutput, torch.Tensor]]) -> None:
        """Writes the tensors that are wanted in shared memory. Raises InvalidRequest when one does not fit."""
        for wanted, tensor in answer:
            if wanted.where is None:
                continue
            data, name = raw(tensor), wanted.output.name
            if len(data) > wanted.where.nbytes:
                raise InvalidRequest(f"output {name} has {len(data)} bytes; its shared_memory_byte_size is {wanted.where.nbytes}", name)
            await in_thread(self._regions.find(wanted.where.region).write, wanted.where.offset, data)

    def _let_in(self, context: Context) -> None:
        if self._why_off:
            raise PermissionDenied(f"shared memory is switched off: {self._why_off}")
        if not runs_as_this_user(context.peer()):
            raise PermissionDenied("shared memory is only for callers on the service's machine that run as the same user")

    async def _status(self, request: pb.SystemSharedMemoryStatusRequest, context: Context) -> pb.SystemSharedMemoryStatusResponse:
        self._let_in(context)
        of = pb.SystemSharedMemoryStatusResponse.RegionStatus
        found = self._regions.listed(request.name)
        regions = {each.name: of(name=each.name, key=each.key, offset=each.offset, byte_size=each.nbytes) for each in found}
        return pb.SystemSharedMemoryStatusResponse(regions=regions)

    async def _register(self, request: pb.SystemSharedMemoryRegisterRequest, context: Context) -> pb.SystemSharedMemoryRegisterResponse:
        self._let_in(context)
        self._regions.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    async def _unregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: Context
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        self._let_in(context)
        self._regions.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()


def _why_off(config: ServerConfig) -> str:
    """Empty when it is not."""
    if config.shared_memory != "local":
        return f"server.shared_memory is {config.shared_memory!r}"
    if config.processes > 1:
        # The client's next connection may reach another process, which does not know what was registered with this one.
        return f"server.processes is {config.processes}, and regions are known to one process; allowed: 1, or tensors in messages"
    return ""
