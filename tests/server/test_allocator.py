"""The allocator setting is for a whole process, so it is looked at in one of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from moeserve.server.allocator import LARGEST_KEPT_BLOCK_BYTES, keep_large_blocks
if sys.argv[1] == "keep":
    assert keep_large_blocks() and keep_large_blocks()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        b"x" * (LARGEST_KEPT_BLOCK_BYTES * 5 // 8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(mode: str) -> int:
    return int(subprocess.run([sys.executable, "-c", FAULTS, mode], check=True, capture_output=True, text=True, timeout=60).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_large_blocks_are_kept_instead_of_faulted_in_again() -> None:
    assert faults("keep") < 100 < faults("default")


def test_another_libc_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from moeserve.server.allocator import keep_large_blocks

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with caplog.at_level("INFO", "moeserve"):
        assert not keep_large_blocks()
    assert "not glibc" in caplog.text
