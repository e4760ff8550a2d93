"""The tables of docs/compat.md, from those of the package: python -m tests.support.compat_page. The rest is written by hand."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

from moeserve.compat import SYSTEMS
from moeserve.compat.system import System
from moeserve.compat.table import Case, Param, Required

DOCUMENT = Path(__file__).parents[2] / "docs" / "compat.md"
_HEAD = ["| parameter | default | allowed | value | here |", "|---|---|---|---|---|"]

#: parameters of moeserve's own, where the other system has none of that name
OWN = {
    *("hidden_size", "intermediate_size", "activation", "bias", "seed", "version", "num_layers"),
    *("mp_size", "max_ep_size", "expert_parallel", "model_parallel"),
}


def with_tables(document: str) -> str:
    """The document with the table of each system in the place of the one it has, in the order of the systems."""
    systems = iter(SYSTEMS.values())
    old, new = iter(document.split("\n")), []
    for line in old:
        if line == _HEAD[0]:
            new += [*_HEAD, *_table(next(systems)), ""]
            list(takewhile(bool, old))
        else:
            new.append(line)
    assert next(systems, None) is None, "every system has its table"
    return "\n".join(new)


def _table(system: System) -> list[str]:
    return [row for param in system.params for row in _rows(param, system)]


def _rows(param: Param, system: System) -> list[str]:
    is_own = param.name in OWN and not (system.name == "deepspeed" and param.name == "hidden_size")
    first = f"| `{param.name}`{'⁺' if is_own else ''} | {_default(param.default)} | {param.accepts.says} |"
    return [f"{'| | | |' if index else first} {case.at} | {_meaning(case)} |" for index, case in enumerate(param.cases)]


def _default(value: Any) -> str:
    return "required" if value is Required else f"`{json.dumps(value)}`"


def _meaning(case: Case) -> str:
    return case.says if case.outcome == "effect" else f"**{case.outcome}**: {case.says}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
