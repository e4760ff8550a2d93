"""Files that are read at positions: what keeps them from being read is one sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moeserve.checkpoints.positioned_file import PositionedFile
from moeserve.errors import CheckpointError


def test_a_file_that_the_system_does_not_read(tmp_path: Path) -> None:
    """As one on a server that is gone; here it was opened to be written."""
    (tmp_path / "it").write_bytes(b"12345678")
    descriptor = os.open(tmp_path / "it", os.O_WRONLY)
    try:
        with pytest.raises(CheckpointError, match=r"/it cannot be read: Bad file descriptor$"):
            PositionedFile(tmp_path / "it").fill(descriptor, memoryview(bytearray(4)), 0)
    finally:
        os.close(descriptor)
