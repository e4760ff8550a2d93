"""The places of batches: how many that have nothing to do keep what hosts have computed for them, and who makes room."""

from __future__ import annotations

import asyncio

from moeserve.frontend.places import BatchPlace, Resting


async def turns() -> None:
    """Of the event loop, more than anybody needs."""
    for _ in range(20):
        await asyncio.sleep(0)


class Layer:
    """Two places, and batches of up to 512 tokens."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.resting = Resting(512, lambda: len(self.running) < 2, lambda: None)

    def begin(self, name: str, tokens: int) -> BatchPlace:
        self.running.add(name)

        def end(_: bool) -> None:
            self.running.discard(name)
            self.resting.look()

        return BatchPlace(self.resting, tokens, end)


async def test_no_more_rest_than_may_while_one_waits_for_those_that_have_gone_on() -> None:
    layer = Layer()
    first, second = layer.begin("first", 512), layer.begin("second", 512)
    first.rest()
    second.rest()
    await turns()
    assert not layer.running
    await first.go_on()
    going_on = asyncio.create_task(second.go_on())
    await turns()
    third, fourth = layer.begin("third", 512), layer.begin("fourth", 512)
    third.rest()
    fourth.rest()
    await turns()
    assert layer.running == {"fourth"}, "what the second one waits for is not its place"
    first.end(True)
    await going_on
    await turns()
    assert not layer.running, "there is room for it now that the second rests no longer"
    for place in (second, third, fourth):
        place.end(True)


async def test_one_that_has_gone_on_and_rests_again_makes_room_for_the_next() -> None:
    layer = Layer()
    first, second, third = (layer.begin(name, 512) for name in ("first", "second", "third"))
    for place in (first, second):
        place.rest()
    await first.go_on()
    third.rest()
    await turns()
    going_on = asyncio.create_task(second.go_on())
    await turns()
    assert not going_on.done()
    first.rest()
    await going_on
    for place in (first, second, third):
        place.end(True)
