"""The service over gRPC, a frontend in this process, and the layer in this process: `of_moeserve.py TARGET ACTIVATION`.

A layer has the name of its activation.
"""

from __future__ import annotations

import sys
from importlib.metadata import version

import torch
from turns import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, Side, take_turns

import moeserve
from moeserve.allocator import keep_large_blocks


def main() -> None:
    target, activation = sys.argv[1:]
    keep_large_blocks()
    torch.set_num_threads(2)
    local = moeserve.MoELayer(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        activation=activation,
        gating=moeserve.GatingConfig(top_k=TOP_K),
    )
    with moeserve.Client(target, timeout=120) as client, moeserve.EmbeddedClient(target) as near:
        sides: dict[str, Side] = {
            "moeserve, gRPC": lambda rows: client.forward(rows, layer=activation).hidden_states,
            "moeserve, embedded": lambda rows: near.forward(rows, layer=activation).hidden_states,
            "MoELayer, in process": local,
        }
        take_turns(sides, f"moeserve {version('moeserve')}, torch {version('torch')}, grpcio {version('grpcio')}")


if __name__ == "__main__":
    main()
