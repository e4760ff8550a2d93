"""`moeserve scale`: change the number of hosts."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from moeserve.cli.streams import say
from moeserve.cli.target import AdminTokenFile, Target, TlsCa, admin_of, number_in


def scale(
    target: Target,
    hosts: Annotated[str, typer.Option(help="Number of expert hosts, or all = as many as fit on the nodes.")],
    admin_token_file: AdminTokenFile,
    tls_ca: TlsCa = None,
) -> None:
    """Change the number of hosts of a running service. No request fails meanwhile."""
    with admin_of(target, admin_token_file, tls_ca) as client:
        say(str(client.scale(_number_or_all(hosts))))


def _number_or_all(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    number = number_in(text)
    if not number:
        raise typer.BadParameter(f"{text!r}; allowed: a number of at least 1, or all", param_hint="--hosts")
    return number
