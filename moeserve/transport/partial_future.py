"""A host's answer, and the future of one that is to come.

R rows, H hidden size.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import torch

from moeserve.api.call_trace import PassTimes


class Partial:
    """A host's answer. tensor [R, H] float32: for every row sent, the weighted sum over its experts on the destinations; read only.

    Its memory is used again once no view of it is left. `times` are those of its pass, if the message was timed.
    """

    __slots__ = ("tensor", "times")

    def __init__(self, tensor: torch.Tensor, times: PassTimes | None) -> None:
        self.tensor = tensor
        self.times = times


class PartialFuture(asyncio.Future[Partial]):
    """An answer to come. Cancelling it, also by a timeout, tells the host; the memory stays lent until the host has answered."""

    def __init__(self, work_id: int, on_cancel: Callable[[int], None], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._work_id = work_id
        self._on_cancel = on_cancel
        self._when_answered: Callable[[], None] | None = None

    def when_answered(self, callback: Callable[[], None]) -> None:
        """`callback` is called in the turn of the event loop in which the answer or an error comes, not in the next; never if cancelled."""
        if self.done():
            self.get_loop().call_soon(callback)
        else:
            self._when_answered = callback

    def set_result(self, result: Partial) -> None:
        """The host has answered."""
        super().set_result(result)
        self._tell()

    def set_exception(self, exception: type[BaseException] | BaseException, /) -> None:
        """It will not answer, or has answered with an error."""
        super().set_exception(exception)
        self._tell()

    def _tell(self) -> None:
        callback, self._when_answered = self._when_answered, None  # it may refer to this future
        if callback is not None:
            callback()

    def cancel(self, msg: object = None) -> bool:
        """Also cancels the work on the host, once."""
        if not super().cancel(msg):
            return False
        self._when_answered = None
        self._on_cancel(self._work_id)
        return True
