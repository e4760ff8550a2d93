"""`moeserve scale`: spread the experts over more hosts, or fewer."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from moeserve.cli.streams import say
from moeserve.cli.target import AdminTokenFile, Target, TlsCa, admin_of, number_in


def scale(
    target: Target,
    hosts: Annotated[str, typer.Option(help="How many expert hosts there shall be: a number, or all that the nodes have room for.")],
    admin_token_file: AdminTokenFile,
    tls_ca: TlsCa = None,
) -> None:
    """Spread the experts of a running service over another number of hosts; no request fails meanwhile."""
    with admin_of(target, admin_token_file, tls_ca) as client:
        say(str(client.scale(_number_or_all(hosts))))


def _number_or_all(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    number = number_in(text)
    if not number:
        raise typer.BadParameter(f"{text!r} is neither a number of at least 1 nor all", param_hint="--hosts")
    return number
