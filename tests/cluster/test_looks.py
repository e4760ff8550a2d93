"""A host that is looked for and does not answer: busy for a while, and down in the end."""

from __future__ import annotations

import asyncio
import math
from collections import Counter

import pytest

from moeserve.cluster.looks import Looks
from tests.support.waiting import until_async


async def test_a_late_answer_is_no_death_until_it_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, answers = Counter[int](), asyncio.Event()

    async def look(number: int) -> None:
        begun[number] += 1
        if number == 0:
            await answers.wait()

    def looked() -> Counter[int]:
        looks.begin([0, 1])
        return begun

    looks = Looks(look)
    monkeypatch.setattr("moeserve.cluster.looks.MISSED_S", math.inf)
    await until_async(lambda: looked()[1] == 3)
    assert begun[0] == 1 and looks.missed() == set()
    monkeypatch.setattr("moeserve.cluster.looks.MISSED_S", 0.0)
    assert looks.missed() - {1} == {0}
    answers.set()
    await until_async(lambda: looked()[0] == 2)
    assert 0 in looks.missed()
    looks.end()
