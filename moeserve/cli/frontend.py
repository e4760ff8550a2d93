"""`moeserve frontend`: add a frontend to a running service, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from moeserve.cli.flags import Overrides, with_config_flags
from moeserve.cli.serving import prepare_process, serve_until_told, tell_start
from moeserve.cli.signals import preparing
from moeserve.cli.streams import tell
from moeserve.cli.target import TlsCa
from moeserve.cli.token import rotating_token
from moeserve.client import TLS
from moeserve.config import ServerConfig, load_server


@with_config_flags(tables=("server",), without=("admin_token_file", "processes"))
def frontend(
    controller: Annotated[str, typer.Option(envvar="MOESERVE_CONTROLLER", help="host:port of the controller to follow.")],
    frontend_token_file: Annotated[Path, typer.Option(envvar="MOESERVE_FRONTEND_TOKEN_FILE", help="File holding the frontend token.")],
    overrides: Overrides,
    tls_ca: TlsCa = None,
    name: Annotated[str, typer.Option(help="Name in logs and in moeserve status; default: host name and process.")] = "",
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for the controller.")] = 60.0,
) -> None:
    """Answer requests as one of any number of frontends of a service, until Ctrl-C or SIGTERM, then drain.

    The controller sends the configuration. The checkpoint must be at the same path here, because the gate is read from it.
    """
    tell_start(f"following {controller}")
    server = load_server(overrides.get("server", {}))
    # This process shows its own certificate to a controller that asks for one.
    tls = TLS(ca=tls_ca, cert=server.tls_cert, key=server.tls_key) if tls_ca else None
    prepare_process()
    asyncio.run(_serve(controller, rotating_token(frontend_token_file), server, tls, name, timeout))


async def _serve(controller: str, token: Callable[[], str], server: ServerConfig, tls: TLS | None, name: str, timeout_s: float) -> None:
    with preparing():
        from moeserve.programs.frontend import FrontendProgram
        from moeserve.programs.grpc_orders import GrpcOrders

        program = FrontendProgram(server, GrpcOrders(controller, token, tls), name=name, progress=tell)

    async def over() -> None:
        raise await program.broken

    await serve_until_told(program, program.start(timeout_s), over)
