"""What a service in this process shows of its hosts and frontends."""

from __future__ import annotations

from tests.support.harness import ServiceHarness
from tests.support.waiting import until_async


async def gone(service: ServiceHarness, number: int) -> None:
    await until_async(lambda: service.frontend.stats().hosts[number].up is False)


def epochs(service: ServiceHarness) -> list[int]:
    return [member.epoch for member in service.frontends.members()]
