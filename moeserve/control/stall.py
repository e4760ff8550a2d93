"""Work that may hang, as on a file system that does not answer: it is given up when it makes no progress."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from moeserve.control.timing import STALL_LOOK_S
from moeserve.errors import ConfigError

T = TypeVar("T")

#: why planning a change took too long, as a rule
UNREADABLE: Final = "files that are served could not be read"


async def unless_stalled(work: Coroutine[Any, Any, T], progress: Callable[[], object], timeout_s: float, why: Callable[[], str]) -> T:
    """What `work` returns. Raises what it raises, and ConfigError saying `why` once `progress` has been the same for `timeout_s`."""
    working = asyncio.ensure_future(work)
    seen, since = progress(), time.monotonic()
    try:
        while not (await asyncio.wait({working}, timeout=min(STALL_LOOK_S, timeout_s)))[0]:
            now, is_at = time.monotonic(), progress()
            if is_at != seen:
                seen, since = is_at, now
            elif now - since > timeout_s:
                raise ConfigError(f"{why()} within {timeout_s:g} s (placement.load_timeout_s): the change is withdrawn")
        return working.result()
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
