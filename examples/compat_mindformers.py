"""MindFormers' MoEConfig with only its import changed: as a service, compared with the same layer in this process."""

from __future__ import annotations

import torch

import moeserve
from moeserve.compat.mindformers import MoEConfig  # was: from mindformers.modules.transformer.moe import MoEConfig


def main() -> None:
    config = MoEConfig(expert_num=8, num_experts_chosen=2, capacity_factor=1.5, moe_intermediate_size=256, shared_expert_num=1)
    imported = moeserve.compat.load("mindformers", {**config.to_diff_dict(), "hidden_size": 64, "expert_parallel": 2})
    for note in imported.notes:
        print(f"{note.field}: {note.what}")

    layer = imported.config.layers[0]
    print(layer.gating)
    hidden_states = torch.randn(128, 64)
    here = moeserve.MoELayer(**layer.model_dump(exclude_unset=True, exclude={"gating"}), gating=layer.gating).run(hidden_states)
    print(f"in process  requested {here.requested.tolist()}, dropped {here.dropped.tolist()}, aux_loss {here.aux_loss:.4f}")

    service_config = imported.config.model_dump(exclude_unset=True) | {"server": {"port": 0, "metrics_port": 0}}
    with moeserve.serve(service_config) as service, moeserve.Client(service.target) as client:
        out = client.forward(hidden_states)
    difference = (out.hidden_states - here.hidden_states).norm() / here.hidden_states.norm()
    print(f"served      relative difference {difference:.1e}, dropped {out.dropped.tolist()}")


if __name__ == "__main__":
    main()
