"""Tokens come from files: what stands on a command line can be read by everybody on the machine."""

from __future__ import annotations

from pathlib import Path

from moeserve.errors import ConfigError


def read_token(path: Path) -> str:
    """The token in `path`. Raises ConfigError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"token file {path} cannot be read: {error.strerror}") from None
