"""Your own experts: any nn.Module, by its import path. Run it with python examples/custom_expert.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import moeserve


class Convolved(nn.Module):
    """An expert that is not a feed-forward network: a gated convolution over the channels."""

    def __init__(self, hidden_size: int, width: int = 5) -> None:
        super().__init__()
        self.mix = nn.Conv1d(1, 2, width, padding=width // 2)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, rows: Tensor) -> Tensor:
        value, gate = self.mix(rows.unsqueeze(1)).unbind(dim=1)
        answer: Tensor = self.out(value * torch.sigmoid(gate))
        return answer


def main() -> None:
    """Serve six of these experts on two hosts, and compare with the same layer in this process."""
    # Hosts are separate processes; they import this file by its name.
    sys.path.insert(0, str(Path(__file__).parent))
    layer = {"hidden_size": 64, "num_experts": 6, "expert": "custom_expert:Convolved", "expert_args": {"hidden_size": 64}, "seed": 3}
    config = {"layers": [layer], "placement": {"num_hosts": 2}, "server": {"port": 0, "metrics_port": 0}}
    hidden_states = torch.randn(100, 64)
    local = moeserve.MoELayer(**layer)  # type: ignore[arg-type]
    with moeserve.serve(config) as service, moeserve.Client(service.target) as client:
        out = client.forward(hidden_states)
    here = local(hidden_states)
    difference = (out.hidden_states - here).norm() / here.norm()
    print(f"tokens per expert {out.processed.tolist()}")
    print(f"served and in this process: relative difference {difference:.1e}")


if __name__ == "__main__":
    main()
