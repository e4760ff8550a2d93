"""What a service in this process shows of its hosts and frontends."""

from __future__ import annotations

from tests.support.harness import ServiceHarness
from tests.support.waiting import until_async


async def gone(service: ServiceHarness, number: int) -> None:
    """Its frontend has told whoever asks; that the connection is closed is seen a moment before."""
    link = service.frontend._links[number]
    await until_async(lambda: link._channel is None)


async def back(service: ServiceHarness, number: int) -> None:
    """It gets rows again: its canary has come back."""
    await until_async(lambda: service.frontend._links[number].condition == "up")


def epochs(service: ServiceHarness) -> list[int]:
    return [member.epoch for member in service.frontends.members()]
