"""Target, token, TLS and timeout: the options of every verb that calls a service."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from moeserve.cli.token import read_token
from moeserve.client import TLS, AdminClient
from moeserve.client.arguments import parse_seconds

Target = Annotated[str, typer.Argument(help="host:port of the service.")]
TokenFile = Annotated[Path | None, typer.Option(envvar="MOESERVE_TOKEN_FILE", help="File holding the bearer token.")]
AdminTokenFile = Annotated[Path, typer.Option(envvar="MOESERVE_ADMIN_TOKEN_FILE", help="File holding the admin token.")]
TlsCa = Annotated[Path | None, typer.Option(envvar="MOESERVE_TLS_CA", help="Certificate authority of the service; turns on TLS.")]


def token_of(path: Path | None) -> str | None:
    """Raises ConfigError when the file cannot be read."""
    return None if path is None else read_token(path)


def timeout_of(seconds: float) -> float | None:
    """The timeout of a client; None = no limit. Raises ConfigError when it is not a time to wait."""
    return parse_seconds(seconds, "--timeout", no_limit="inf")


def tls_of(ca: Path | None) -> TLS | None:
    """The TLS of a client; None = plain text."""
    return TLS(ca=ca) if ca else None


def admin_of(target: str, token_file: Path, ca: Path | None) -> AdminClient:
    """A connection to the service's AdminService. Raises ConfigError when a file cannot be read."""
    return AdminClient(target, read_token(token_file), tls=tls_of(ca))


def layer_of(text: str) -> int | str:
    """A position among the served layers, or a name."""
    number = number_in(text)
    return text if number is None else number


def number_in(text: str) -> int | None:
    """The number that `text` consists of, in plain digits; None = something else."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None
