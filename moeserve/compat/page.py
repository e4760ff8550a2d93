"""docs/compat.md, written from the tables by python -m moeserve.compat.page > docs/compat.md."""

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

`moeserve.compat.mindformers.MoEConfig`, and the structs and enums of `moeserve.compat.trustformers`, go straight into `load`.

## The layers themselves

`moeserve.compat.deepspeed.MoE`, and `Experts`, `Top1Router`, `Top2Router`, `MoeLayer`, `NormalNoiseGenerator` and
`UniformNoiseGenerator` of `moeserve.compat.colossalai`, have the parameters, return values and state-dict keys of the originals. They run
in this process, and:

```python
layer.save("folder")  # what `moeserve serve folder` and MoELayer.from_checkpoint take
moeserve.compat.save_layers("folder", {"blocks.0": first, "blocks.1": second})
MoE(hidden_size, expert, num_experts=8, k=2, target="127.0.0.1:50051", layer="blocks.0").eval()  # its experts are in the service
```

* With `target=` answers, losses and counts equal those in process, in evaluation mode; training mode is refused, because gradients do not
  travel. The service routes and computes, so the layer makes no experts (nor DeepSpeed's `mlp` and `coefficient`) and its state dict has
  the gate alone. What is drawn by chance (`use_rts`, `top2_2nd_expert_sampling`, `select_policy="random"`) is drawn in the service, from
  its seed. `used_token` with `use_residual` is refused: a service answers unused tokens with zeros. It also takes them for zeros, which
  shows in `l_aux` alone.
* `save` writes `nn.Sequential(Linear, GELU or ReLU, Linear)` as two projections, which can be split over hosts. Any other module is
  written as a class and what it is made with: the class must stand in a module that can be imported, and DeepSpeed's `MoE` must be told
  what it is made with, `save(folder, expert_args={...})`. Making it runs its code, so whoever serves the folder allows that with
  `model.trusted_modules`; classes of `torch.nn` are always allowed. `MoELayer` has `save` too.

## Checkpoints of DeepSpeed

`[model] checkpoint` can be the folder that `save_checkpoint` wrote, or its tag: `layer_L_expert_E_mp_rank_00_model_states.pt` for each
expert and `mp_rank_00_model_states.pt` with the gates. The files do not say how a layer routes or what its experts compute, so
`[[layers]]` does, for all layers or by name; the entry of an import from below fits:

```toml
[model]
checkpoint = "checkpoints/global_step1000"

[[layers]]
activation = "gelu"   # between the two projections; or expert = "package.module:Class" and expert_args

[layers.gating]
top_k = 2
capacity_rule = "deepspeed"
capacity_factor = 1.0
min_capacity = 4
renormalize = "post_drop"
drop_policy = "choice_major"
```

These files are pickles, and a pickle can name any code. moeserve reads them itself: tensors, numbers, strings and containers come out;
what the pickle would import or call is passed over, never imported, made or run. So trainers may put what they like beside the model, as
Megatron-DeepSpeed does with its arguments, random states and loss scaler, of packages that are not installed here. `module` may be flat or
nested by parts of the model, and have a wrapper's name in front (`module.`) that the files of the experts lack, or the other way. An object
in place of a tensor that is needed is refused by file and name.

Experts are read one by one, by the host that holds them. One model-parallel rank is supported. Files from before torch 1.6 are no zip:
load such a file with torch, and save it again.
"""

#: what a row of a table cannot say
_REMARKS = {
    "mindformers": """The published source of `TopkRouterV2` normalises the weights of a token after the drop, over the choices that were
kept, and then leaves out `routed_scaling_factor`. Here they are normalised before the drop, over all choices, and scaled: a token that
lost a choice weighs the others less than there. Without drops and with a factor of 1 there is no difference.
""",
}

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
    remarks = [_REMARKS[system.name]] if system.name in _REMARKS else []
    return "\n".join([f"## {_TITLES[system.name]}", "", f"`load({system.name!r}, …)`: {system.source}.", "", *remarks, *head, *rows, ""])


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
