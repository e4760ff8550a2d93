"""Tokens come from files: what stands on a command line can be read by everybody on the machine."""

from __future__ import annotations

from pathlib import Path

from moeserve.client.arguments import parse_token
from moeserve.errors import ConfigError


def read_token(path: Path) -> str:
    """The token in `path`. Raises ConfigError when it cannot be read, or holds none."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"token file {path} cannot be read: {error.strerror}") from None
    token = parse_token(text, f"token file {path}")
    if not token:
        raise ConfigError(f"token file {path} is empty; it must hold one line of printable ASCII, the token")
    return token
