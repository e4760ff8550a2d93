"""Processes of this package find modules where the process that starts them does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import moeserve

START = """
import subprocess
from moeserve.programs.interpreter import interpreter
print(subprocess.run([*interpreter(), *{arguments}], capture_output=True, text=True).stdout)
"""


@pytest.mark.parametrize(("flags", "found"), [(["-P"], "of Python"), ([], "of the working directory")])
@pytest.mark.parametrize("arguments", [["-c", "import chunk_of_work"], ["-m", "chunk_of_work"]])
def test_the_working_directory_counts_as_in_the_process_before(tmp_path: Path, flags: list[str], found: str, arguments: list[str]) -> None:
    """`moeserve` does not look into it; `python -m` does."""
    installed, here = tmp_path / "installed", tmp_path / "here"
    for folder, text in ((installed, "of Python"), (here, "of the working directory")):
        folder.mkdir()
        (folder / "chunk_of_work.py").write_text(f"print({text!r})")
    path = os.pathsep.join([str(installed), str(Path(moeserve.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, *flags, "-c", START.format(arguments=arguments)],
        cwd=here,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == found


def test_a_working_directory_that_is_gone_is_not_looked_into(tmp_path: Path) -> None:
    program = (
        f"import os; os.rmdir({str(tmp_path / 'gone')!r}); from moeserve.programs.interpreter import interpreter; print(interpreter()[1:])"
    )
    (tmp_path / "gone").mkdir()
    env = {**os.environ, "PYTHONPATH": str(Path(moeserve.__file__).parents[1])}
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, cwd=tmp_path / "gone", env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "['-P']"
