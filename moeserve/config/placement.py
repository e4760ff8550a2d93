"""How many hosts there are, on which nodes, and where the experts are."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moeserve.config.table import Table
from moeserve.config.values import MAX_HOSTS, Bytes, Copies, CopyChoice, Experts, Hosts, NumHosts, Seconds, Strategy


class PlacementConfig(Table):
    """[placement]: the number of hosts, and the resources of each."""

    #: "all" = as many as the nodes of the cluster have room for, followed as nodes come and go; where experts_per_host is given, unset = as
    #: many as it takes
    num_hosts: NumHosts = 1
    #: physical experts of a layer that one host holds at most
    experts_per_host: Experts | None = None
    #: a fraction of one GPU, or whole GPUs
    gpus_per_host: float = Field(default=0, ge=0, le=MAX_HOSTS)
    cpus_per_host: float = Field(default=1, ge=0, le=MAX_HOSTS)
    #: hosts run only on nodes with these Ray labels
    node_labels: dict[str, str] = Field(default_factory=dict)
    #: how hosts share the nodes: evenly, as few nodes as possible, or evenly and at most one on each
    node_strategy: Literal["spread", "pack", "strict_spread"] = "spread"
    #: how long to wait for missing nodes, after a request to the cluster's autoscaler; 0 = refuse at once
    wait_for_nodes_s: Seconds = 0
    #: a change is withdrawn when the hosts that load for it have not read one more expert for so long, or what describes a checkpoint is
    #: not read within it
    load_timeout_s: Annotated[Seconds, Field(gt=0)] = 120.0
    #: most bytes of weights; unset = not checked, except against the memory of this machine
    memory_per_host_bytes: Bytes | None = None
    #: copies of every expert, on different hosts; or by layer name; or by layer name and expert; "default" = all others
    copies: Copies = 1
    #: how many hosts share each expert, split along its intermediate dimension
    tensor_parallel: Hosts = 1
    #: into how many disjoint groups the hosts are divided, each with its share of the layers
    pipeline_stages: Hosts = 1
    #: which experts share a host: neighbours in id, or dealt out in turn
    strategy: Strategy = "contiguous"
    #: the choice of an expert's copy: even out the hosts' work, or each in turn
    copy_choice: CopyChoice = "least_outstanding"

    @model_validator(mode="after")
    def _gpus_can_be_had(self) -> Self:
        if self.gpus_per_host > 1 and self.gpus_per_host % 1:
            raise ValueError(f"placement.gpus_per_host is {self.gpus_per_host:g}; allowed: a fraction of one GPU, or whole GPUs")
        return self
