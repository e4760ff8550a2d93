"""The frontend's connection to one host."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from moeserve.errors import MoEServeError
from moeserve.frontend import timing
from moeserve.frontend.health import Breaker, HostHealth
from moeserve.frontend.owing import Owing
from moeserve.observe.metrics import Metrics
from moeserve.observe.stats import Condition, HostInfo
from moeserve.transport import Channel, FrontendKeys, KeyPair, Partial, choose_endpoint, connect

log = logging.getLogger(__name__)

Resolve = Callable[[], Awaitable[HostInfo]]
#: has a host compute rows of layers that nobody asked for; raises what is wrong with it
Canary = Callable[[Channel, Collection[int]], Awaitable[None]]


@dataclass(frozen=True)
class Dial:
    """How a host is reached: `resolve` tells of its present incarnation, `keys` are shown over TCP; silent for hang_after_s it is lost."""

    resolve: Resolve
    canary: Canary
    keys: KeyPair
    hang_after_s: float


class HostLink:
    """Keeps a channel to one host; when the host dies it asks where the next incarnation is, and connects to that.

    A host that was lost, or has erred repeatedly, gets rows again once a canary comes back.
    """

    def __init__(self, name: str, dial: Dial, metrics: Metrics, on_change: Callable[[], None]) -> None:
        self.name = name
        self.info: HostInfo | None = None
        self.restarts = 0
        self._here = ""
        self._dial = dial
        self._on_change = on_change
        self._shown = metrics.host_states.labels(name)
        self._restarts = metrics.host_restarts
        self._channel: Channel | None = None
        self._connected = asyncio.Event()
        self._breaker = Breaker()
        #: when it has erred last in a layer, monotonic seconds; by the layer's number
        self._erred_in: dict[int, float] = {}
        self._is_proven, self._is_silent = True, False
        self._down_since = time.monotonic()
        self._why_not = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._owing = Owing(metrics.host_queue_tokens.labels(name))

    @property
    def channel(self) -> Channel | None:
        """None while the host is down."""
        channel = self._channel  # other threads read it, and the event loop may remove it meanwhile
        return channel if channel is not None and not channel.closed.is_set() else None

    def channel_at(self, epoch: int) -> Channel | None:
        """As `channel`; None also when the host has no experts of that epoch, and never will."""
        info = self.info
        return self.channel if info is not None and info.since_epoch <= epoch else None

    def is_live_at(self, epoch: int) -> bool:
        """Whether the host should get rows of that epoch: it can be reached, has proven itself since it was lost, and does not err."""
        return self._is_proven and not self._breaker.is_open and self.channel_at(epoch) is not None

    def health(self, epoch: int, rows: int) -> HostHealth:
        """The host now; what is late, of a message of so many rows."""
        return HostHealth(
            name=self.name,
            is_connected=self.channel_at(epoch) is not None,
            queue_tokens=self._owing.rows,
            down_since=0.0 if self.channel is not None else self._down_since,
            why_not=self._why_not,
            late_after_s=self._owing.durations.late_after_s(rows),
        )

    @property
    def condition(self) -> Condition:
        """As people see it."""
        if self.channel is None:
            return "out" if self._is_silent else "down"
        if not self._is_proven or self._breaker.is_open:
            return "out"
        return "slow" if self.is_late else "up"

    @property
    def is_late(self) -> bool:
        """Whether it has not answered something that it would have answered by now, as a rule, even if others have meanwhile."""
        channel = self.channel
        return self._owing.is_late(time.monotonic(), channel.owed_to_nobody() if channel is not None else ())

    @property
    def node(self) -> str:
        """The node of the host, or its last known node."""
        info = self.info
        return info.node if info is not None else ""

    @property
    def queue_tokens(self) -> int:
        """Rows sent and not yet answered."""
        return self._owing.rows

    def count_until(self, answered: asyncio.Future[Partial], rows: int) -> None:
        """The host owes answers to `rows` more, until it has given them or nobody waits any longer."""
        self._owing.add(answered, rows)

    def erred(self, layer: int) -> None:
        """The host has answered with an error, or with sums that another copy shows to be wrong."""
        self._erred_in[layer] = now = time.monotonic()
        if self._breaker.error(now):
            log.warning("host %s errs: other copies compute for it until it answers a canary", self.name)
            self._tell()
            self._later(self._prove())

    def look(self) -> None:
        """To be called now and then: a host that says it lives and answers nothing, much longer than it ever took, is hung up on."""
        now, channel = time.monotonic(), self.channel
        # A pass that waits for experts to be read makes progress.
        silent_s = now - max(self._owing.silent_since(), channel.loaded_at if channel is not None else 0.0)
        if channel is not None and silent_s > self._owing.durations.stuck_after_s(self._owing.rows, self._dial.hang_after_s):
            log.warning("host %s is stuck: it has answered nothing for %.1f s", self.name, silent_s)
            channel.fall_silent(silent_s)
        if channel is not None and channel.loads.used:
            self._shown.loads = channel.loads
        self._shown.set(self.channel is not None, self.condition)

    async def start(self, here: str) -> None:
        """Connect for the first time, from the node `here`, and stay connected until `close`, even if this call is cancelled."""
        self._here = here
        keeper = self._later(self._keep())
        connected = asyncio.create_task(self.connected())
        try:
            await asyncio.wait({connected, keeper}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            connected.cancel()
        if keeper.done() and not keeper.cancelled():
            keeper.result()

    def refresh(self, info: HostInfo) -> None:
        """Update the description of the incarnation that it is connected to; of another one it hears when it connects to that."""
        if self.info is not None and info.incarnation == self.info.incarnation:
            self.info = info

    async def connected(self) -> Channel:
        """Waits for the channel."""
        while (channel := self.channel) is None:
            self._connected.clear()  # it may have closed a moment ago
            await self._connected.wait()
        return channel

    def set_failing(self, why: str) -> None:
        """Sets why it does not come back soon; "" = it may."""
        self._why_not = why

    async def close(self) -> None:
        """Let go of the host."""
        for task in self._tasks:
            task.cancel()
        if self._channel is not None:
            await self._channel.close()

    async def _keep(self) -> None:
        await self._connect()
        while True:
            assert self._channel is not None
            await self._channel.closed.wait()
            self._is_silent = self._channel.is_silent
            log.warning("host %s is %s; waiting for it to come back", self.name, "silent" if self._is_silent else "down")
            self._channel, self._is_proven, self._down_since = None, False, time.monotonic()
            self._connected.clear()
            self._tell()
            await self._connect()
            self.restarts += 1
            self._restarts.inc()
            log.info("host %s is back", self.name)
            await self._prove()

    async def _connect(self) -> None:
        said, pause_s = "", timing.SHORTEST_RETRY_S
        while self._channel is None:
            try:
                self.info = await self._dial.resolve()
                keys = FrontendKeys(self._dial.keys, self.info.public_key) if self.info.public_key else None
                endpoint = choose_endpoint(self.info.endpoints, is_same_node=self.info.node == self._here)
                self._channel = await connect(endpoint, keys=keys, silent_after_s=self._dial.hang_after_s)
            except MoEServeError as error:
                # It died again before it was reached, or cannot start: requests that need it have deadlines.
                if str(error) != said:
                    log.warning("host %s cannot be reached: %s", self.name, error)
                said = str(error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, timing.RETRY_S)
        self._connected.set()
        self._tell()

    async def _prove(self) -> None:
        """Canaries, until one comes back or the host is gone again."""
        pause_s, said, now = timing.CANARY_S, "", time.monotonic()
        self._erred_in = {layer: at for layer, at in self._erred_in.items() if now - at <= timing.BREAKER_WINDOW_S}
        while (channel := self.channel) is not None:
            layers = sorted(self._erred_in)
            try:
                async with asyncio.timeout(max(1, len(layers)) * timing.STUCK_HANGS * self._dial.hang_after_s):
                    await self._dial.canary(channel, layers)
            except (MoEServeError, TimeoutError) as error:
                if str(error) != said:
                    log.warning("host %s does not get rows: its canary says: %s", self.name, error or "nothing")
                said = str(error)
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await channel.closed.wait()  # then there is a next incarnation to connect to
                pause_s = min(2 * pause_s, timing.LONGEST_CANARY_S)
                continue
            self._breaker.close()
            for layer in layers:  # it may have erred in others meanwhile
                self._erred_in.pop(layer, None)
            self._is_proven = True
            self._tell()
            return

    def _later(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _tell(self) -> None:
        self._shown.set(self.channel is not None, self.condition)
        self._on_change()
