"""The allocator setting is for a whole process, so it is looked at in one of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from moeserve.server import allocator

FAULTS = """
import resource, runpy, sys
allocator = runpy.run_path(sys.argv[1])
if sys.argv[2] == "keep":
    assert allocator["keep_large_blocks"]()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(2):
        b"x" * (40 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(mode: str) -> int:
    command = [sys.executable, "-c", FAULTS, allocator.__file__, mode]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_large_blocks_are_kept_instead_of_faulted_in_again() -> None:
    assert faults("keep") < 100 < faults("default")


def test_another_libc_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with caplog.at_level("INFO", "moeserve"):
        assert not allocator.keep_large_blocks()
    assert "not glibc" in caplog.text
