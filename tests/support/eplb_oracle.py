"""The published algorithm of DeepSeek's EPLB, written from its description: what our planner is compared with.

L layers, E logical experts, R replicas, G GPUs. Everything must divide as there.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def published(weight: Floats, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Integers:
    """physical_to_logical [L, R], GPU by GPU."""
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    return np.stack([_layer(loads, num_replicas, num_groups, num_nodes, num_gpus) for loads in weight])


def balancedness(weight: Floats, physical_to_logical: Integers, num_gpus: int) -> float:
    """Mean over layers of mean / max load of a GPU, where replicas share the load of their expert evenly."""
    even = []
    for loads, physical in zip(weight, physical_to_logical, strict=True):
        shares = (loads / np.maximum(np.bincount(physical, minlength=len(loads)), 1))[physical]
        gpus = np.array([each.sum() for each in np.array_split(shares, num_gpus)])
        even.append(gpus.mean() / gpus.max() if gpus.max() else 1.0)
    return float(np.mean(even))


def _layer(loads: Floats, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Integers:
    """Groups to nodes, replicas within each node, replicas to its GPUs."""
    groups = np.arange(len(loads)).reshape(num_groups, -1)
    node_of_group = _balanced(loads[groups].sum(axis=1), num_nodes)
    physical = []
    for node in range(num_nodes):
        experts = groups[node_of_group == node].reshape(-1)
        replicas = _replicated(loads[experts], num_replicas // num_nodes)
        shares = (loads[experts] / np.bincount(replicas))[replicas]
        gpu_of = _balanced(shares, num_gpus // num_nodes)
        physical.append(experts[replicas[gpu_of.argsort(kind="stable")]])
    return np.concatenate(physical)


def _balanced(loads: Floats, num_packs: int) -> Integers:
    """The pack of each item: the largest item first, into the lightest pack that is not full; all packs have equally many."""
    pack_of = np.full(len(loads), -1)
    total, held = [0.0] * num_packs, [0] * num_packs
    for item in (-loads).argsort(kind="stable").tolist():
        pack = min((pack for pack in range(num_packs) if held[pack] < len(loads) // num_packs), key=lambda pack: total[pack])
        pack_of[item] = pack
        total[pack] += loads[item]
        held[pack] += 1
    return pack_of


def _replicated(loads: Floats, num_replicas: int) -> Integers:
    """The expert of each replica: every one once, then again and again the one with the most load per replica."""
    counts = np.ones(len(loads))
    replicas = [*range(len(loads))]
    while len(replicas) < num_replicas:
        hottest = int((loads / counts).argmax())
        replicas.append(hottest)
        counts[hottest] += 1
    return np.array(replicas)
