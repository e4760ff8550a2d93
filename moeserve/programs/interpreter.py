"""The start of a command that runs this package in another process."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def interpreter() -> list[str]:
    """Python, looking for modules where this process does.

    With -m or -c it would look into the working directory first, which `moeserve` does not: any random.py there would be run.
    """
    here = None
    with suppress(OSError):
        here = os.getcwd()
    looks_here = "" in sys.path or here in sys.path
    return [sys.executable] if looks_here else [sys.executable, "-P"]
