"""The service of compose.yaml, and the container engine of this machine where there is one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import Any

import pytest

from tests.deploy.files import DEPLOY, read_yaml

COMPOSE: dict[str, Any] = read_yaml(DEPLOY / "compose.yaml")

SERVICE = COMPOSE["services"]["moeserve"]


def filled(text: str) -> str:
    """With the defaults of its variables."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.fixture(scope="module")
def image() -> str:
    if shutil.which("docker") is None:
        pytest.skip("no container engine: docker is not installed")
    if subprocess.run(["docker", "info"], capture_output=True, timeout=30, check=False).returncode:
        pytest.skip("no container engine: docker is installed, but no daemon answers")
    if not (name := os.environ.get("MOESERVE_TEST_IMAGE")):
        pytest.skip("no image to try: build deploy/Dockerfile and name the result in MOESERVE_TEST_IMAGE")
    return name


def docker(*arguments: str, given: str = "", code: int = 0) -> str:
    """stdout and stderr; the command ends with `code`."""
    done = subprocess.run(
        ["docker", *arguments], input=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stdout
    return done.stdout
