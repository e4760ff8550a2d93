"""Generations in vLLM's environment, and the service that may compute their experts."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.harness import ServiceHarness
from tests.vllm.environment import PYTHON, environment

HERE = Path(__file__).parent
NEW = 24
PROMPTS = [[3 + (7 * start + 5 * place) % 120 for place in range(length)] for start, length in enumerate((3, 17, 40, 9))]
#: rows that pass a layer: the last token of a sequence is not computed
ROWS = sum(map(len, PROMPTS)) + len(PROMPTS) * (NEW - 1)


@dataclass(frozen=True)
class Generated:
    """What tests/vllm/engine.py prints of a job."""

    tokens: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    parameters: dict[str, int] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)
    error: str = ""


def job(model: Path, target: str | None = None, embedded: bool | str = "auto", **options: Any) -> dict[str, Any]:
    if target is not None:
        options["additional_config"] = {"moeserve": {"target": target, "embedded": embedded}}
    return {"model": str(model), "prompts": PROMPTS, "new": NEW, "options": options}


def generate(*jobs: dict[str, Any]) -> list[Generated]:
    """One process for all of them: importing vLLM takes longer than they do."""
    command = [PYTHON, HERE / "engine.py", json.dumps(jobs)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return [Generated(**json.loads(line.removeprefix("RESULT "))) for line in done.stdout.splitlines() if line.startswith("RESULT ")]


def served(model: Path, folder: Path, **tables: Any) -> ServiceHarness:
    config = {"model": {"checkpoint": model, "dtype": "float32"}, "placement": {"num_hosts": 2}, **tables}
    return ServiceHarness(config, "shm", folder)
