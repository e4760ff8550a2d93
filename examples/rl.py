"""Rollouts whose routing a trainer replays, and weights of its steps in the service: python examples/rl.py.

The example starts a service whose hosts are threads of this process. The policy here is one MoE layer, and its reward a made-up one.

N tokens of a rollout, H hidden size, K choices per token, E experts.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import moeserve

TINY = Path(__file__).parent / "tiny-moe"
#: the layer as the service names it, and as its tensors are named in the checkpoint
LAYER, SAVED = "model.layers.0.mlp", "model.layers.0.block_sparse_moe"
STEPS, TOKENS = 3, 64


def rollout(client: moeserve.Client, tokens: Tensor) -> moeserve.ForwardOutput:
    """tokens [N, H] -> the service's answer, with the experts of every token (topk_ids) and their weights (topk_weights), [N, K] both."""
    return client.forward(tokens, LAYER, return_routing=True)


def replay(client: moeserve.Client, tokens: Tensor, recorded: moeserve.ForwardOutput) -> None:
    """The same tokens by the recorded choices: nothing is routed again, so nothing can be routed otherwise."""
    again = client.forward(tokens, LAYER, topk_ids=recorded.topk_ids, topk_weights=recorded.topk_weights, return_routing=True)
    assert again.model_revision == recorded.model_revision
    for name in ("topk_ids", "topk_weights", "hidden_states"):
        assert torch.equal(getattr(again, name), getattr(recorded, name)), name


def train(experts: nn.Module, tokens: Tensor, recorded: moeserve.ForwardOutput, optimizer: torch.optim.Optimizer) -> list[int]:
    """One step by the recorded choices: gradients of the weights in this process. Returns the experts that it changed."""
    before = [weight.detach().clone() for weight in experts.parameters()]
    output = experts(tokens, recorded.topk_ids, recorded.topk_weights)
    print(f"largest difference between trainer and service: {(output - recorded.hidden_states).abs().max():.1e}")
    loss = (output - tokens).square().mean()  # in the place of a loss of reinforcement learning
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    is_changed = [(old != new).flatten(1).any(dim=1) for old, new in zip(before, experts.parameters(), strict=True)]
    return torch.stack(is_changed).any(dim=0).nonzero().flatten().tolist()


def write(experts: Any, changed: list[int], folder: Path) -> Path:
    """A checkpoint folder of the whole model: the changed experts in a file of their own, the others in the old one, by a link."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(TINY / name)
    tensors: dict[str, Tensor] = {}
    for expert in changed:
        gate, up = experts.gate_up_proj[expert].detach().chunk(2)
        matrices = {"w1": gate, "w3": up, "w2": experts.down_proj[expert].detach()}
        tensors |= {f"{SAVED}.experts.{expert}.{name}.weight": matrix.contiguous() for name, matrix in matrices.items()}
    save_file(tensors, folder / "step.safetensors")
    with safe_open(TINY / "model.safetensors", "pt") as old:
        files = dict.fromkeys(old.keys(), "model.safetensors") | dict.fromkeys(tensors, "step.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def main(folder: Path) -> None:
    """Some steps: rollout, replay, training step, swap."""
    config = {"model": {"checkpoint": TINY, "dtype": "float32"}, "placement": {"num_hosts": 2}, "server": {"port": 0, "metrics_port": 0}}
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, experts_implementation="eager")
    experts = model.get_submodule("model.layers.0.mlp.experts")
    optimizer = torch.optim.SGD(experts.parameters(), lr=1.0)
    with moeserve.serve(config, cluster="threads") as service, moeserve.Client(service.target) as client:
        for step in range(STEPS):
            tokens = torch.randn(TOKENS, 128, generator=torch.Generator().manual_seed(step))
            recorded = rollout(client, tokens)
            assert recorded.model_revision == step + 1
            replay(client, tokens, recorded)
            changed = train(experts, tokens, recorded, optimizer)
            revision = service.swap(LAYER, write(experts, changed, folder / f"step-{step}"), changed)
            print(f"step {step}: routing and answers replayed bit by bit; {len(changed)} experts swapped in, revision {revision}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        main(Path(folder))
