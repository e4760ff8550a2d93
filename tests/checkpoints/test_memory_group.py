"""What the kernel allows a container, or a service of a supervisor: read in both versions of control groups, and in a real one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from moeserve.checkpoints import MemoryGroup

MIB = 2**20

V2 = {"memory.max": "max", "memory.current": str(900 * MIB), "memory.stat": f"anon 1\ninactive_file {100 * MIB}\n"}
V1 = {
    "memory.limit_in_bytes": "9223372036854771712",
    "memory.usage_in_bytes": str(900 * MIB),
    "memory.stat": f"total_inactive_file {100 * MIB}\ninactive_file 1\n",
    "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
}


def described(tmp_path: Path, cgroup: str, mount: str, groups: dict[str, dict[str, str]]) -> MemoryGroup:
    """What a kernel would say whose memory groups are mounted at tmp_path/memory."""
    for path, files in groups.items():
        folder = tmp_path / "memory" / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    (tmp_path / "cgroup").write_text(cgroup)
    (tmp_path / "mountinfo").write_text(f"22 1 0:5 / /proc rw - proc proc rw\n31 22 0:29 {mount.replace('AT', str(tmp_path / 'memory'))}\n")
    return MemoryGroup(tmp_path)


def test_the_least_of_all_limits_above(tmp_path: Path) -> None:
    groups = {"": {}, "pods": V2 | {"memory.max": str(1000 * MIB)}, "pods/one": V2 | {"memory.events": "oom 2\noom_kill 5\n"}}
    group = described(tmp_path, "0::/pods/one\n", "/ AT rw - cgroup2 none rw", groups)
    assert (group.limit_bytes, group.free_bytes, group.oom_kills) == (1000 * MIB, 200 * MIB, 5)


def test_version_1_beside_an_empty_version_2(tmp_path: Path) -> None:
    groups = {"": V1, "a": V1 | {"memory.limit_in_bytes": str(850 * MIB)}}
    group = described(tmp_path, "4:cpu,memory:/a\n0::/elsewhere\n", "/ AT rw - cgroup none rw,cpu,memory", groups)
    assert (group.limit_bytes, group.free_bytes, group.oom_kills) == (850 * MIB, 50 * MIB, 3)


@pytest.mark.parametrize("mount", ["/ AT rw - cgroup2 none rw", "/docker/one AT rw - cgroup2 none rw"])
def test_a_container_that_is_told_the_name_it_has_outside(tmp_path: Path, mount: str) -> None:
    group = described(tmp_path, "0::/docker/one\n", mount, {"": V2 | {"memory.max": str(700 * MIB)}})
    assert (group.limit_bytes, group.free_bytes) == (700 * MIB, 0)


@pytest.mark.parametrize("groups", [{"": V2}, {"": {}}], ids=["no limit", "no memory controller"])
def test_without_a_limit(tmp_path: Path, groups: dict[str, dict[str, str]]) -> None:
    group = described(tmp_path, "0::/\n", "/ AT rw - cgroup2 none rw", groups)
    assert (group.limit_bytes, group.free_bytes, group.oom_kills) == (None, None, 0)


def test_where_there_are_no_groups(tmp_path: Path) -> None:
    assert MemoryGroup(tmp_path / "none").limit_bytes is None


@pytest.mark.parametrize("name", [b"Donn\xe9es", b"a\x0cb", "a\u2028b".encode()])
def test_beside_a_mount_of_any_name(name: bytes, tmp_path: Path) -> None:
    described(tmp_path, "0::/\n", "/ AT rw - cgroup2 none rw", {"": V2 | {"memory.max": str(700 * MIB)}})
    with (tmp_path / "mountinfo").open("ab") as file:
        file.write(b"32 22 0:30 / /media/" + name + b" rw - ext4 /dev/sdb1 rw\n")
    assert MemoryGroup(tmp_path).limit_bytes == 700 * MIB


@pytest.fixture
def limited() -> Iterator[Path]:
    """A real group with 512 MiB."""
    root = Path("/sys/fs/cgroup/memory")
    limit = "memory.limit_in_bytes" if root.is_dir() else "memory.max"
    folder = (root if root.is_dir() else Path("/sys/fs/cgroup")) / f"moeserve-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory control group can be made here: {error}")
    try:
        (folder / limit).write_text(str(512 * MIB))
        with suppress(OSError):
            (folder / "memory.swap.max").write_text("0")
        yield folder
    except OSError as error:
        pytest.skip(f"no limit can be set here: {error}")
    finally:
        with suppress(OSError):
            folder.rmdir()


def run_in(group: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
    return subprocess.run(["sh", "-c", enter, "sh", sys.executable, *argv], check=False, capture_output=True, text=True, timeout=120)


def test_a_plan_is_refused_that_does_not_fit_into_the_group(limited: Path, tmp_path: Path) -> None:
    layer = "[[layers]]\nhidden_size = 1024\nintermediate_size = 4096\nnum_experts = 16\n"
    (tmp_path / "large.toml").write_text(layer)
    told = run_in(limited, "-c", "from moeserve.cli.app import entry; entry()", "plan", str(tmp_path / "large.toml"))
    assert told.returncode == 2
    assert "1 host would hold 0.75 GiB of weights, but this machine has 0.50 GiB of memory, or its container has" in told.stderr


def test_processes_that_the_kernel_has_killed_are_counted(limited: Path) -> None:
    """One that wants more than there is; the parent counts before and after, and warns of what would not fit."""
    program = (
        "import subprocess, sys\n"
        "from moeserve.checkpoints import MemoryGroup, memory_warning\n"
        "group = MemoryGroup()\n"
        "before = group.oom_kills\n"
        "greedy = 'x = bytearray(800 * 2**20); x[::4096] = bytes(len(x) // 4096)'\n"
        "subprocess.run([sys.executable, '-c', greedy])\n"
        "print(group.limit_bytes, group.oom_kills - before, memory_warning([2**27]), '|', memory_warning([2**29]))\n"
    )
    said = run_in(limited, "-c", program).stdout
    assert said.startswith(f"{512 * MIB} 1 ")
    assert "1 host takes about 0.75 GiB of memory, 0.50 GiB of it for weights" in said and "they may be killed while they load" in said
