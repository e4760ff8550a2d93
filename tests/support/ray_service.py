"""A service on a real Ray as it shows itself: processes, metrics."""

from __future__ import annotations

import os
import subprocess
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from moeserve import BackgroundService
from tests.support.waiting import until

#: of the service that the tests of tests/cluster share
NUM_HOSTS = 4


def processes() -> dict[str, list[int]]:
    """Names of the processes that Ray named, with their ids: those that this process has started, by however many others."""
    shown = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout.splitlines()[1:]
    rows = {int(pid): (int(parent), name) for pid, parent, name in (line.split(maxsplit=2) for line in shown)}

    def is_ours(pid: int) -> bool:
        return pid in rows and (rows[pid][0] == os.getpid() or is_ours(rows[pid][0]))

    found: dict[str, list[int]] = {}
    for pid, (_, name) in rows.items():
        if name.startswith("ray::") and is_ours(pid):
            found.setdefault(name.split(".")[0].split(" ")[0], []).append(pid)
    return found


def pid_of(service: BackgroundService, host: str) -> int:
    """Of the present incarnation, as soon as it is up: until then there is none to send a signal to."""
    return until(lambda: next(seen.pid for seen in service._service.controller.status().hosts if seen.name == host))


def metric(service: BackgroundService, name: str, **labels: str) -> float:
    with urllib.request.urlopen(f"http://{service.metrics_target}/metrics") as page:
        families = text_string_to_metric_families(page.read().decode())
    return sum(s.value for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items())
