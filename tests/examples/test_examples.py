"""The examples run: in process and served, with equal answers."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from moeserve.compat import SYSTEMS
from tests.support.closeness import relative_bound

FOLDER = Path(__file__).parents[2] / "examples"
COMPAT = sorted(FOLDER.glob("compat_*.py"))


@pytest.mark.ray
@pytest.mark.parametrize("path", COMPAT, ids=lambda path: path.stem)
def test_example(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, local_ray: None) -> None:
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("\n") >= 2
    differences = [float(number) for number in re.findall(r"difference ([\d.e+-]+)", printed)]
    # Hidden sizes of 64, intermediate ones of 256, and a shared expert.
    assert all(number < relative_bound(2 * (64 + 64 + 256)) for number in differences)
    assert differences or "checkpoint" in path.stem


@pytest.mark.ray
def test_a_hugging_face_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, local_ray: None) -> None:
    monkeypatch.setattr(sys, "argv", ["hf_remote_experts.py"])
    runpy.run_path(str(FOLDER / "hf_remote_experts.py"), run_name="__main__")
    text, weights = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert text.startswith("The import statement") and len(text) > 40
    here, there, asked = map(float, re.findall(r"([\d.]+) (?:MiB|times)", weights))
    assert here < 2 < 5 < there
    assert asked > 40 * 4 * 2


def test_a_frontend_inside_a_program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["embedded.py"])
    runpy.run_path(str(FOLDER / "embedded.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.startswith("equal answers: True\n")
    assert len(re.findall(r"^(?:gRPC|embedded): [\d.]+ ms for one token$", printed, re.MULTILINE)) == 2


def test_rollouts_are_replayed_and_steps_swapped_in(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The example itself compares routing and answers, bit by bit."""
    monkeypatch.setattr(sys, "argv", ["rl.py"])
    runpy.run_path(str(FOLDER / "rl.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.findall(r"^step (\d): .* (\d) experts swapped in, revision (\d)$", printed, re.MULTILINE) == [
        (str(step), "8", str(step + 2)) for step in range(3)
    ]
    differences = [float(number) for number in re.findall(r"trainer and service: ([\d.e+-]+)$", printed, re.MULTILINE)]
    assert len(differences) == 3 and all(number < 1e-4 for number in differences)


@pytest.mark.ray
def test_an_expert_of_ones_own() -> None:
    """In a process of its own, as hosts look for modules where Ray was started."""
    run = subprocess.run([sys.executable, FOLDER / "custom_expert.py"], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    (difference,) = re.findall(r"difference ([\d.e+-]+)", run.stdout)
    assert float(difference) < relative_bound(2 * 64 + 8)


def test_there_is_one_per_system() -> None:
    assert {path.stem.split("_")[1] for path in COMPAT} == set(SYSTEMS)
