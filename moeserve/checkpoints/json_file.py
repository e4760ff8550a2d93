"""JSON beside weights: config.json, an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moeserve.checkpoints.tensor_file import reject_pointer
from moeserve.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming the file."""
    try:
        reject_pointer(path)
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return data
