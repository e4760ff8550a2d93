"""What earlier tests have left behind."""

from __future__ import annotations

import gc

import pytest


def forget_lines(caplog: pytest.LogCaptureFixture) -> None:
    """Tasks and futures that were dropped with their loops say so when they are collected, which would be at any moment."""
    gc.collect()
    caplog.clear()
