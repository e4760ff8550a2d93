"""What a recorded load says when the frontend does not always answer, or is started again meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from moeserve.bench import recording
from moeserve.bench.trace import read_trace
from moeserve.errors import ExpertUnavailable
from moeserve.observe.stats import LayerStats, ServiceStats


class Restarted:
    """Tells what it has counted, as a client does; the last of it again and again."""

    def __init__(self, *told: tuple[float, int] | None) -> None:
        self.told = list(told)

    async def stats(self) -> ServiceStats:
        uptime_s, rows = (self.told.pop(0) if len(self.told) > 1 else self.told[0]) or (0.0, 0)
        if not uptime_s:
            raise ExpertUnavailable("it is being started again")
        return ServiceStats(1, [LayerStats("one", rows, [rows, 0], [0, 0])], [], 0, uptime_s)


@pytest.mark.parametrize("up_s", [100.0, 1.0])
def test_a_frontend_that_is_started_again_counts_from_0(up_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was heard of again only when it had run for longer than before."""
    monkeypatch.setattr(recording, "_EVERY_S", 0.001)
    client: Any = Restarted((up_s, 50), (up_s + 1, 57), None, None, (9.0, 4), (10.0, 9))

    async def measure() -> None:
        while len(client.told) > 1:
            await asyncio.sleep(0.001)

    with (tmp_path / "trace").open("w") as file:
        asyncio.run(recording.record(client, file, measure))
    lines = read_trace(tmp_path / "trace").lines
    assert [line.rows[0].tolist() for line in lines if line.rows[0].any()] == [[7, 0], [4, 0], [5, 0]]
