"""docs/compat.md, written from the tables: python -m moeserve.compat.page > docs/compat.md"""

from __future__ import annotations

import json
import sys
from typing import Any

from moeserve.compat.systems import SYSTEMS
from moeserve.compat.table import Case, Param, Required, System

_TITLES = {"deepspeed": "DeepSpeed", "colossalai": "ColossalAI", "mindformers": "MindFormers", "trustformers": "TrustformeRS"}

_HEAD = """# Configurations of other systems

Bring the configuration of a DeepSpeed, ColossalAI, MindFormers or TrustformeRS layer as it is, under that system's own names:

```python
imported = moeserve.compat.load("deepspeed", {"hidden_size": 1024, "num_experts": 8, "k": 2})
imported.config  # a whole service configuration, ready to serve
imported.notes  # what of the original changes no answer here, and why
```

```bash
moeserve config import --from deepspeed layer.json > service.toml     # JSON, YAML or TOML; the notes become comments
```

Defaults are the other system's. Each row below is one thing a parameter can mean: an **effect** on the service configuration, a **note**
(it changes no answer; the reason is reported when the parameter is given), or a **refusal** (it cannot be had, and answers would differ
without it). An unknown parameter and a value that is not allowed are errors that name the parameter, the value and what is allowed.
Parameters marked ⁺ are moeserve's own, for what the original configuration does not say.

The layers themselves run in this process too: `moeserve.compat.deepspeed.MoE`, and `Experts`, `Top1Router`, `Top2Router`, `MoeLayer`,
`NormalNoiseGenerator` and `UniformNoiseGenerator` of `moeserve.compat.colossalai`, with the parameters, return values and state-dict
keys of the originals. `moeserve.compat.mindformers.MoEConfig`, and the structs and enums of `moeserve.compat.trustformers`, go
straight into `load`.
"""

#: parameters of moeserve's own, where the other system has none of that name
OWN = {
    *("hidden_size", "intermediate_size", "activation", "bias", "seed", "version", "num_layers"),
    *("mp_size", "max_ep_size", "expert_parallel", "model_parallel"),
}


def page() -> str:
    """The whole document."""
    return "\n".join([_HEAD, *(_section(system) for system in SYSTEMS.values())])


def _section(system: System) -> str:
    rows = [row for param in system.params for row in _rows(param, system)]
    head = ["| parameter | default | allowed | value | here |", "|---|---|---|---|---|"]
    return "\n".join([f"## {_TITLES[system.name]}", "", f"`load({system.name!r}, …)`: {system.source}.", "", *head, *rows, ""])


def _rows(param: Param, system: System) -> list[str]:
    is_own = param.name in OWN and not (system.name == "deepspeed" and param.name == "hidden_size")
    name = f"`{param.name}`{'⁺' if is_own else ''}"
    first = f"| {name} | {_default(param.default)} | {param.accepts.says} |"
    return [f"{first if index == 0 else '| | | |'} {case.at} | {_meaning(case)} |" for index, case in enumerate(param.cases)]


def _default(value: Any) -> str:
    return "required" if value is Required else f"`{json.dumps(value)}`"


def _meaning(case: Case) -> str:
    return case.says if case.outcome == "effect" else f"**{case.outcome}**: {case.says}"


if __name__ == "__main__":
    sys.stdout.write(page())
