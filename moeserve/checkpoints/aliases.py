"""Keys of config.json that a family calls otherwise than its kin."""

from __future__ import annotations

import re
from collections.abc import Mapping

from moeserve.checkpoints.keys import Config
from moeserve.checkpoints.wrappers import language_model


def renamed(table: Config, aliases: Mapping[str, str]) -> Config:
    """The table, and in it what it says by other names too; `aliases` has theirs -> ours."""
    return {**{ours: table[theirs] for theirs, ours in aliases.items() if theirs in table}, **table}


def in_their_words(sentence: str, config: Config, aliases: Mapping[str, str]) -> str:
    """A sentence about `config` with the names that it has for its keys."""
    table = language_model(config)
    for theirs, ours in aliases.items():
        if theirs in table and ours not in table:
            sentence = re.sub(rf"\b{ours}\b", theirs, sentence)
    return sentence
