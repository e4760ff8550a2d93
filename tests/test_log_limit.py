"""Lines that strangers cause: each kind once in a while, and how many there were."""

from __future__ import annotations

import logging

import pytest

from moeserve.log_limit import LogLimit, limited_logger


def test_the_first_of_a_kind_is_written_in_full(caplog: pytest.LogCaptureFixture) -> None:
    logger = limited_logger("tests.first")
    for name in ("a", "b"):
        for _ in range(100):
            logger.warning("hung up on %s", name)
    logger.warning("refused %s", "a")
    assert [record.getMessage() for record in caplog.records] == ["hung up on a", "refused a"]


def test_the_next_one_says_how_many_there_were(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("tests.next")
    logger.addFilter(LogLimit(period_s=0.2))
    written = 0
    while len(caplog.records) < 2:
        logger.warning("hung up on %s", "100 %")
        written += 1
    assert caplog.records[0].getMessage() == "hung up on 100 %"
    assert caplog.records[1].getMessage().startswith(f"hung up on 100 % ({written - 2} more like it in the last ")


def test_a_logger_is_limited_once(caplog: pytest.LogCaptureFixture) -> None:
    assert limited_logger("tests.once") is limited_logger("tests.once")
    limited_logger("tests.once").warning("only")
    assert [record.getMessage() for record in caplog.records] == ["only"]
