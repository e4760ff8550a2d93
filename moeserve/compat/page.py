"""docs/compat.md, written from the tables by python -m moeserve.compat.page > docs/compat.md."""

from __future__ import annotations

import json
import sys
from typing import Any

from moeserve.compat.systems import SYSTEMS
from moeserve.compat.table import Case, Param, Required, System

_TITLES = {"deepspeed": "DeepSpeed", "colossalai": "ColossalAI", "mindformers": "MindFormers", "trustformers": "TrustformeRS"}

_HEAD = """# Configurations of other systems

With this page you serve a layer of DeepSpeed, ColossalAI, MindFormers or TrustformeRS: from its configuration, from its class, or, for
DeepSpeed, from its checkpoint. Pass the configuration unchanged, with that system's own names:

```python
imported = moeserve.compat.load("deepspeed", {"hidden_size": 1024, "num_experts": 8, "k": 2})
imported.config  # a whole service configuration, ready to serve
imported.notes  # settings that do not change any answer here, and why
```

```bash
moeserve config import --from deepspeed layer.json > service.toml     # JSON, YAML or TOML; the notes become comments
```

Defaults are those of the other system. Each row below is one meaning of a parameter: an effect on the service configuration, a **note**
(it does not change any answer; the reason is reported when the parameter is given), or a **refusal** (it is not supported, and answers
would differ without it). An unknown parameter or a value that is not allowed is an error that names the parameter, the value and what is
allowed. Parameters marked ⁺ are moeserve's own, for settings that the original configuration does not have.

`moeserve.compat.mindformers.MoEConfig`, and the structs and enums of `moeserve.compat.trustformers`, can be passed to `load` directly.

## The layers themselves

`moeserve.compat.deepspeed.MoE`, and `Experts`, `Top1Router`, `Top2Router`, `MoeLayer`, `NormalNoiseGenerator` and
`UniformNoiseGenerator` of `moeserve.compat.colossalai`, have the parameters, return values and state-dict keys of the originals. They run
in this process, and:

```python
layer.save("folder")  # what `moeserve serve folder` and MoELayer.from_checkpoint take
moeserve.compat.save_layers("folder", {"blocks.0": first, "blocks.1": second})
MoE(hidden_size, expert, num_experts=8, k=2, target="127.0.0.1:50051", layer="blocks.0").eval()  # its experts are in the service
```

* With `target=`, answers, losses and counts equal those in process, in evaluation mode. Training mode is refused, because the service
  does not compute gradients. The service routes and computes, so the layer creates no experts (nor DeepSpeed's `mlp` and
  `coefficient`), and its state dict has only the gate. Random choices (`use_rts`, `top2_2nd_expert_sampling`, `select_policy="random"`)
  are made in the service, from its seed. `used_token` with `use_residual` is refused, because a service answers unused tokens with
  zeros. A service also treats them as rows of zeros, which affects only `l_aux`.
* `save` writes `nn.Sequential(Linear, GELU or ReLU, Linear)` as two projections, which can be split over hosts. Any other module is
  written as a class and its arguments. The class must be in a module that can be imported, and DeepSpeed's `MoE` needs the arguments:
  `save(folder, expert_args={...})`. Building such an expert runs its code, so the operator of the service must allow it with
  `model.trusted_modules`; classes of `torch.nn` are always allowed. `MoELayer` has `save`, too.

## Checkpoints of DeepSpeed

`[model] checkpoint` can be the folder that `save_checkpoint` wrote, or the folder of its tag, with a
`layer_L_expert_E_mp_rank_00_model_states.pt` for each expert and `mp_rank_00_model_states.pt` with the gates. The files do not say how a
layer routes or what its experts compute. So set this in `[[layers]]`, for all layers or by name; the entry of an imported configuration
fits:

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

These files are pickles, and a pickle can name any code. moeserve has its own reader: it returns tensors, numbers, strings and containers,
and skips everything that the pickle would import or call, without importing or running it. So the files may contain other objects than
the model, even of packages that are not installed here, such as Megatron-DeepSpeed's arguments, random states and loss scaler. `module`
may be flat or nested, and may have a wrapper's prefix (`module.`) that the files of the experts do not have, or the reverse. If a needed
tensor is another object instead, the error names the file and the tensor.

Each host reads its own experts, one at a time. One model-parallel rank is supported. Files from before torch 1.6 are not zip files: load
such a file with torch, and save it again.
"""

#: what a row of a table cannot say
_REMARKS = {
    "mindformers": """The published source of `TopkRouterV2` normalizes the weights of a token after the drop, over the kept choices, and
ignores `routed_scaling_factor`. Here they are normalized before the drop, over all choices, and scaled: if a token lost a choice, its
other choices weigh less than there. Without drops and with a factor of 1 there is no difference.
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
