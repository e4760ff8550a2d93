"""A host under the test's hand, reachable over every kind of endpoint, and frontends to talk to it.

R rows, H hidden size, N (token, expert) pairs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import torch

from moeserve.transport import Channel, FrontendKeys, Lease, Limits, Listener, Partial, Work, WorkShape, connect
from tests.support.waiting import PATIENCE_OF_LOOPS_S

PATIENCE_S = PATIENCE_OF_LOOPS_S


@dataclass(frozen=True)
class Message:
    """hidden_states [R, H], row_index [N] int32, local_experts [N] int32 ascending, weights [N] float32."""

    hidden_states: torch.Tensor
    row_index: torch.Tensor
    local_experts: torch.Tensor
    weights: torch.Tensor

    @property
    def shape(self) -> WorkShape:
        rows, hidden_size = self.hidden_states.shape
        return WorkShape(rows, hidden_size, self.row_index.shape[0], self.hidden_states.dtype)

    def fill(self, lease: Lease) -> Lease:
        lease.views.hidden_states.copy_(self.hidden_states)
        lease.views.row_index.copy_(self.row_index)
        lease.views.local_experts.copy_(self.local_experts)
        lease.views.weights.copy_(self.weights)
        return lease

    def expected(self) -> torch.Tensor:
        """[R, H] float32: every row times the sum of its weights."""
        return torch.stack([row.float() * self.weights[self.row_index == index].sum() for index, row in enumerate(self.hidden_states)])


def random_message(rows: int = 3, hidden_size: int = 8, pairs: int = 5, dtype: torch.dtype = torch.float32, seed: int = 0) -> Message:
    generator = torch.Generator().manual_seed(seed)
    return Message(
        torch.randn(rows, hidden_size, generator=generator).to(dtype),
        torch.randint(0, rows, (pairs,), generator=generator, dtype=torch.int32),
        torch.randint(0, 4, (pairs,), generator=generator, dtype=torch.int32).sort().values,
        torch.rand(pairs, generator=generator),
    )


def answer(work: Work) -> None:
    """What a host of identity experts does."""
    rows = work.hidden_states.float()[work.row_index] * work.weights[:, None]
    work.reply_buffer().zero_().index_add_(0, work.row_index, rows)
    work.reply()


class Rig:
    """A listener that moves only when the test says so, and how frontends reach it."""

    def __init__(self, listener: Listener, limits: Limits, keys: FrontendKeys | None) -> None:
        self.listener = listener
        self.endpoint = listener.endpoints[0]
        self._limits = limits
        self._keys = keys

    @asynccontextmanager
    async def frontend(self, limits: Limits | None = None) -> AsyncIterator[Channel]:
        connecting = asyncio.create_task(connect_patiently(self.endpoint, limits or self._limits, self._keys))
        while not connecting.done():
            assert await self.poll() == []
        channel = await connecting
        try:
            yield channel
        finally:
            await channel.close()

    async def receive(self, count: int) -> list[Work]:
        """The next `count` works."""
        works: list[Work] = []
        async with asyncio.timeout(PATIENCE_S):
            while len(works) < count:
                works += await self.poll()
        assert len(works) == count
        return works

    async def serve_until(self, condition: Callable[[], bool]) -> None:
        """Answers everything that arrives until `condition` holds."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                for work in await self.poll():
                    answer(work)

    async def forward(self, channel: Channel, message: Message) -> Partial:
        future = send(channel, message)
        await self.serve_until(future.done)
        return await future

    async def poll(self) -> list[Work]:
        return await asyncio.to_thread(self.listener.poll, 0.01)


async def connect_patiently(endpoint: str, limits: Limits | None = None, keys: FrontendKeys | None = None) -> Channel:
    """A channel that no pause of a busy machine ends."""
    return await connect(endpoint, limits=limits or Limits(), keys=keys, timeout_s=PATIENCE_S, silent_after_s=PATIENCE_S)


def send(channel: Channel, message: Message, *, layer: int = 0, epoch: int = 0, timeout_s: float = 60.0) -> asyncio.Future[Partial]:
    return channel.send(message.fill(channel.lease(message.shape)), layer=layer, epoch=epoch, timeout_s=timeout_s)


RigFactory = Callable[..., Rig]
