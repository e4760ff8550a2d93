"""Rate limit for log lines that untrusted clients can cause: the first of a kind in full, then a count of the others."""

from __future__ import annotations

import logging
import time
from threading import Lock
from typing import Final

PERIOD_S: Final = 60.0


class LogLimit(logging.Filter):
    """Lets one record of a kind through in `period_s`, in seconds; the next one says how many were left out since then.

    A kind is a logger and the text of a record before its arguments are put in, or the value of `extra={"kind": ...}`. The code names them:
    clients cannot create kinds.
    """

    def __init__(self, period_s: float = PERIOD_S) -> None:
        super().__init__()
        self._period_s = period_s
        self._lock = Lock()
        #: when the last of a kind was written, and how many were left out since then
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written; the first after a pause also says how many were left out."""
        kind, now = (record.name, str(getattr(record, "kind", record.msg))), time.monotonic()
        with self._lock:
            since, left_out = self._seen.get(kind, (-self._period_s, 0))
            if now - since < self._period_s:
                self._seen[kind] = since, left_out + 1
                return False
            self._seen[kind] = now, 0
        if left_out:
            record.msg, record.args = f"%s ({left_out} more like it in the last {now - since:.0f} s)", (record.getMessage(),)
        return True

    def forget(self) -> None:
        """Forgets all earlier lines."""
        with self._lock:
            self._seen.clear()


#: the limit of every `limited_logger`
LIMIT: Final = LogLimit()


def limited_logger(name: str) -> logging.Logger:
    """The logger `name`.strangers, of whose lines each kind is written once a minute at most."""
    logger = logging.getLogger(f"{name}.strangers")
    logger.addFilter(LIMIT)
    return logger
