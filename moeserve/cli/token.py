"""Tokens come from files: every user of the machine can read a command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moeserve.client.arguments import parse_token
from moeserve.errors import ConfigError
from moeserve.files import Rotating, read_secret


def read_token(path: Path) -> str:
    """The token in `path`. Raises ConfigError when the file cannot be read, or holds no token."""
    try:
        text = read_secret(path)
    except OSError as error:
        raise ConfigError(f"token file {path} cannot be read: {error.strerror}") from None
    token = parse_token(text, f"token file {path}")
    if not token:
        raise ConfigError(f"token file {path} is empty; it must hold one line of printable ASCII, the token")
    return token


def rotating_token(path: Path) -> Callable[[], str]:
    """A function that returns the current token in `path`. Raises ConfigError when the file cannot be read now."""
    return Rotating((path,), lambda: read_token(path)).current
