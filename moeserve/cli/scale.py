"""`moeserve scale`: change the number of hosts, or of copies."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from moeserve.cli.streams import say
from moeserve.cli.target import AdminTokenFile, Target, TlsCa, admin_of, layer_of, number_in


def scale(
    target: Target,
    admin_token_file: AdminTokenFile,
    hosts: Annotated[str | None, typer.Option(help="Number of expert hosts, or all = as many as fit on the nodes.")] = None,
    copies: Annotated[int | None, typer.Option(min=1, help="Number of copies of each expert, instead of placement.copies.")] = None,
    layer: Annotated[str, typer.Option(help="With --copies: only of this layer: its position (0 = the first MoE layer) or name.")] = "",
    expert: Annotated[int | None, typer.Option(min=0, help="With --copies and --layer: only of this expert.")] = None,
    tls_ca: TlsCa = None,
) -> None:
    """Change the number of hosts of a running service, or the number of copies of its experts. No request fails meanwhile."""
    if (hosts is None) == (copies is None):
        raise typer.BadParameter("give --hosts or --copies, one of them")
    if copies is None and (layer or expert is not None):
        raise typer.BadParameter("--layer and --expert say whose --copies are meant")
    with admin_of(target, admin_token_file, tls_ca) as client:
        if hosts is not None:
            done = client.scale(_number_or_all(hosts))
        else:
            assert copies is not None
            done = client.scale_copies(copies, layer_of(layer), expert)
        say(str(done))


def _number_or_all(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    number = number_in(text)
    if not number:
        raise typer.BadParameter(f"{text!r}; allowed: a number of at least 1, or all", param_hint="--hosts")
    return number
