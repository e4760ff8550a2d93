"""`moeserve scale` and `moeserve drain`: more hosts, fewer, or others."""

from __future__ import annotations

from typing import Annotated

import typer

from moeserve.cli.target import AdminTokenFile, Target, TlsCa, admin_of
from moeserve.client.admin import Placed


def scale(
    target: Target,
    hosts: Annotated[int, typer.Option(min=1, help="How many expert hosts there shall be.")],
    admin_token_file: AdminTokenFile,
    tls_ca: TlsCa = None,
) -> None:
    """Spread the experts of a running service over another number of hosts; no request fails meanwhile."""
    with admin_of(target, admin_token_file, tls_ca) as client:
        _show(client.scale(hosts))


def drain(
    target: Target,
    host: Annotated[str, typer.Argument(help="Name of the host, as moeserve top shows it.")],
    admin_token_file: AdminTokenFile,
    tls_ca: TlsCa = None,
) -> None:
    """Place the experts of one host on the others and let it go; no request fails meanwhile."""
    with admin_of(target, admin_token_file, tls_ca) as client:
        _show(client.drain(host))


def _show(placed: Placed) -> None:
    typer.echo(f"epoch {placed.epoch}: the experts stand on {', '.join(placed.hosts)}")
