"""Many requests side by side, for `EmbeddedClient.forward_stream`."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from moeserve.api.output import ForwardOutput
from moeserve.api.wire import WireRequest, WireResponse, check_request
from moeserve.errors import DeadlineExceeded, MoEServeError

#: as of one stream over gRPC; further requests are not taken before answers are
_SIDE_BY_SIDE: Final = 64


class AnswerStream:
    """Answers as they come, errors among them; what `requests` raises is raised after the answers to what came before.

    So is InvalidRequest for one that no service accepts. `requests` is consumed in another thread, so that it may wait for answers itself.
    After `timeout_s` (None = no limit) the stream ends with DeadlineExceeded, whatever `requests` waits for.
    """

    def __init__(
        self, forward: Callable[[WireRequest, float | None], ForwardOutput], requests: Iterable[WireRequest], timeout_s: float | None
    ) -> None:
        self._forward, self._requests, self._timeout_s = forward, requests, timeout_s
        self._deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        self._answers: queue.SimpleQueue[WireResponse | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(_SIDE_BY_SIDE)
        self._is_over = False
        self._failure: BaseException | None = None

    def __iter__(self) -> Iterator[WireResponse]:
        reader = threading.Thread(target=self._read, name="moeserve-stream", daemon=True)
        reader.start()
        try:
            while (answer := self._next()) is not None:
                self._room.release()
                yield answer
        finally:
            self._is_over = True
            self._room.release()
        if self._failure is not None:
            raise self._failure

    def _left_s(self) -> float | None:
        return None if self._timeout_s is None else max(0.0, self._deadline - time.monotonic())

    def _next(self) -> WireResponse | None:
        try:
            return self._answers.get(timeout=self._left_s())
        except queue.Empty:
            raise self._too_late() from None

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"the stream did not end within {self._timeout_s:g} s")

    def _read(self) -> None:
        with ThreadPoolExecutor(_SIDE_BY_SIDE, "moeserve-stream") as pool:
            try:
                for request in self._requests:
                    check_request(request)
                    self._room.acquire()
                    if self._is_over:
                        break
                    if self._left_s() == 0:
                        raise self._too_late()
                    pool.submit(self._answer, request)
            except BaseException as error:  # whoever reads the answers gets it
                self._failure = error
        self._answers.put(None)

    def _answer(self, request: WireRequest) -> None:
        result: ForwardOutput | MoEServeError
        try:
            result = self._forward(request, self._left_s())
        except MoEServeError as error:
            result = error.with_traceback(None)
        except BaseException as error:
            self._failure = error
            self._answers.put(None)
            return
        self._answers.put(WireResponse(request.request_id, result))
