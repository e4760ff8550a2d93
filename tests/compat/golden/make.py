"""Records whole-layer answers of DeepSpeed's `MoE`.

DS_BUILD_OPS=0 pip install -e ".[golden]"     (in an environment of its own)
DS_ACCELERATOR=cpu python -m tests.compat.golden.make
"""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from .cases import GOLDEN, HIDDEN, all_cases, expert, fill, hidden_states


def main() -> None:
    from deepspeed.moe.layer import MoE

    recorded: dict[str, torch.Tensor] = {}
    for index, case in enumerate(all_cases()):
        layer = MoE(HIDDEN, expert(), **case).eval()
        fill(layer, index)
        with torch.no_grad():
            try:
                answer = layer(hidden_states(index))
            except AssertionError:  # fewer tokens than min_capacity: refused there, not here
                continue
        for name, value in zip(("output", "l_aux", "exp_counts"), answer, strict=True):
            recorded[f"{index}.{name}"] = value.clone()
    save_file(recorded, GOLDEN)


if __name__ == "__main__":
    main()
