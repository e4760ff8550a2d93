"""Passing rows on to other hosts, beside the host's loop: a small event loop in a thread of its own, a channel to each peer.

R rows of a message, H hidden size, N pairs of one share, S rows that share needs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from moeserve.errors import Cancelled, DeadlineExceeded, MoEServeError
from moeserve.loops import LoopThread
from moeserve.observe.stats import HostInfo
from moeserve.transport import (
    Channel,
    ChannelClosed,
    Destination,
    FrontendKeys,
    KeyPair,
    PassOn,
    PeerLost,
    Work,
    WorkShape,
    choose_endpoint,
    connect,
)

log = logging.getLogger(__name__)


class Share(NamedTuple):
    """What one message passes on: pairs from `start` on, to the first of `destinations`, which passes on those of the others."""

    start: int
    destinations: Sequence[Destination]


class Helped(NamedTuple):
    """What peers did: rows [S] int64 of the message, and their sums [S, H] float32."""

    rows: torch.Tensor
    partial: torch.Tensor


class Relayed:
    """Other hosts' part of one work. Its memory is read until `is_done`; `helped` and `error` are to be read after that."""

    def __init__(self, work: Work, thread: LoopThread) -> None:
        self.work = work
        self.is_done = False
        self.helped: Sequence[Helped] = ()
        self.error: MoEServeError | None = None
        #: set by the host's loop: its own part is computed or has failed, and why
        self.is_own_done = False
        self.own_error: MoEServeError | None = None
        self.task: asyncio.Task[None] | None = None
        self._thread = thread

    def cancel(self) -> None:
        """Cancels the answer; from any thread. It still becomes done."""
        self._thread.soon(self._cancel)

    def _cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()


class RelayLink(NamedTuple):
    """A connection to one incarnation of another host."""

    info: HostInfo
    dialling: asyncio.Task[Channel]

    @property
    def is_lost(self) -> bool:
        """Whether connecting has failed, or the channel has closed since."""
        if not self.dialling.done():
            return False
        return self.dialling.cancelled() or self.dialling.exception() is not None or self.dialling.result().closed.is_set()

    async def hang_up(self) -> None:
        """Closes the channel, if there is one."""
        if self.dialling.done() and not self.is_lost:
            await self.dialling.result().close()


