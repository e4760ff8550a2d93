"""Which requests count as one execution."""

from __future__ import annotations

import asyncio
from typing import Any

from moeserve.api.request import BatchStart, LayerRequest
from moeserve.frontend.batch import Admitted, Batch
from moeserve.server.inference.statistics import LayerStatistics
from tests.support.engine import X


async def test_requests_that_run_together_are_one_execution() -> None:
    statistics, caller = LayerStatistics(), None

    def admitted(begun: BatchStart | None) -> Admitted:
        unused: Any = caller
        return Admitted(LayerRequest(X, begun=begun), unused, 0.0, asyncio.get_running_loop().create_future())

    for together in (1, 3):
        with statistics.request() as first, statistics.request() as second, statistics.request() as third:
            watched = [each.batch for each in (first, second, third)[:together]]
            Batch([admitted(None), *map(admitted, watched)]).begin(1.0)
            assert [each.is_first for each in watched] == [True] + [False] * (together - 1)
    told = statistics.message("tiny/layer", "1")
    assert (told.inference_count, told.execution_count) == (6, 2)
