"""`moeserve deploy`: a service on a Ray cluster that stays when this command ends."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from moeserve.cli.flags import Overrides
from moeserve.cli.signals import on_signals, tell
from moeserve.config import load_config
from moeserve.deployment import Deployer


def deploy(
    source: Annotated[str, typer.Argument(help="A TOML configuration or a checkpoint folder.")],
    overrides: Overrides,
    keep: Annotated[
        bool, typer.Option("--keep", help="Stay, and deploy again whenever the service is gone, until Ctrl-C or SIGTERM.")
    ] = False,
) -> None:
    """Put a service on the Ray cluster at --address and return once it is ready; `status`, `scale`, `drain` and `shutdown` act on it."""
    config = load_config(source, overrides)
    deployer = Deployer(config)
    deployer.join()
    try:
        asyncio.run(_deploy(deployer, keep))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        deployer.close()


async def _deploy(deployer: Deployer, keep: bool) -> None:
    this = asyncio.current_task()
    assert this is not None
    on_signals(lambda: _cancel(this))  # Ray's own handler of SIGTERM ends this process at once: what was begun would stay
    while True:
        deployed = await deployer.deploy(tell)
        tell(f"controller {deployed.controller}")
        for target in deployed.frontends:
            tell(f"ready {target}")
        if not keep:
            return
        try:
            await deployer.until_gone()
        except asyncio.CancelledError:
            tell("stopped; the service stays")
            return
        tell("the service is gone: deploying it again")


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
