"""A frontend inside a program: it follows a controller, and its callers are threads of this process."""

from __future__ import annotations

import asyncio
import atexit
import os
import socket
import threading
import weakref
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Final

from moeserve.api import surroundings
from moeserve.api.output import ForwardOutput
from moeserve.api.request import LayerRequest
from moeserve.config import ServerConfig
from moeserve.control.follow import Report
from moeserve.control.following import unreached
from moeserve.control.orders import Orders
from moeserve.errors import Cancelled, DeadlineExceeded, ExpertUnavailable, MoEServeError
from moeserve.frontend import Frontend
from moeserve.loops import DrivenLoop, Waiter
from moeserve.observe.metrics import Metrics
from moeserve.programs.followed import Followed
from moeserve.programs.timing import AWAY_S, HOSTS_S
from moeserve.server.catalog import Catalog

#: the limits of a frontend that nobody else can call
SERVER: Final = ServerConfig()
#: in this process, to leave their controllers before it ends
_LIVE: Final[weakref.WeakSet[EmbeddedFrontend]] = weakref.WeakSet()


class EmbeddedFrontend:
    """Follows `orders` once it is `reach`ed for the first time, until `close`; all methods may be called by any thread.

    `node` is the node of this process: hosts there are reached through memory. `name` is for people. It is an error when the controller
    was not reached for `patience_s`.
    """

    def __init__(self, orders: Orders, name: str, node: str, patience_s: float) -> None:
        self._orders, self._node, self._patience_s = orders, node, patience_s
        self._name = name or f"{socket.gethostname()}-{os.getpid()} (embedded)"
        self._pid = os.getpid()
        self._driven = DrivenLoop("moeserve-embedded")
        self._followed: Followed | None = None
        #: reentrant, because a signal's handler may close it, too
        self._lock = threading.RLock()
        self._opening: Future[None] | None = None
        self._running: set[_Call] = set()
        self._is_closed = False
        #: what it serves, once it is reached
        self.catalog = Catalog("", ())

    @property
    def is_of_a_parent(self) -> bool:
        """Whether this process was forked from the one that it works in."""
        return os.getpid() != self._pid

    @property
    def is_over(self) -> bool:
        """Whether another one must take its place: it could not begin or go on, or an exception has come out of the middle of it."""
        opening = self._opening
        if self._is_closed or self._driven.is_interrupted:
            return True
        if opening is not None and opening.done() and (opening.cancelled() or opening.exception() is not None):
            return True
        return self._followed is not None and self._followed.broken.done()

    def why_over(self) -> MoEServeError:
        """What calls raise that it does not answer."""
        if self._driven.is_interrupted or (self._followed is not None and self._followed.broken.done()):
            return ExpertUnavailable("the frontend in this program had to begin anew; try again")
        return Cancelled("this client was closed")

    @property
    def is_ready(self) -> bool:
        """Whether every expert can be reached."""
        return self._followed is not None and self._followed.is_healthy

    @property
    def engine(self) -> Frontend:
        """What answers requests, once it is reached."""
        assert self._followed is not None, "a frontend that was reached"
        return self._followed.frontend

    @property
    def metrics(self) -> Metrics:
        """What it has counted, once it is reached."""
        assert self._followed is not None and self._followed.metrics is not None, "a frontend that was reached"
        return self._followed.metrics

    def reach(self, timeout_s: float | None) -> None:
        """Returns when it is known what to serve, and hosts have had a moment to be reached.

        Raises DeadlineExceeded, Cancelled when it is closed meanwhile, and what `Followed.open` raises.
        """
        with self._lock:
            if self._opening is None:
                if self._is_closed:
                    raise self.why_over()
                self._driven.start()
                _LIVE.add(self)
                self._opening = asyncio.run_coroutine_threadsafe(self._open(), self._driven.loop)
        try:
            self._opening.result(timeout_s)
        except CancelledError:
            raise self.why_over() from None
        except TimeoutError:
            if self._followed is not None and self._followed.failure is not None:
                raise unreached(self._followed.failure) from None
            raise DeadlineExceeded(f"the controller did not say within {timeout_s:g} s what to serve") from None

    def run(self, layer: int, request: LayerRequest) -> ForwardOutput:
        """One validated request of at least one token. Raises what `Frontend.forward` raises, and Cancelled once it is closed."""
        call = _Call(self, layer, request)
        self._running.add(call)
        try:
            self._driven.wait(call.begin, may_drive=_is_plain())
            return call.result()
        except RuntimeError:
            if not self._is_closed:
                raise
            raise self.why_over() from None
        except KeyboardInterrupt:
            self._driven.loop.call_soon_threadsafe(call.give_up)
            raise
        finally:
            self._running.discard(call)

    def close(self) -> None:
        """Running calls raise Cancelled; it leaves the controller, and has left when this returns. Idempotent."""
        if (closing := self.close_soon()) is not None:
            with suppress(TimeoutError):
                closing.result(AWAY_S)

    def close_soon(self) -> Future[None] | None:
        """As `close`, without waiting, for any thread in any state; None = there is nothing to close."""
        if self.is_of_a_parent:
            return None
        with self._lock:
            if self._is_closed:
                return None
            self._is_closed = True
            if self._opening is None:
                self._driven.never_start()
                return None
        return asyncio.run_coroutine_threadsafe(self._close(), self._driven.loop)

    async def _open(self) -> None:
        self._followed = Followed(SERVER, self._orders, Report(self._name, node=self._node), self)
        # Calls that wait for hosts of a deployment that is gone are made again by the next frontend.
        self._followed.broken.add_done_callback(lambda _: self._give_up_all())
        await self._followed.open(self._patience_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(HOSTS_S):
                await self._followed.ready()

    def _give_up_all(self) -> None:
        for call in tuple(self._running):
            call.give_up()

    async def _close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()  # whoever waits for it does not hear from the controller any more
        self._give_up_all()
        try:
            if self._followed is not None:
                self._followed.decline()
                await self._followed.close()
        finally:
            self._driven.loop.call_soon(self._driven.stop)  # not before it is known that this has ended

    def enter(self, frontend: Frontend, _metrics: Metrics, _otlp_endpoint: str | None) -> None:
        """As `Stage.enter`. Its calls are spans of nobody: the program can measure them itself."""
        self.catalog = Catalog(frontend.model, frontend.layers)

    def health_changed(self, _layer: int, _healthy: bool) -> None:
        """As `Stage.health_changed`."""


class _Call:
    """One request of one thread, from when it reaches the loop until it is answered or has failed."""

    def __init__(self, frontend: EmbeddedFrontend, layer: int, request: LayerRequest) -> None:
        self._frontend, self._layer, self._request = frontend, layer, request
        self._answer: asyncio.Future[ForwardOutput] | None = None
        self._refusal: Exception | None = None

    def begin(self, waiter: Waiter) -> None:
        """On the loop; `waiter` waits for the answer."""
        try:
            if self._frontend.is_over:
                raise self._frontend.why_over()
            self._answer = self._frontend.engine.submit(self._layer, self._request)
        except Exception as error:  # whoever waits gets it
            self._refusal = error.with_traceback(None)
            waiter.done()
        else:
            self._answer.add_done_callback(waiter.done)

    def give_up(self) -> None:
        """On the loop: nobody waits any longer."""
        if self._answer is not None:
            self._answer.cancel()

    def result(self) -> ForwardOutput:
        """The answer, or its error raised."""
        if self._refusal is not None:
            raise self._refusal
        assert self._answer is not None, "a call that has begun"
        try:
            return self._answer.result()
        except asyncio.CancelledError:
            raise self._frontend.why_over() from None


def _is_plain() -> bool:
    """Whether this thread can run an event loop, and computes tensors as any other does: then the frontend's may be, too."""
    if asyncio._get_running_loop() is not None:
        return False
    return surroundings.are_plain()


@atexit.register
def _close_all() -> None:
    for frontend in tuple(_LIVE):
        frontend.close()
