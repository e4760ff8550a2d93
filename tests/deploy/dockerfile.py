"""The recipe of the image, read."""

from __future__ import annotations

import re

from tests.deploy.files import DEPLOY


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())]


def given(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]
