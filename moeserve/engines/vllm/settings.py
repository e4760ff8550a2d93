"""Which service, and how to reach it: from `--additional-config`, or else from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from moeserve.client.arguments import parse_seconds, parse_token
from moeserve.client.connection import TLS
from moeserve.errors import ConfigError
from moeserve.files import read_secret

#: the key in vLLM's additional configuration
_KEY: Final = "moeserve"
#: of `embedded`
IF_POSSIBLE: Final = "auto"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`--additional-config '{"moeserve": {"target": "HOST:PORT"}}'`; or MOESERVE_TARGET, MOESERVE_TOKEN_FILE and MOESERVE_TLS_CA.

    target      the service
    model       the name of its model
    token_file  holds the bearer token
    tls_ca      verifies the service, and turns on TLS; tls_cert and tls_key are vLLM's own, for mutual TLS
    timeout_s   how long the answer of one layer may take, with all attempts
    embedded    whether a frontend in vLLM's process calls the hosts: "auto" = where the target is a controller of the same user on this
                machine. True elsewhere: token_file is that of the controller's frontend token
    """

    target: str
    model: str | None = None
    token_file: str | None = None
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    timeout_s: float = 600.0
    embedded: bool | str = IF_POSSIBLE

    @property
    def token(self) -> str | None:
        """What the token file holds now. Raises ConfigError."""
        if self.token_file is None:
            return None
        try:
            return parse_token(read_secret(Path(self.token_file)), f"token file {self.token_file}")
        except OSError as error:
            raise ConfigError(f"token file {self.token_file} cannot be read: {error.strerror}") from None

    @property
    def tls(self) -> TLS | None:
        """None = in the clear."""
        files = self.tls_ca, self.tls_cert, self.tls_key
        return TLS(*files) if any(each is not None for each in files) else None


_NAMES: Final = tuple(field.name for field in fields(Settings))
_IN_ENVIRONMENT: Final = ("target", "token_file", "tls_ca")


def settings_of(additional_config: Any) -> Settings | None:
    """None = vLLM computes its experts itself. Raises ConfigError for a key or a value that is not known, or without a target."""
    stated = additional_config.get(_KEY) if isinstance(additional_config, Mapping) else None
    if stated is not None and not isinstance(stated, Mapping):
        raise ConfigError(f'additional_config["{_KEY}"] is {stated!r}; allowed: a table such as {{"target": "HOST:PORT"}}')
    unknown = [name for name in stated or {} if name not in _NAMES]
    if unknown:
        raise ConfigError(f'additional_config["{_KEY}"]: {unknown[0]!r} is not a key; allowed: {", ".join(_NAMES)}')
    values = {name: value for name in _IN_ENVIRONMENT if (value := os.environ.get(f"MOESERVE_{name.upper()}"))}
    if stated is None and "target" not in values:
        return None
    values |= stated or {}
    if "target" not in values:
        raise ConfigError(f'additional_config["{_KEY}"] has no target, and MOESERVE_TARGET is not set; allowed: HOST:PORT of the service')
    return Settings(**{name: _read(name, value) for name, value in values.items()})


def _read(name: str, value: Any) -> Any:
    if name == "timeout_s":
        try:
            return parse_seconds(float(value), name) or Settings.timeout_s
        except (TypeError, ValueError):
            raise ConfigError(f"moeserve.{name} is {value!r}; allowed: seconds, more than 0") from None
    if name == "embedded":
        if not isinstance(value, bool) and value != IF_POSSIBLE:
            raise ConfigError(f'moeserve.{name} is {value!r}; allowed: true, false, "{IF_POSSIBLE}"')
        return value
    if not isinstance(value, str):
        raise ConfigError(f"moeserve.{name} is {value!r}; allowed: text")
    return value
