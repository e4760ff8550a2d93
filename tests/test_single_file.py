"""Work in turns of the event loop."""

from __future__ import annotations

import asyncio

from moeserve.loops import SingleFile


async def test_others_are_served_between_two_pieces_of_work() -> None:
    line, done, others = SingleFile(), list[int](), list[int]()

    def work(number: int) -> None:
        done.append(number)
        if number == 0:
            line.take(lambda: done.append(3))

    for number in range(3):
        line.take(lambda number=number: work(number))
    assert done == []
    for _ in range(4):
        before = len(done)
        await asyncio.sleep(0)
        others.append(len(done) - before)
    assert done == [0, 1, 2, 3]
    assert others == [1] * 4
