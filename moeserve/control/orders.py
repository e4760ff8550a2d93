"""The source of a frontend's orders: a stream of reports to the controller, and of orders back."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from moeserve.addresses import Target
from moeserve.control.follow import Order, Report


class OrderStream(Protocol):
    """Reports out, orders in, until it breaks."""

    async def write(self, report: Report) -> None:
        """Sends a report; if the stream has ended, `read` raises the error."""
        ...

    async def read(self) -> Order:
        """Waits for the next order. Raises the MoEServeError that ended the stream."""
        ...


class Orders(Protocol):
    """A controller, as a frontend sees it."""

    @property
    def controller(self) -> Target | None:
        """Its address; None = in this process."""
        ...

    def follow(self) -> AbstractAsyncContextManager[OrderStream]:
        """One attempt to follow."""
        ...
