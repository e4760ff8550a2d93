"""`moeserve drain`: move the experts of a host to the others, then remove it."""

from __future__ import annotations

from typing import Annotated

import typer

from moeserve.cli.streams import say
from moeserve.cli.target import AdminTokenFile, Target, TlsCa, admin_of


def drain(
    target: Target,
    host: Annotated[str, typer.Argument(help="Name of the host, as moeserve top shows it.")],
    admin_token_file: AdminTokenFile,
    tls_ca: TlsCa = None,
) -> None:
    """Move the experts of one host to the others, then remove it. No request fails meanwhile."""
    with admin_of(target, admin_token_file, tls_ca) as client:
        say(str(client.drain(host)))
