"""`moeserve scale` and `moeserve drain`: more hosts, fewer, or others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeserve.cli.token import read_token
from moeserve.client import TLS, AdminClient
from moeserve.client.admin import Placed

Target = Annotated[str, typer.Argument(help="host:port of the service.")]
AdminToken = Annotated[Path, typer.Option(envvar="MOESERVE_ADMIN_TOKEN_FILE", help="File holding the admin token.")]
Authority = Annotated[Path | None, typer.Option(envvar="MOESERVE_TLS_CA", help="Certificate authority of the service; turns TLS on.")]


def scale(
    target: Target,
    hosts: Annotated[int, typer.Option(min=1, help="How many expert hosts there shall be.")],
    admin_token_file: AdminToken,
    tls_ca: Authority = None,
) -> None:
    """Spread the experts of a running service over another number of hosts; no request fails meanwhile."""
    with AdminClient(target, read_token(admin_token_file), tls=TLS(ca=tls_ca) if tls_ca else None) as client:
        _show(client.scale(hosts))


def drain(
    target: Target,
    host: Annotated[str, typer.Argument(help="Name of the host, as moeserve top shows it.")],
    admin_token_file: AdminToken,
    tls_ca: Authority = None,
) -> None:
    """Place the experts of one host on the others and let it go; no request fails meanwhile."""
    with AdminClient(target, read_token(admin_token_file), tls=TLS(ca=tls_ca) if tls_ca else None) as client:
        _show(client.drain(host))


def _show(placed: Placed) -> None:
    typer.echo(f"epoch {placed.epoch}: the experts stand on {', '.join(placed.hosts)}")
