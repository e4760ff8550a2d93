"""Tokens come from files: what stands on a command line can be read by everybody on the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moeserve.errors import ConfigError
from moeserve.files import Rotating, read_secret


def read_token(path: Path) -> str:
    """The token in `path`. Raises ConfigError when it cannot be read."""
    try:
        return read_secret(path).decode("utf-8").strip()
    except OSError as error:
        raise ConfigError(f"token file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"token file {path} is not text") from None


def rotating_token(path: Path) -> Callable[[], str]:
    """Says the token that is in `path` by then. Raises ConfigError when it cannot be read now."""
    return Rotating((path,), lambda: read_token(path)).current
