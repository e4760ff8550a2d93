"""The audit log: what changed, why, what that moved, how it ended; read at once or followed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from moeserve import ConfigError, MoEServeError, UnknownLayer
from moeserve.cli.app import main
from moeserve.client import AdminClient
from moeserve.observe.audit import AuditEvent
from tests.support.harness import ServiceHarness
from tests.support.seeded_folders import LAYER, configuration, folder
from tests.support.waiting import until

ADMIN = "of the administrator"
COMMAND = [sys.executable, "-c", "from moeserve.cli.app import entry; entry()", "events"]


@contextmanager
def served(tmp_path: Path) -> Iterator[tuple[ServiceHarness, AdminClient]]:
    (tmp_path / "admin").touch(mode=0o600)
    (tmp_path / "admin").write_text(ADMIN)
    config = {**configuration(folder(tmp_path / "old", 0)), "server": {"port": 0, "admin_token_file": tmp_path / "admin"}}
    with ServiceHarness(config, "local", tmp_path) as service, AdminClient(service.target, ADMIN) as admin:
        yield service, admin


def told(event: AuditEvent) -> tuple[str, str, str, str, int]:
    return event.kind, event.what, event.why, event.outcome, event.epoch


def test_what_administrators_changed_and_what_could_not_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = folder(tmp_path / "new", 1)
    with served(tmp_path) as (service, admin):
        admin.scale(4)
        admin.swap(LAYER, new, [1, 3])
        admin.scale_copies(2, LAYER, 1)
        admin.drain("host-1")
        with pytest.raises(ConfigError):
            admin.scale(4000)
        with pytest.raises(ConfigError):
            admin.scale_copies(9, LAYER)
        with pytest.raises(UnknownLayer):
            admin.swap("\x1b[31m\n", new)
        events = list(admin.events())
        assert [event.number for event in events] == list(range(1, 9))
        assert [told(event) for event in events] == [
            ("start", "2 hosts", "the service starts", "done", 1),
            ("scale", "to 4 hosts", "administrator", "done", 2),
            ("swap", f"experts 1, 3 of layer {LAYER} from {new}", "administrator", "done", 3),
            ("copies", f"2 of expert 1 of layer {LAYER}", "administrator", "done", 4),
            ("drain", "host-1", "administrator", "done", 5),
            ("scale", "to 4000 hosts", "administrator", "failed", 5),
            ("copies", f"9 of every expert of layer {LAYER}", "administrator", "failed", 5),
            ("swap", f"layer  [31m  from {new}", "administrator", "failed", 5),
        ]
        # four experts on two hosts, of equal size; then each host has one
        size = service.hosts[0].host.info.weights_bytes // service.hosts[0].host.info.experts_held
        moved = [(event.moves, event.new, event.moved_bytes) for event in events]
        assert moved[1:6] == [(2, 0, 2 * size), (0, 0, 2 * size), (0, 1, size), (moved[4][0], 0, moved[4][0] * size), (0, 0, 0)]
        assert 1 <= moved[4][0] <= 2
        assert "placement.num_hosts is 4000" in events[5].error and "copies is 9" in events[6].error and not events[4].error
        assert all(event.duration_s > 0 for event in events)
        assert all(before.time_unix_s <= after.time_unix_s for before, after in pairwise(events))
        shell = ["events", service.target, "--admin-token-file", str(tmp_path / "admin")]
        assert main([*shell, "--json"]) == 0
        assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [vars(event) for event in events]
        assert main(shell) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 8 and "\x1b" not in "".join(lines)
        assert "scale to 4 hosts (administrator): done in " in lines[1]
        assert ", epoch 2, 2 moved, " in lines[1] and lines[1].endswith(" read")
        assert lines[5].endswith(events[5].error)


def test_hosts_that_are_lost_and_why(tmp_path: Path) -> None:
    with served(tmp_path) as (service, admin):

        def of(kind: str) -> list[AuditEvent]:
            return [event for event in admin.events() if event.kind == kind]

        service.hosts[0].stop()
        until(lambda: 0 not in service.present)
        until(lambda: 0 in service.controller._restarts._down)
        service.hosts[0].start()
        (restart,) = until(lambda: of("restart"))
        assert (restart.what, restart.why) == ("host-0 on this-node", "host-0 was lost") and restart.moved_bytes > 0
        service.given_up.add(1)
        (replaced,) = until(lambda: of("hosts"))
        assert told(replaced)[1:] == ("out: host-1 on this-process; in: host-2 on this-process", "host-1 was given up", "done", 2)
        assert replaced.moves == 2 and replaced.moved_bytes > 0


def test_followed_until_the_service_ends(tmp_path: Path) -> None:
    """By a program, and by a command that Ctrl-C ends."""
    with ThreadPoolExecutor(1) as pool:
        with served(tmp_path) as (service, admin):
            heard: list[AuditEvent] = []
            following = pool.submit(lambda: [heard.append(event) for event in AdminClient(service.target, ADMIN).events(follow=True)])
            until(lambda: heard)
            command = [*COMMAND, service.target, "--admin-token-file", str(tmp_path / "admin"), "--follow", "--json"]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
            assert process.stdout is not None and json.loads(process.stdout.readline())["kind"] == "start"
            admin.scale(3)
            assert json.loads(process.stdout.readline())["what"] == "to 3 hosts"
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=30) == ("", "") and process.returncode == 130
            with AdminClient(service.target, "caller") as stranger, pytest.raises(MoEServeError, match="admin token"):
                next(stranger.events())
        following.result(timeout=30)
    assert [event.kind for event in heard] == ["start", "scale"]


def test_a_controller_that_is_started_again_knows_what_was_changed(tmp_path: Path) -> None:
    with served(tmp_path) as (service, admin):
        service.call(service.open_control())
        admin.scale(3)
        with pytest.raises(ConfigError):
            admin.scale(4000)
        before = list(admin.events())
        service.call(service.close_control())
        service.call(service.reopen_control())
        with AdminClient(service.control_target, ADMIN) as successor:
            successor.scale(2)
            *known, started, scaled = successor.events()
        assert known == before and [event.epoch for event in known] == [1, 2, 2]
        assert told(started) == ("start", "3 hosts", "the controller was started again", "done", 2)
        assert (started.number, scaled.number, scaled.epoch) == (4, 5, 3)
