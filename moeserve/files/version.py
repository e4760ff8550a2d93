"""The version of moeserve."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path


def running_version() -> str:
    """The version of the code that runs: of its source tree, else of the installed distribution.

    The metadata of an editable installation is as old as the installation, and a tree on PYTHONPATH has none.
    """
    project = Path(__file__).parents[2] / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if table.get("name") == "moeserve":
            return str(table["version"])
    return metadata.version("moeserve")
