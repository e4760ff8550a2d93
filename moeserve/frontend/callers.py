"""Whose requests a frontend has: what each holds, and how much each has been given."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

#: whoever has sent nothing for so long, and waits for nothing, is gone
_GONE_S: Final = 1.0
#: whoever holds so many times as much as the smallest of the others
_GREEDY: Final = 8.0
#: the weight of what a caller holds now in what it usually does
_NEWEST: Final = 1 / 8


@dataclass(eq=False)
class Caller:
    """`held_tokens` are admitted and not yet answered, `waiting_tokens` of them not yet taken; `in_flight`: batches that have some of it.

    `usual_tokens` is how many it has held lately whenever it sent something. `given` is how many tokens of it were taken, on a scale that
    all callers share.
    """

    key: str
    seen: float
    given: float
    held_tokens: int = 0
    usual_tokens: float = 0.0
    waiting_tokens: int = 0
    in_flight: int = 0


class Callers:
    """Those that are about, over all layers."""

    def __init__(self) -> None:
        #: tokens given to whoever was served last, when it was; who comes begins there, so that nobody saves up by being away
        self.level = 0.0
        self.held_tokens = 0
        self.waiting: dict[Caller, None] = {}
        #: in the order in which they were seen
        self._present: OrderedDict[str, Caller] = OrderedDict()

    def seen(self, key: str, now: float) -> Caller:
        """The caller `key`, who sends something `now`."""
        self._forget(now)
        caller = self._present.get(key)
        if caller is None:
            caller = self._present[key] = Caller(key, now, self.level)
        else:
            self._present.move_to_end(key)
            caller.seen = now
            if not caller.waiting_tokens and not caller.in_flight:
                caller.given = max(caller.given, self.level)
        return caller

    def count_held(self, caller: Caller, tokens: int) -> None:
        """So many tokens more are admitted and not yet answered, or fewer."""
        caller.held_tokens += tokens
        self.held_tokens += tokens
        if tokens > 0:
            more = caller.held_tokens - caller.usual_tokens
            caller.usual_tokens += more if more > 0 else _NEWEST * more

    def count_waiting(self, caller: Caller, tokens: int) -> None:
        """So many tokens more wait, or fewer."""
        caller.waiting_tokens += tokens
        if caller.waiting_tokens:
            self.waiting[caller] = None
        else:
            self.waiting.pop(caller, None)

    def ahead_of(self, caller: Caller, own_tokens: int, tokens: int) -> int:
        """Tokens that are taken before the last of `tokens` more of `caller`, before which `own_tokens` of its own go.

        As much as it gets meanwhile, every other gets, as far as it has something waiting.
        """
        same = own_tokens + tokens
        return own_tokens + sum(min(other.waiting_tokens, same) for other in self.waiting if other is not caller)

    def greedy_from(self, now: float) -> float:
        """A caller that holds more tokens than this is greedy: many times as many as the smallest caller that is about usually does.

        A caller that has never held any, as its first request is being read or was refused, says nothing of that.
        """
        if len(self._present) < 2:
            return float("inf")
        self._forget(now)
        usual = [caller.usual_tokens for caller in self._present.values() if caller.usual_tokens]
        return _GREEDY * min(usual) if len(usual) > 1 else float("inf")

    def _forget(self, now: float) -> None:
        while self._present:
            caller = next(iter(self._present.values()))
            if now - caller.seen <= _GONE_S:
                break
            if caller.held_tokens:
                self._present.move_to_end(caller.key)
                caller.seen = now
            else:
                del self._present[caller.key]
