"""What a host does where its threads may have no priority of their own, looked at in a process that has no rights."""

from __future__ import annotations

import subprocess
import sys

import pytest

# As after `nice -n 10`, of which `renice` has taken back what the first thread has.
RENICED = """
import os, resource, threading
from moeserve.host import give_way
if os.getuid() == 0:
    os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NICE, (0, 0))
def run():
    own = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, own, 10)
    give_way()
    print(os.getpriority(os.PRIO_PROCESS, own))
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_a_thread_that_is_nicer_already_stays_so() -> None:
    done = subprocess.run([sys.executable, "-c", RENICED], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["10"], done.stderr
