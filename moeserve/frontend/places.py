"""The places of a layer's batches with the hosts, of which there are few: who waits for a lost host needs none meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

#: so many times as many tokens as a batch may have wait without a place: what other hosts have computed for them is kept
_RESTING: Final = 2


class Resting:
    """Of one layer, the batches that wait for a lost host, and go on: side by side, in the place of one batch of `max_tokens`.

    is_room: whether there is a place; on_left is called when those that go on need none any more.
    """

    def __init__(self, max_tokens: int, is_room: Callable[[], bool], on_left: Callable[[], None]) -> None:
        self._max_tokens, self._is_room, self._on_left = max_tokens, is_room, on_left
        #: of those that wait, and of those that go on
        self._resting_tokens = self._tokens = 0
        self._number = self._entering = 0
        #: that would rest if not too many did
        self._waking: dict[BatchPlace, None] = {}
        self._changed = asyncio.Event()

    @property
    def places(self) -> int:
        """How many those that go on have, or are next to get: one at most."""
        return int(self._number + self._entering > 0)

    def look(self) -> None:
        """There may be room."""
        self._changed.set()

    def rest(self, place: BatchPlace) -> None:
        """One more batch has nothing to do; it keeps its place as long as too many rest, and nobody who has something to do needs it."""
        if self._resting_tokens and self._resting_tokens + place.tokens > _RESTING * self._max_tokens:
            self._waking[place] = None
            self._changed.set()
        else:
            self._lie_down(place)

    def stand(self, place: BatchPlace) -> None:
        """A batch that has a place needs it."""
        self._waking.pop(place, None)

    def get_up(self, tokens: int) -> None:
        """A batch rests no longer."""
        self._resting_tokens -= tokens
        for place in list(self._waking):
            self.rest(place)

    def _lie_down(self, place: BatchPlace) -> None:
        self._waking.pop(place, None)
        self._resting_tokens += place.tokens
        place.give_up()

    async def enter(self, tokens: int) -> None:
        """Waits until a batch of `tokens` fits beside the others; the first one always does, when there is a place."""
        self._entering += 1
        try:
            while not self._fits(tokens):
                self._changed.clear()
                # One rests for the one that rests no longer, if it has what that needs: else ever more would, as batches come.
                in_its_way = [place for place in self._waking if place.has_entered is bool(self._number)]
                if in_its_way:
                    self._lie_down(in_its_way[0])
                await self._changed.wait()
            self._number, self._tokens = self._number + 1, self._tokens + tokens
        finally:
            self._entering -= 1
            if not self.places:
                self._on_left()

    def leave(self, tokens: int) -> None:
        """A batch of `tokens` that has entered needs no place any more."""
        self._number, self._tokens = self._number - 1, self._tokens - tokens
        self._changed.set()
        if not self.places:
            self._on_left()

    def _fits(self, tokens: int) -> bool:
        return self._tokens + tokens <= self._max_tokens if self._number else self._is_room()


class BatchPlace:
    """Of one batch, from its beginning on; `end` is called when it needs the place no longer, with whether it was computed."""

    def __init__(self, resting: Resting, tokens: int, end: Callable[[bool], None]) -> None:
        self._resting, self.tokens = resting, tokens
        #: None while it rests
        self._end: Callable[[bool], None] | None = end
        #: whether it rests no longer, and has gone on beside others
        self.has_entered = False

    def rest(self) -> None:
        """Hosts have nothing of the batch to do until one that was lost is back: others run meanwhile."""
        if self._end is not None:
            self._resting.rest(self)

    def give_up(self) -> None:
        """It rests now."""
        assert self._end is not None, "a batch that has a place"
        # Not at once: the next batch would begin inside this one, and the one after that inside the next.
        asyncio.get_running_loop().call_soon(self._end, False)
        self._end, self.has_entered = None, False

    async def go_on(self) -> None:
        """Waits until the batch has a place, if it rests."""
        self._resting.stand(self)
        if self._end is None:
            await self._resting.enter(self.tokens)
            self._resting.get_up(self.tokens)
            self._end, self.has_entered = self._leave, True

    def end(self, is_computed: bool) -> None:
        """The batch is over."""
        self._resting.stand(self)
        if self._end is None:
            self._resting.get_up(self.tokens)
        else:
            self._end(is_computed)

    def _leave(self, _: bool) -> None:
        self._resting.leave(self.tokens)
