"""What clients made of other people's code are, and how one in Node is run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

EXAMPLE = REPOSITORY / "examples" / "node"

#: gRPC's own bound on what a client takes, unless told otherwise
STOCK_LIMIT_BYTES = 4 * 2**20

#: script and arguments -> the lines it prints
Node = Callable[..., Awaitable[list[str]]]
