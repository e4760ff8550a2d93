"""Shell completion, asked for as shells ask: through the environment, in a home of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

#: as a program, so that it has a name that can be completed
PROGRAM = f'#!/bin/sh\nexec {sys.executable} -m moeserve "$@"\n'
VERBS = {"bench", "config", "drain", "events", "plan", "scale", "serve", "status", "top"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "moeserve"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    return tmp_path


def run(home: Path, *command: str, **environment: str) -> str:
    path = f"{home / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HOME": str(home), "PATH": path, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("shell", "words"),
    [
        ("bash", lambda line: {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}),
        ("zsh", lambda line: {"_TYPER_COMPLETE_ARGS": line}),
        ("fish", lambda line: {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}),
    ],
)
def test_what_a_shell_is_offered(home: Path, shell: str, words: object) -> None:
    def offered(line: str) -> str:
        return run(home, "moeserve", _MOESERVE_COMPLETE=f"complete_{shell}", **words(line))  # type: ignore[operator]

    verbs = offered("moeserve ")
    assert all(verb in verbs for verb in VERBS)
    assert "status" in (some := offered("moeserve st")) and "serve" not in some
    assert "--admin-token-file" in offered("moeserve status --adm")
    assert "check" in offered("moeserve config c")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_asks_by_that_name(home: Path, shell: str) -> None:
    script = run(home, "moeserve", "--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert f"_MOESERVE_COMPLETE=complete_{shell}" in script


def test_bash_completes_after_it_was_installed(home: Path) -> None:
    """A real one: it finds out that it is one, and reads what was installed."""
    if shutil.which("bash") is None:
        pytest.skip("there is no bash on this machine")
    assert "completion installed in" in run(home, "bash", "-c", "moeserve --install-completion; true")
    asked = "source ~/.bashrc; COMP_WORDS=(moeserve st) COMP_CWORD=1; _moeserve_completion moeserve; echo ${COMPREPLY[@]}"
    assert run(home, "bash", "-c", asked).split() == ["status"]
