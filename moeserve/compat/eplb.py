"""DeepSeek's expert parallelism load balancer, EPLB (github.com/deepseek-ai/EPLB): its function, on our planner.

L layers, E logical experts, R physical experts (replicas), G GPUs, X = the most replicas of an expert.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moeserve.config import MAX_PHYSICAL
from moeserve.errors import ConfigError
from moeserve.placement import deal_evenly, fill_slots

_Floats = npt.NDArray[np.float64]
_Integers = npt.NDArray[np.integer]


def rebalance_experts(
    weight: Tensor | npt.ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which expert each replica is, for the loads `weight` [L, E]: the maps of EPLB's function of that name.

    physical_to_logical_map [L, R]: GPU by GPU; if R is no multiple of G, the first R mod G GPUs have one replica more
    logical_to_physical_map [L, E, X]: the replicas of each expert, -1 where there are no more
    expert_count            [L, E]: how many each has

    All are int64 on the CPU. As there, if num_groups is a multiple of num_nodes, the experts of a group (neighbours in id) have all their
    replicas on one node, and every node has as many groups. Where numbers do not divide, any replica may be on any GPU. A GPU is never more
    loaded than the busiest one of EPLB's result would be. Raises ConfigError for numbers that cannot be.
    """
    numbers = {"num_replicas": num_replicas, "num_groups": num_groups, "num_nodes": num_nodes, "num_gpus": num_gpus}
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise ConfigError(f"{name} is {number!r}; allowed: whole numbers")
        if number < 1:
            raise ConfigError(f"{name} is {number}; allowed: at least 1")
    loads = _checked(weight, num_replicas, num_gpus)
    nodes = _Nodes.of(loads.shape[1], num_replicas, num_groups, num_nodes, num_gpus)
    physical = np.stack([np.concatenate([*nodes.packed(each)]) for each in loads])
    return _maps(physical, loads.shape[1])


@dataclass(frozen=True)
class _Nodes:
    """groups of experts are dealt to nodes, of which each has so many GPUs, with so many slots each."""

    groups: int
    nodes: int
    slots: _Integers

    @classmethod
    def of(cls, num_experts: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> _Nodes:
        if num_groups % num_nodes or num_experts % num_groups or num_gpus % num_nodes or num_replicas % num_gpus:
            num_groups = num_nodes = 1
        slots = np.full(num_gpus, num_replicas // num_gpus)
        slots[: num_replicas % num_gpus] += 1
        return cls(num_groups, num_nodes, slots)

    def packed(self, loads: _Floats) -> Iterable[_Integers]:
        """The experts of the replicas, node by node, each GPU by GPU."""
        experts = np.arange(len(loads)).reshape(self.groups, -1)
        node_of = deal_evenly(loads.reshape(self.groups, -1).sum(axis=1), self.nodes)
        slots = self.slots.reshape(self.nodes, -1)
        for node in range(self.nodes):
            mine = experts[node_of == node].reshape(-1)
            yield mine[fill_slots(loads[mine], slots[node])]


def _checked(weight: Tensor | npt.ArrayLike, num_replicas: int, num_gpus: int) -> _Floats:
    if isinstance(weight, Tensor) and (weight.is_complex() or weight.is_meta or weight.layout is not torch.strided):
        kind = f"{weight.dtype}, {weight.layout} on {weight.device}"
        raise ConfigError(f"weight is a tensor of {kind}; allowed: real numbers, dense, [layers, logical experts]")
    try:
        values = weight.detach().to("cpu", torch.float64).numpy() if isinstance(weight, Tensor) else np.asarray(weight)
    except ValueError:  # rows of different lengths
        raise ConfigError("weight has rows of different lengths; allowed: numbers, [layers, logical experts]") from None
    if values.ndim != 2 or not values.size or values.dtype.kind not in "iufb":
        raise ConfigError(f"weight has shape {list(values.shape)} and type {values.dtype}; allowed: numbers, [layers, logical experts]")
    loads = values.astype(np.float64)
    if not (np.isfinite(loads).all() and (loads >= 0).all()):
        raise ConfigError("weight has negative numbers, NaN or Inf; allowed: loads of experts, 0 or more")
    if not loads.shape[1] <= num_replicas <= MAX_PHYSICAL:
        raise ConfigError(
            f"num_replicas is {num_replicas}; allowed: at least the number of logical experts, {loads.shape[1]}, at most {MAX_PHYSICAL}"
        )
    if num_replicas < num_gpus:
        raise ConfigError(f"num_gpus is {num_gpus}; allowed: at most the number of replicas, {num_replicas}")
    return loads


def _maps(physical: _Integers, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """physical [L, R]."""
    count = np.stack([np.bincount(each, minlength=num_experts) for each in physical])
    logical = np.full((*count.shape, count.max()), -1)
    for layer, each in enumerate(physical):
        order = each.argsort(kind="stable")
        rank = np.arange(len(each)) - (count[layer].cumsum() - count[layer])[each[order]]
        logical[layer, each[order], rank] = order
    return torch.from_numpy(physical.astype(np.int64)), torch.from_numpy(logical.astype(np.int64)), torch.from_numpy(count.astype(np.int64))