class Relay:
    """Host `number`'s messages to other hosts; one that owes it an answer and is silent for `hang_after_s` is lost.

    A message never contains an address: hosts are found in the directory.
    """

    def __init__(self, number: int, keys: KeyPair, hang_after_s: float) -> None:
        self.number = number
        self._keys, self._hang_after_s = keys, hang_after_s
        self._directory: Mapping[int, HostInfo] = {}
        self._peers: dict[int, RelayLink] = {}
        #: None until the first message is passed on
        self._thread: LoopThread | None = None

    def meet(self, directory: Mapping[int, HostInfo]) -> None:
        """Sets all hosts by number, including this one; from any thread, after every change."""
        self._directory = dict(directory)

    def pass_on(self, work: Work, on_done: Callable[[], None]) -> Relayed:
        """Sends the other destinations of `work` their parts; `on_done` is called from another thread when they have answered or failed."""
        if self._thread is None:
            self._thread = LoopThread("relay")
            self._thread.start()
        relayed = Relayed(work, self._thread)
        work.on_cancel = relayed.cancel
        self._thread.soon(self._begin, relayed, on_done)
        return relayed

    def close(self) -> None:
        """Disconnects from all peers and cancels messages in flight. Call it from the thread that calls `pass_on`."""
        if self._thread is not None:
            self._thread.call(self._hang_up())
            self._thread.stop()

    async def _hang_up(self) -> None:
        for peer in self._peers.values():
            await peer.hang_up()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _begin(self, relayed: Relayed, on_done: Callable[[], None]) -> None:
        def done(_: asyncio.Task[None]) -> None:
            relayed.is_done = True
            on_done()

        relayed.task = asyncio.create_task(self._run(relayed))
        relayed.task.add_done_callback(done)

    async def _run(self, relayed: Relayed) -> None:
        work = relayed.work
        tasks = [asyncio.create_task(self._ask(work, share)) for share in _shares(work)]
        try:
            async with asyncio.timeout(work.deadline - time.monotonic()):
                relayed.helped = await asyncio.gather(*tasks)
        except TimeoutError:
            relayed.error = DeadlineExceeded("the deadline passed before the hosts that this one passed rows on to had answered")
        except asyncio.CancelledError:
            relayed.error = Cancelled("the frontend cancelled this work")
        except Exception as error:  # any error: the host goes on, and the caller gets the error
            relayed.error = self._as_user_error(error, work.layer)
            error.__traceback__ = None  # whose frames refer to the error, and to all that was lent
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _as_user_error(self, error: Exception, layer: int) -> MoEServeError:
        if isinstance(error, ChannelClosed):
            return PeerLost(str(error))
        if isinstance(error, MoEServeError):
            return error
        log.error("host %d failed to pass rows on", self.number, exc_info=error)
        return MoEServeError(f"the expert host failed to pass rows of layer {layer} on: {type(error).__name__}")

    async def _ask(self, work: Work, share: Share) -> Helped:
        channel = await self._channel(share.destinations[0].host)
        pairs = slice(share.start, share.destinations[-1].pair_end)
        row_index = work.request.row_index[pairs].numpy()
        is_needed = np.zeros(len(work.hidden_states), dtype=np.bool_)
        is_needed[row_index] = True
        rows = torch.from_numpy(np.flatnonzero(is_needed))
        further = [Destination(host, end - share.start) for host, end in share.destinations] if len(share.destinations) > 1 else []
        shape = WorkShape(len(rows), work.hidden_states.shape[1], len(row_index), work.hidden_states.dtype, len(further))
        lease = channel.lease(shape)
        positions = torch.from_numpy((is_needed.cumsum(dtype=np.int32) - 1)[row_index])
        lease.write(work.hidden_states, rows, positions, work.request.local_experts[pairs], work.request.weights[pairs])
        if further:
            lease.address(further)
        timeout_s = max(0.0, work.deadline - time.monotonic())
        pass_on = work.header.pass_on if further else PassOn.NOTHING
        answer = await channel.send(lease, layer=work.layer, epoch=work.epoch, timeout_s=timeout_s, pass_on=pass_on)
        return Helped(rows, answer.tensor)

    async def _channel(self, host: int) -> Channel:
        """The channel to a peer, opened when it is first needed. Raises ChannelClosed when it cannot be reached."""
        info, here = self._directory.get(host), self._directory.get(self.number)
        if info is None or here is None:
            raise PeerLost(f"host {self.number} does not know host {host}")
        peer = self._peers.get(host)
        if peer is None or peer.info.incarnation != info.incarnation or peer.is_lost:
            endpoint = choose_endpoint(info.endpoints, is_same_node=info.node == here.node)
            keys = FrontendKeys(self._keys, info.public_key) if info.public_key else None
            # A closed channel has its memory: those of hosts that have left would add up.
            self._peers = {number: link for number, link in self._peers.items() if not link.is_lost}
            known, peer = peer, RelayLink(info, asyncio.create_task(connect(endpoint, keys=keys, silent_after_s=self._hang_after_s)))
            self._peers[host] = peer
            if known is not None:
                await known.hang_up()
        # Several messages may wait for it: one that is cancelled leaves it to the others.
        return await asyncio.shield(peer.dialling)


def _shares(work: Work) -> list[Share]:
    """Every other host alone, or all of them as a chain."""
    others = work.destinations[1:]
    starts = [destination.pair_end for destination in work.destinations]
    if work.header.pass_on is PassOn.CHAIN:
        return [Share(starts[0], others)]
    return [Share(start, [destination]) for start, destination in zip(starts, others, strict=False)]
