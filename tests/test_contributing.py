"""What people who carry on the work are told: every command, file and version of Python is one that there is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
HOOKS = ROOT / ".pre-commit-config.yaml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def jobs() -> dict[str, Any]:
    return yaml.safe_load(WORKFLOW.read_text())["jobs"]


def steps() -> list[dict[str, Any]]:
    return [step for job in jobs().values() for step in job["steps"]]


def hooks() -> list[dict[str, Any]]:
    return [hook for repository in yaml.safe_load(HOOKS.read_text())["repos"] for hook in repository["hooks"]]


def code_of(page: str) -> list[str]:
    """Every command that the page shows, in a block or in a line."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    return [*"\n".join(blocks).splitlines(), *re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]


def targets_in(commands: list[str]) -> set[str]:
    parts = [part.split() for line in commands for part in re.split(r"&&|;|#", re.sub(r"\${{.*?}}", "", line))]
    return {word for name, *words in filter(None, parts) if name == "make" for word in words if "=" not in word}


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z0-9-]*):(?!=)", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/kernels.md", "benchmarks/RESULTS.md"])
def test_targets_that_documents_name_exist(page: str) -> None:
    named = targets_in(code_of(page))
    assert named and named <= targets()


def test_a_commit_is_linted_as_by_hand() -> None:
    assert [hook["entry"] for hook in hooks()] == ["make lint"]
    assert targets_in([hook["entry"] for hook in hooks()]) <= targets()


def test_a_forge_runs_what_a_person_runs() -> None:
    commands = [step["run"] for step in steps() if "run" in step]
    assert all(command.startswith(("make ", ".ci/")) for command in commands)
    assert targets_in(commands) == {"check"} <= targets()
    assert all((ROOT / command).exists() for command in commands if command.startswith(".ci/"))
    assert {step["uses"].split("@")[0] for step in steps() if "uses" in step} == {"actions/checkout", "actions/setup-python"}


def test_it_runs_every_python_that_the_package_claims() -> None:
    claimed = {name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)}
    tried = jobs()["check"]["strategy"]["matrix"]["python"]
    assert set(tried) == claimed
    assert PROJECT["requires-python"] == f">={tried[0]}"


def test_the_version_is_told_in_the_changelog() -> None:
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == PROJECT["version"]
    assert re.match(r"# Changelog\n.*?^## \[Unreleased\]$", (ROOT / "CHANGELOG.md").read_text(), re.M | re.S)


def test_the_fast_tests_are_some_of_every_room() -> None:
    (fast,) = re.findall(r"^FAST := (.*?)\n\n", (ROOT / "Makefile").read_text(), re.MULTILINE | re.DOTALL)
    paths = re.findall(r"[a-z0-9_]+(?:/test_\w+\.py)?", fast.partition("tests/,")[2])
    assert not [path for path in paths if not (ROOT / "tests" / path).exists()]
    rooms = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name[0] not in "._"}
    no_rooms = {"support", "deploy", "examples", "packaging", "stock_clients", "vllm"}
    assert rooms - no_rooms == {path.partition("/")[0] for path in paths}
