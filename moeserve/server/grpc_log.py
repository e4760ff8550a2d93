"""A filter for gRPC's own log lines."""

from __future__ import annotations

import logging
from typing import Final

import grpc

_LOGGER: Final = "grpc._cython.cygrpc"


class _CallersThatLeft(logging.Filter):
    """gRPC logs a traceback when a caller leaves, or its deadline passes, while its answer is sent. For a service that is normal."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.exc_info is None or not isinstance(record.exc_info[1], grpc.aio.InternalError)


def leave_out_callers_that_left() -> None:
    """Installs the filter in this process."""
    logger = logging.getLogger(_LOGGER)
    if not any(isinstance(known, _CallersThatLeft) for known in logger.filters):
        logger.addFilter(_CallersThatLeft())
