"""`moeserve deploy`: start a service on a Ray cluster, where it keeps running."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from moeserve.cli.flags import Overrides, with_config_flags
from moeserve.cli.serving import tell_start
from moeserve.cli.signals import preparing, until_signal
from moeserve.cli.streams import tell
from moeserve.config import load_config
from moeserve.loops import in_thread

if TYPE_CHECKING:
    from moeserve.programs.deploy import Deployer


@with_config_flags(without=("kind",))
def deploy(
    source: Annotated[str, typer.Argument(help="A TOML configuration or a checkpoint folder.")],
    overrides: Overrides,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep running, and deploy again whenever the service is gone, until Ctrl-C or SIGTERM.")
    ] = False,
) -> None:
    """Start a service on the Ray cluster at --address, and return when it is ready. `status`, `scale`, `drain` and `shutdown` act on it."""
    tell_start(f"reading {source}")
    config = load_config(source, overrides)
    with preparing():
        from moeserve.programs.deploy import Deployer

    asyncio.run(until_signal(_deploy(Deployer(config), keep)))


async def _deploy(deployer: Deployer, keep: bool) -> None:
    try:
        await in_thread(deployer.join)  # which may take for ever
        await _deploy_and_keep(deployer, keep)
    finally:
        await asyncio.to_thread(deployer.close)


async def _deploy_and_keep(deployer: Deployer, keep: bool) -> None:
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
            tell("stopped; the service keeps running")
            return
        tell("the service is gone; deploying it again")
