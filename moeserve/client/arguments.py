"""Tokens and timeouts as users write them: parsed, or refused with one sentence."""

from __future__ import annotations

from numbers import Real
from typing import Any, Final

from moeserve.errors import ConfigError, MoEServeError

#: longer than any wait; gRPC's clock ends beyond it
_FOREVER_S: Final = 1e9


def parse_seconds(value: Any, name: str, refusal: type[MoEServeError] = ConfigError, no_limit: str = "None") -> float | None:
    """None = no limit. Raises `refusal`, which says that `no_limit` is how to write that."""
    if value is None:
        return None
    if not isinstance(value, Real) or isinstance(value, bool) or not value > 0:  # type: ignore[operator]  # NaN is not, either
        raise refusal(f"{name} is {value!r}; allowed: seconds, more than 0, or {no_limit} for no limit")
    return None if value > _FOREVER_S else float(value)  # type: ignore[operator]


def parse_token(text: Any, name: str = "token") -> str:
    """White space around it is ignored; "" = no token. Raises ConfigError, which does not contain the token."""
    if text is None:
        return ""
    token = text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text
    if not isinstance(token, str):
        raise ConfigError(f"{name} is of type {type(text).__name__}; allowed: text, or None")
    token = token.removeprefix("\ufeff").strip()
    if not token.isascii() or not token.isprintable():
        raise ConfigError(f"{name} has characters that a token cannot have; allowed: one line of printable ASCII")
    return token
