"""Experts in memory up to a number of bytes: those that were used last stay, others are read when they are wanted.

Where they are read from is for whoever wants them to say: from files, or, where this memory is that of a GPU, from that of the host.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

from moeserve.experts import Expert, HeldExpert
from moeserve.transport import Loads

#: of one expert
_LONGEST_READ_S: Final = 60.0


class Loadable(NamedTuple):
    """An expert of `nbytes`, known by its key.

    `read` reads it as it is stored, and raises when it cannot be read; `place` makes what is computed with.
    """

    key: Hashable
    nbytes: int
    read: Callable[[], Expert]
    place: Callable[[Expert], HeldExpert]


@dataclass
class _Slot:
    """An expert, None until it has been read, and how many passes want it now."""

    nbytes: int
    held: HeldExpert | None = None
    users: int = 0


class ExpertCache:
    """At most `limit_bytes` of experts, and beside them the one that is being read, as it is stored; to be used from any thread.

    Once an expert has been read, the least recently used make room for it, but for those that a pass computes with. `on_read` is called
    after each that a pass has waited for. Claims are made and let go by one thread.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.on_read: Callable[[], None] = lambda: None
        #: of passes
        self.loads = Loads()
        #: by key, the least recently used first
        self._slots: OrderedDict[Hashable, _Slot] = OrderedDict()
        #: bytes of those in memory, and of those that passes want, whether they have been read or not
        self._nbytes = self._nbytes_in_use = 0
        #: what has no room yet, in the order in which it gets some, and what has been claimed
        self._waiting: list[Sequence[Loadable]] = []
        self._claimed: list[Loadable] = []
        self._claimer: int | None = None
        self._reading_since = math.inf
        self._changed = threading.Condition()
        #: one at a time, so that memory has no more than one beyond the limit
        self._reading = threading.Lock()

    @contextmanager
    def held(self, wanted: Sequence[Loadable]) -> Iterator[list[HeldExpert]]:
        """These experts, which differ and fit into the limit, for a pass: they stay until it leaves. Raises what a read raises.

        Whoever waits for room holds nothing meanwhile, and comes before whoever asks later, so nobody waits forever. What the same thread
        has claimed is there, and has its room: it does not wait.
        """
        with self._changed:
            missing = self._enter_in_turn(wanted)
            self._count(used=len(wanted))
        try:
            for one in missing:
                self._read(one)
                self._count(read=1)
                self.on_read()
            yield [held for one in wanted if (held := self._slots[one.key].held) is not None]
        finally:
            self._leave(wanted)

    def load(self, one: Loadable, *, evicts: bool) -> bool:
        """Reads an expert before a pass wants it, if there is room or others are to make it; whether it is there. Raises as `held`."""
        with self._changed:
            if one.key not in self._slots and not evicts and self._nbytes + one.nbytes > self.limit_bytes:
                return False
            missing = self._enter_in_turn([one])
        try:
            for each in missing:
                self._read(each)
        finally:
            self._leave([one])
        return True

    def claim(self, wanted: Sequence[Loadable]) -> bool:
        """Whether all of these are in memory at present, with room for a pass: they stay until `let_go`. It never waits.

        Who waits for room goes first as soon as there is some, so nobody waits forever.
        """
        with self._changed:
            is_here = all(one.key in self._slots and self._slots[one.key].held is not None for one in wanted)
            if not is_here or not self._has_room(wanted) or any(self._has_room(first) for first in self._waiting[:1]):
                return False
            self._enter(wanted)
            self._claimed += wanted
            self._claimer = threading.get_ident()
            return True

    def let_go(self) -> None:
        """Of all that was claimed."""
        if self._claimed:
            self._leave(self._claimed)
            self._claimed = []

    def reads(self, now: float) -> bool:
        """Whether an expert is being read, for a minute at most: a file system that takes longer may never answer. `now` in seconds."""
        return 0 <= now - self._reading_since < _LONGEST_READ_S

    def keep(self, keys: Collection[Hashable]) -> None:
        """Frees all others at once, but for those that a pass computes with."""
        with self._changed:
            for key in [key for key, slot in self._slots.items() if key not in keys and not slot.users]:
                self._drop(key)
            self._changed.notify_all()

    @property
    def experts(self) -> Mapping[Hashable, HeldExpert]:
        """Those in memory."""
        with self._changed:
            return {key: slot.held for key, slot in self._slots.items() if slot.held is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of those in memory."""
        return self._nbytes

    def _has_room(self, wanted: Sequence[Loadable]) -> bool:
        """Whether none of them is being read for somebody else, and they fit beside what is in use."""
        slots = [self._slots[one.key] for one in wanted if one.key in self._slots]
        if any(slot.held is None for slot in slots):
            return False
        beside = self._nbytes_in_use - sum(slot.nbytes for slot in slots if slot.users)
        return beside + sum(one.nbytes for one in wanted) <= self.limit_bytes

    def _enter_in_turn(self, wanted: Sequence[Loadable]) -> list[Loadable]:
        """As `_enter`, when there is room, and nobody has waited for longer. What is claimed is not in turn: they may wait for its room."""
        if not self._is_claimed_here(wanted):
            self._waiting.append(wanted)
            self._changed.wait_for(lambda: self._waiting[0] is wanted and self._has_room(wanted))
            del self._waiting[0]
            self._changed.notify_all()
        return self._enter(wanted)

    def _is_claimed_here(self, wanted: Sequence[Loadable]) -> bool:
        """Whether this thread has claimed all of them."""
        return self._claimer == threading.get_ident() and {one.key for one in wanted} <= {one.key for one in self._claimed}

    def _enter(self, wanted: Sequence[Loadable]) -> list[Loadable]:
        """They are in use from now on; returns those that are missing. Others make room when one of these has been read."""
        missing = []
        for one in wanted:
            if one.key not in self._slots:
                missing.append(one)
            slot = self._slots.setdefault(one.key, _Slot(one.nbytes))
            self._slots.move_to_end(one.key)
            self._nbytes_in_use += 0 if slot.users else slot.nbytes
            slot.users += 1
        return missing

    def _count(self, used: int = 0, read: int = 0) -> None:
        with self._changed:
            self.loads = Loads(self.loads.used + used, self.loads.read + read)

    def _drop(self, key: Hashable) -> None:
        slot = self._slots.pop(key)
        self._nbytes -= 0 if slot.held is None else slot.nbytes

    def _read(self, one: Loadable) -> None:
        with self._reading:
            self._reading_since = time.monotonic()
            try:
                expert = one.read()
            finally:
                self._reading_since = math.inf
            with self._changed:
                while self._nbytes + one.nbytes > self.limit_bytes:
                    self._drop(next(key for key, slot in self._slots.items() if not slot.users))
            held = one.place(expert)
            with self._changed:
                self._slots[one.key].held = held
                self._nbytes += one.nbytes
                self._changed.notify_all()

    def _leave(self, wanted: Sequence[Loadable]) -> None:
        with self._changed:
            for one in wanted:
                slot = self._slots[one.key]
                slot.users -= 1
                self._nbytes_in_use -= 0 if slot.users else slot.nbytes
                if slot.held is None:  # it could not be read
                    self._drop(one.key)
            self._changed.notify_all()
