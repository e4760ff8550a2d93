"""The frontend's connection to one host."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from moeserve.errors import MoEServeError
from moeserve.observe.metrics import Metrics
from moeserve.observe.stats import HostInfo
from moeserve.transport import Channel, FrontendKeys, KeyPair, Partial, choose_endpoint, connect

log = logging.getLogger(__name__)

_RETRY_S = 0.5

Resolve = Callable[[], Awaitable[HostInfo]]


class HostLink:
    """Keeps a channel to one host; when the host dies, it gets the next incarnation from `resolve` and connects to it."""

    def __init__(self, name: str, resolve: Resolve, keys: KeyPair, metrics: Metrics, on_change: Callable[[], None]) -> None:
        self.name = name
        self.info: HostInfo | None = None
        self.restarts = 0
        self._here = ""
        self._resolve = resolve
        self._keys = keys
        self._on_change = on_change
        self._up = metrics.host_up.labels(name)
        self._restarts = metrics.host_restarts
        self._channel: Channel | None = None
        self._connected = asyncio.Event()
        self._hopeless = asyncio.Event()
        self._why_not = ""
        self._keeper: asyncio.Task[None] | None = None
        #: rows sent and not yet answered
        self.queue_tokens = 0
        self._queue_gauge = metrics.host_queue_tokens.labels(name)

    @property
    def channel(self) -> Channel | None:
        """None while the host is down."""
        channel = self._channel  # other threads read it, and the event loop may remove it meanwhile
        return channel if channel is not None and not channel.closed.is_set() else None

    def channel_at(self, epoch: int) -> Channel | None:
        """As `channel`; None also when the host has no experts of that epoch, and never will."""
        info = self.info
        return self.channel if info is not None and info.since_epoch <= epoch else None

    @property
    def node(self) -> str:
        """The node of the host, or its last known node."""
        info = self.info
        return info.node if info is not None else ""

    def count_until(self, answered: asyncio.Future[Partial], rows: int) -> None:
        """Counts `rows` as outstanding at the host until the future is done."""
        self._owes(rows)
        answered.add_done_callback(lambda _: self._owes(-rows))

    def _owes(self, rows: int) -> None:
        self.queue_tokens += rows
        self._queue_gauge.set(self.queue_tokens)

    async def start(self, here: str) -> None:
        """Connect for the first time, from the node `here`, and stay connected until `close`, even if this call is cancelled."""
        self._here = here
        self._keeper = asyncio.create_task(self._keep())
        connected = asyncio.create_task(self.connected())
        try:
            await asyncio.wait({connected, self._keeper}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            connected.cancel()
        if self._keeper.done() and not self._keeper.cancelled():
            self._keeper.result()

    async def refresh(self) -> None:
        """Update the host's description; one that is down is updated when it is back."""
        if self.channel is not None:
            self.info = await self._resolve()

    async def connected(self) -> Channel:
        """Waits for the channel."""
        while (channel := self.channel) is None:
            self._connected.clear()  # it may have closed a moment ago
            await self._connected.wait()
        return channel

    @property
    def why_not(self) -> str:
        """Why waiting for the host cannot help while it is down; "" = it is restarting."""
        return self._why_not

    def set_failing(self, why: str) -> None:
        """Sets why it does not come back soon; "" = it may."""
        self._why_not = why
        (self._hopeless.set if why else self._hopeless.clear)()

    async def decided(self) -> None:
        """Waits until it is connected, or waiting cannot help."""
        waits = {asyncio.ensure_future(self.connected()), asyncio.ensure_future(self._hopeless.wait())}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def close(self) -> None:
        """Disconnect from the host."""
        if self._keeper is not None:
            self._keeper.cancel()
        if self._channel is not None:
            await self._channel.close()

    async def _keep(self) -> None:
        await self._connect()
        while True:
            assert self._channel is not None
            await self._channel.closed.wait()
            log.warning("host %s is down; waiting for it to come back", self.name)
            self._channel = None
            self._set_up(False)
            await self._connect()
            self.restarts += 1
            self._restarts.inc()
            log.info("host %s is back", self.name)

    async def _connect(self) -> None:
        said = ""
        while self._channel is None:
            try:
                self.info = await self._resolve()
                keys = FrontendKeys(self._keys, self.info.public_key) if self.info.public_key else None
                endpoint = choose_endpoint(self.info.endpoints, is_same_node=self.info.node == self._here)
                self._channel = await connect(endpoint, keys=keys)
            except MoEServeError as error:
                # It died again before it was reached, or cannot start: requests that need it have deadlines.
                if str(error) != said:
                    log.warning("host %s cannot be reached: %s", self.name, error)
                said = str(error)
                await asyncio.sleep(_RETRY_S)
        self._set_up(True)

    def _set_up(self, up: bool) -> None:
        self._up.set(up)
        (self._connected.set if up else self._connected.clear)()
        self._on_change()
