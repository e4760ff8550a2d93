"""Lines that strangers cause: each kind once in a while, and how many there were."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from moeserve import log_limit
from moeserve.log_limit import LogLimit, limited_logger


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Of these tests: what others have left in the process may log, too."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("tests.")]


def test_the_first_of_a_kind_is_written_in_full(caplog: pytest.LogCaptureFixture) -> None:
    logger = limited_logger("tests.first")
    for name in ("a", "b"):
        for _ in range(100):
            logger.warning("hung up on %s", name)
    logger.warning("refused %s", "a")
    assert lines(caplog) == ["hung up on a", "refused a"]


def test_the_next_one_says_how_many_there_were(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("tests.next")
    logger.addFilter(LogLimit(period_s=7))
    for second in (0.0, 1.0, 6.9, 7.0, 8.0, 14.0, 21.0):
        monkeypatch.setattr(log_limit, "time", SimpleNamespace(monotonic=lambda now=second: now))
        logger.warning("hung up on %s", "100 %")
    first = "hung up on 100 %"
    assert lines(caplog) == [first, f"{first} (2 more like it in the last 7 s)", f"{first} (1 more like it in the last 7 s)", first]


def test_a_logger_is_limited_once(caplog: pytest.LogCaptureFixture) -> None:
    assert limited_logger("tests.once") is limited_logger("tests.once")
    limited_logger("tests.once").warning("only")
    assert lines(caplog) == ["only"]
