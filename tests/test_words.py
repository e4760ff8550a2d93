"""One word for one thing: names that the code once had, and the terms of the field in their place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

ROOT = Path(__file__).parents[1]
READ: Final = ("moeserve", "protos", "docs", "deploy", "k8s", "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
SUFFIXES: Final = {".py", ".md", ".proto", ".c", ".h", ".js", ".css", ".html", ".json", ".toml", ".yaml", ".yml", ".service", ""}

#: every form of a word -> the established term
INSTEAD: Final = {
    r"wish(es|ed)?": "desired state",
    r"seat(s|ed)?": "assignment, or reservation",
    r"standings?": "status",
    r"overviews?": "status",
    r"pulses?": "heartbeat",
    r"shel(f|ves)": "bank table",
    r"crews?": "fleet, or hosts",
    r"errands?": "message",
    r"muster(s|ed|ing)?": "collect",
    r"doorm[ae]n": "authenticator",
    r"farewells?": "goodbye",
    r"residents?": "on a host",
    r"settle(s|d|ment)?|settling": "decide, or wait until",
    r"despair(s|ed|ing)?": "give up",
    r"welcome(s|d)?": "accept",
}
_WORDS: Final = {re.compile(rf"(?:{form})", re.IGNORECASE): term for form, term in INSTEAD.items()}
#: parts of names count as words: some_name, SomeName, SOME_NAME
_PARTS: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def faults(text: str) -> list[str]:
    """Lines with a word of the table, and what to write."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for word in _PARTS.findall(line):
            found += [f"{number}: {word!r} -> {term}" for form, term in _WORDS.items() if form.fullmatch(word)]
    return found


def files(name: str) -> list[Path]:
    start = ROOT / name
    every = [start] if start.is_file() else sorted(path for path in start.rglob("*") if path.is_file())
    return [path for path in every if path.suffix in SUFFIXES and "__pycache__" not in path.parts]


@pytest.mark.parametrize("name", READ)
def test_words_are_those_of_the_field(name: str) -> None:
    found = [f"{path.relative_to(ROOT)}:{fault}" for path in files(name) for fault in faults(path.read_text())]
    assert files(name)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line", ["class WishList:", "self._seats[0]", "SETTLE_S = 1", "a doorman lets in", '"pulse": 1', "Overview of hosts"]
)
def test_a_word_is_found_in_prose_and_in_names(line: str) -> None:
    assert len(faults(line)) == 1


@pytest.mark.parametrize("line", ["outstanding rows", "understanding", "swish", "a resistor", "reseating"])
def test_other_words_are_not_found(line: str) -> None:
    assert not faults(line)
