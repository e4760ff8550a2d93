"""The allocator setting is for a whole process, so it is looked at in one of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from moeserve import allocator

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


# Every thread makes messages and frees them; what it still needs lies between them.
BURST = r"""
import re, runpy, sys, threading, time
allocator = runpy.run_path(sys.argv[1])
allocator["keep_large_blocks"]()
asked = threading.Event()
allocator["give_back_when_quiet"](asked.set)
def anonymous_mb():
    return int(re.search(r"RssAnon:\s+(\d+)", open("/proc/self/status").read())[1]) // 1024
def work(needed):
    messages = []
    for size in range(1000):
        messages.append(bytes(2**16 + size))
        needed.append(bytes(600))
needed, before = [], anonymous_mb()
threads = [threading.Thread(target=work, args=(needed,)) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
after = anonymous_mb()
asked.clear()
asked.wait(60)
end = time.monotonic() + 10
while anonymous_mb() > before + 60 and time.monotonic() < end:
    time.sleep(0.05)
print(after - before, anonymous_mb() - before)
"""

on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")


@on_glibc
def test_what_was_freed_is_given_back_when_the_process_is_quiet() -> None:
    command = [sys.executable, "-c", BURST, allocator.__file__]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=150).stdout
    at_the_end, when_quiet = map(int, said.split())
    assert when_quiet < 60 < at_the_end


@on_glibc
def test_large_blocks_are_kept_instead_of_faulted_in_again() -> None:
    assert faults("keep") < 100 < faults("default")


def test_another_libc_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with caplog.at_level("INFO", "moeserve"):
        assert not allocator.keep_large_blocks()
    assert "not glibc" in caplog.text
