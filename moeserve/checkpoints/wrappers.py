"""Language models inside others: beside an encoder, or as one of several parts. Any family may be wrapped.

A wrapper's config.json has a table for the language model, and its tensors stand below a name of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from moeserve.checkpoints.family import Layout
from moeserve.checkpoints.keys import lookup

#: tables of config.json that describe a language model; the first that is there counts
SECTIONS: Final = ("thinker_config.text_config", "text_config", "llm_config", "language_config")
_TELLING: Final = frozenset({"model_type", "hidden_size", "num_hidden_layers"})
#: what stands before "model." in the names of a language model's tensors, and what in its place
_BEFORE: Final = ("language_model.", "thinker.", "llm.")
_INSTEAD: Final = ("model.language_model.", "language_model.", "model.llm.", "")


def language_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table that describes the language model: one of SECTIONS that says of what type or size it is, else the file itself."""
    tables = (lookup(config, section) for section in SECTIONS)
    return next((table for table in tables if isinstance(table, Mapping) and not _TELLING.isdisjoint(table)), config)


def model_types(config: Mapping[str, Any]) -> list[str]:
    """What may name the family, the most telling first: the language model's own type, then its wrapper's."""
    types = (table.get("model_type") for table in (language_model(config), config))
    return list(dict.fromkeys(name for name in types if isinstance(name, str)))


def everywhere(layouts: Iterable[Layout]) -> Iterator[Layout]:
    """Each layout, and the same below the names that a wrapper may have before it."""
    return (replace(layout, prefix=place) for layout in layouts for place in places(layout.prefix))


def places(prefix: str) -> tuple[str, ...]:
    """Where tensors below `prefix` may stand in a wrapper, the name in an unwrapped model first."""
    inner = prefix.removeprefix("model.")
    instead = () if inner == prefix else tuple(f"{outer}{inner}" for outer in _INSTEAD)
    return tuple(dict.fromkeys((prefix, *instead, *(f"{outer}{prefix}" for outer in _BEFORE))))
