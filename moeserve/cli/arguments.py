"""What several verbs check of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from moeserve.errors import ConfigError

_MOST: Final = 1_000_000


def check(holds: bool, sentence: str) -> None:
    """Raises ConfigError unless it `holds`."""
    if not holds:
        raise ConfigError(sentence)


def check_seed(seed: int) -> None:
    """Raises ConfigError for what is no seed of every generator."""
    check(0 <= seed < 2**63, f"--seed is {seed}; allowed: 0 to 2^63 - 1")


def numbers_of(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """The numbers of a list of them as an option takes it. Raises ConfigError."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} is {text!r}; expected a number, or several as in 1,8,64") from None
    check(all(0 < number <= _MOST for number in numbers), f"{option} is {text}; allowed: more than 0, at most {_MOST}")
    return numbers
