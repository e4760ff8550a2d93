"""Where a frontend gets its orders from: a stream of reports to the controller, and of orders back."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from moeserve.addresses import Target
from moeserve.control.follow import Order, Report


class OrderStream(Protocol):
    """Reports out, orders in, until it breaks."""

    async def write(self, report: Report) -> None:
        """What the frontend says of itself now; when the stream has ended, `read` says so."""
        ...

    async def read(self) -> Order:
        """The next order, once there is one. Raises the MoEServeError that ended the stream."""
        ...


class Orders(Protocol):
    """A controller, as a frontend sees it."""

    @property
    def controller(self) -> Target | None:
        """Where it is; None = in this process."""
        ...

    def follow(self) -> AbstractAsyncContextManager[OrderStream]:
        """One attempt."""
        ...
