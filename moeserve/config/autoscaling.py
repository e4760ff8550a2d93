"""How the number of hosts follows the load."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from moeserve.config.table import Table
from moeserve.config.values import Hosts, NumHosts, Seconds

Period = Annotated[Seconds, Field(gt=0)]


class AutoscalingConfig(Table):
    """[autoscaling]: more hosts while they are busy, fewer while they are idle."""

    enabled: bool = False
    min_hosts: Hosts = 1
    #: unset = as many as can hold an expert each
    max_hosts: Hosts | None = None
    #: the share of its time that a host should spend in passes
    target_busy: float = Field(default=0.7, gt=0, lt=1)
    #: for so long the load must need more hosts, or fewer, before there are
    scale_up_after_s: Period = 15.0
    scale_down_after_s: Period = 300.0

    @model_validator(mode="after")
    def _has_a_number(self) -> Self:
        if self.max_hosts is not None and self.min_hosts > self.max_hosts:
            raise ValueError(f"autoscaling.min_hosts is {self.min_hosts}; allowed: at most autoscaling.max_hosts = {self.max_hosts}")
        return self

    def refusal(self, num_hosts: NumHosts) -> str | None:
        """Why nobody may ask for so many hosts; None = they may."""
        if not self.enabled:
            return None
        allowed = f"{self.min_hosts} or more" if self.max_hosts is None else f"{self.min_hosts}..{self.max_hosts}"
        if num_hosts == "all":
            return f"placement.num_hosts is 'all', but autoscaling.enabled is true and decides the number; allowed: {allowed}, to begin"
        if num_hosts < self.min_hosts or (self.max_hosts is not None and num_hosts > self.max_hosts):
            return f"placement.num_hosts is {num_hosts}; allowed while autoscaling.enabled is true: {allowed}"
        return None
