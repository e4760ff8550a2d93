"""Private folders: who has left one behind, and who has not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from moeserve import ConfigError
from moeserve.cluster.folders import Hold, hold_new, remove_all_abandoned

HOLD = "import sys, pathlib; from moeserve.cluster.folders import Hold; h = Hold(pathlib.Path(sys.argv[1])); print(); sys.stdin.read()"


@pytest.fixture
def place() -> Iterator[Path]:
    """With a short path."""
    with TemporaryDirectory(dir="/tmp", prefix="m") as folder:
        yield Path(folder)


def test_the_folder_of_a_killed_process_is_removed_and_nothing_else(place: Path) -> None:
    precious = place / "precious"
    precious.mkdir(mode=0o700)
    (precious / ".moeserve").touch()
    (place / "moeserve-link").symlink_to(precious)
    (place / "moeserve-models").mkdir(mode=0o700)  # somebody's own, which only has such a name
    (place / "moeserve-file").touch()
    held = hold_new("socket", place)
    (held.path / "raylet").touch()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(place / "moeserve-other")], stdin=-1, stdout=-1) as other:
        assert other.stdout is not None
        other.stdout.readline()
        (place / "moeserve-other" / "link").symlink_to(precious)
        shared = Hold(place / "moeserve-other")
        before = sorted(place.iterdir())
        remove_all_abandoned(place)
        assert sorted(place.iterdir()) == before
        shared.let_go()
        assert sorted(place.iterdir()) == before  # as the other process holds it still
        other.kill()
    remove_all_abandoned(place)
    assert not (place / "moeserve-other").exists()
    assert (held.path / "raylet").exists() and (precious / ".moeserve").exists()
    assert (place / "moeserve-models").exists() and (place / "moeserve-link").is_symlink()
    held.let_go()
    held.let_go()
    assert not held.path.exists()


def test_a_place_may_be_relative(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "here").mkdir()
    monkeypatch.chdir(place)
    held = hold_new("socket", Path("here"))
    assert held.path.parent == place / "here"
    held.let_go()


def test_a_folder_that_others_may_look_into_is_refused(place: Path) -> None:
    (place / "moeserve-open").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="belongs to another user or is not private"):
        Hold(place / "moeserve-open")
    (place / "moeserve-link").symlink_to(place / "moeserve-open")
    with pytest.raises(ConfigError, match="belongs to another user or is not private"):
        Hold(place / "moeserve-link")


@pytest.mark.parametrize("name", ["x" * 60, "no-such-folder"])
def test_a_place_that_cannot_be_used_is_named(place: Path, name: str) -> None:
    (place / ("x" * 60)).mkdir()
    with pytest.raises(ConfigError, match=f"ray.temp_dir is '{place}/{name}'; allowed: "):
        hold_new("ray/session/sockets/raylet" + "y" * 20, place / name)


def test_a_long_tmpdir_has_a_way_out(place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Another place is used, which is said."""
    long = place / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    held = hold_new("y" * 40)
    assert held.path.parent == Path("/tmp")
    assert f"{long} is too long" in caplog.text
    held.let_go()
