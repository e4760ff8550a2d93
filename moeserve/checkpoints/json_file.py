"""JSON beside weights: config.json, an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from moeserve.checkpoints.tensor_file import reject_pointer
from moeserve.errors import CheckpointError
from moeserve.files import read_file

#: the index of the largest models has some ten megabytes, and nothing that is read is nested deeper than five times
_MAX_BYTES: Final = 256 * 2**20
_MAX_DEPTH: Final = 100


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming the file."""
    try:
        content = read_file(path, _MAX_BYTES)
        reject_pointer(path, content)
        data = json.loads(content.decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise _too_deep(path) from None
    except ValueError as error:
        # Of ValueErrors there is more than one kind: numbers may have too many digits.
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    _require_shallow(data, path)
    return data


def _require_shallow(data: dict[str, Any], path: Path) -> None:
    """What reads the values does so table by table, each in the one before."""
    level: list[Any] = [data]
    for _ in range(_MAX_DEPTH):
        inside = (value for table in level for value in (table.values() if isinstance(table, dict) else table))
        level = [value for value in inside if isinstance(value, dict | list)]
        if not level:
            return
    raise _too_deep(path)


def _too_deep(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} has tables and lists in each other more than {_MAX_DEPTH} deep")
