"""What gRPC itself writes to the log."""

from __future__ import annotations

import logging
from typing import Final

import grpc

_LOGGER: Final = "grpc._cython.cygrpc"


class _CallersThatLeft(logging.Filter):
    """A caller may leave, and a deadline pass, while its answer or error is being sent: for gRPC a traceback, for a service every day."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.exc_info is None or not isinstance(record.exc_info[1], grpc.aio.InternalError)


def leave_out_callers_that_left() -> None:
    """From now on, in this process."""
    logger = logging.getLogger(_LOGGER)
    if not any(isinstance(known, _CallersThatLeft) for known in logger.filters):
        logger.addFilter(_CallersThatLeft())
