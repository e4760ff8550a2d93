"""How sentences for users say numbers."""

from __future__ import annotations

import pytest

from moeserve.errors import number_of


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(0, "host", "0 hosts"), (1, "host", "1 host"), (2, "copy", "2 copies"), (1, "copy", "1 copy"), (3, "process", "3 processes")],
)
def test_one_thing_or_several(number: int, noun: str, text: str) -> None:
    assert number_of(number, noun) == text
