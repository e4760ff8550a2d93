"""What a verb that serves tells whoever started it, and hears from there."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable


def on_signals(act: Callable[[], None] | None) -> None:
    """On Ctrl-C and SIGTERM; None = as Python does it."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        if act is None:
            loop.remove_signal_handler(number)
        else:
            loop.add_signal_handler(number, act)


def tell(line: str) -> None:
    """One line, at once."""
    print(line, file=sys.stderr, flush=True)
