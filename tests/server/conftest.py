from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.servers import Running, run


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    started = await run(max_message_bytes=2**20, max_tokens_per_request=64)
    yield started
    await started.stop()
