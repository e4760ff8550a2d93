"""How few hosts can hold a model's experts, and how many can have something to hold."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from moeserve.checkpoints import LayerSource, host_bytes
from moeserve.config import ServiceConfig
from moeserve.errors import ConfigError
from moeserve.placement import Placement, plan_placement


def plan_for(num_hosts: int, sources: Sequence[LayerSource], config: ServiceConfig, epoch: int = 1) -> Placement:
    """The placement on so many hosts, whatever placement.num_hosts says. Raises ConfigError when there is none."""
    placing = config.placement.model_copy(update={"num_hosts": num_hosts, "experts_per_host": None})
    return plan_placement([source.spec for source in sources], placing, epoch)


def host_limits(sources: Sequence[LayerSource], config: ServiceConfig) -> tuple[int, int]:
    """The least number of hosts that hold every expert, each within placement.memory_per_host_bytes and placement.experts_per_host, and
    the largest at which none is left without experts.

    Raises ConfigError when no number does.
    """
    candidates = range(1, _upper_bound(sources, config) + 1)
    most = bisect_left(candidates, True, key=lambda number: _is_too_many(number, sources, config))
    for number in range(1, most + 1):
        if _holds(number, sources, config):
            return number, most
    plan_for(most, sources, config)
    raise ConfigError(
        f"no number of hosts holds these experts: with {most}, which is the most that all have some of them, a host would still hold more "
        "than placement.memory_per_host_bytes or placement.experts_per_host allows"
    )


def _upper_bound(sources: Sequence[LayerSource], config: ServiceConfig) -> int:
    """More hosts than this cannot all have a physical expert of some layer, even with every layer in a stage of its own."""
    placing = config.placement
    widest = max(source.spec.num_hosted_experts for source in sources) * placing.tensor_parallel
    return widest * _most_copies(config) * placing.pipeline_stages


def _most_copies(config: ServiceConfig) -> int:
    copies = config.placement.copies
    if isinstance(copies, int):
        return copies
    return max(max(one.values()) if isinstance(one, dict) else one for one in copies.values())


def _is_too_many(num_hosts: int, sources: Sequence[LayerSource], config: ServiceConfig) -> bool:
    try:
        plan_for(num_hosts, sources, config)
    except ConfigError:
        return num_hosts > _at_least(config)
    return False


def _at_least(config: ServiceConfig) -> int:
    placing = config.placement
    return max(_most_copies(config), placing.tensor_parallel) * placing.pipeline_stages


def _holds(num_hosts: int, sources: Sequence[LayerSource], config: ServiceConfig) -> bool:
    try:
        placement = plan_for(num_hosts, sources, config)
    except ConfigError:
        return False
    bytes_limit, experts_limit = config.placement.memory_per_host_bytes, config.placement.experts_per_host
    if bytes_limit is not None and max(host_bytes(sources, placement)) > bytes_limit:
        return False
    return experts_limit is None or all(
        len(layer.shards_on(host)) <= experts_limit for layer in placement.layers for host in placement.hosts
    )
