"""Tokens come from files: what stands on a command line can be read by everybody on the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moeserve.client.arguments import parse_token
from moeserve.errors import ConfigError
from moeserve.files import Rotating, read_secret


def read_token(path: Path) -> str:
    """The token in `path`. Raises ConfigError when it cannot be read, or holds none."""
    try:
        text = read_secret(path)
    except OSError as error:
        raise ConfigError(f"token file {path} cannot be read: {error.strerror}") from None
    token = parse_token(text, f"token file {path}")
    if not token:
        raise ConfigError(f"token file {path} is empty; it must hold one line of printable ASCII, the token")
    return token


def rotating_token(path: Path) -> Callable[[], str]:
    """Says the token that is in `path` by then. Raises ConfigError when it cannot be read now."""
    return Rotating((path,), lambda: read_token(path)).current
