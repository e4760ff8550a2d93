"""How few hosts can hold a model's experts, and how many can have something to hold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Final

from moeserve.checkpoints import LayerSource, host_bytes
from moeserve.config import ServiceConfig
from moeserve.errors import ConfigError
from moeserve.placement import Placement, plan_placement

#: beyond this nobody looks whether more hosts could share a model
_MOST_HOSTS: Final = 1024


def plan_for(num_hosts: int, sources: Sequence[LayerSource], config: ServiceConfig, epoch: int = 1) -> Placement:
    """The placement on so many hosts, whatever placement.num_hosts says. Raises ConfigError when there is none."""
    placing = config.placement.model_copy(update={"num_hosts": num_hosts, "experts_per_host": None})
    return plan_placement([source.spec for source in sources], placing, epoch)


def least_hosts(sources: Sequence[LayerSource], config: ServiceConfig) -> int:
    """The least number of hosts that hold every expert, each within placement.memory_per_host_bytes and placement.experts_per_host.

    Raises ConfigError when no number does.
    """
    for number in range(1, _upper_bound(sources, config) + 1):
        if _is_possible(number, sources, config) and _holds(number, sources, config):
            return number
    raise ConfigError(
        "these experts cannot be shared out: whatever the number of hosts, copies, shards and stages do not fit, or a host would hold "
        "more than placement.memory_per_host_bytes or placement.experts_per_host allows"
    )


def most_hosts(least: int, sources: Sequence[LayerSource], config: ServiceConfig) -> int:
    """Up to which number of hosts, from `least` on, none is left without experts."""
    numbers = range(least, _upper_bound(sources, config) + 1)
    return least - 1 + sum(1 for _ in takewhile(lambda number: _is_possible(number, sources, config), numbers))


def _upper_bound(sources: Sequence[LayerSource], config: ServiceConfig) -> int:
    """More hosts than this cannot all have a physical expert: there are not so many."""
    copies = config.placement.copies
    most_copies = copies if isinstance(copies, int) else max(max(one.values()) if isinstance(one, dict) else one for one in copies.values())
    physical = sum(source.spec.num_hosted_experts for source in sources) * config.placement.tensor_parallel * most_copies
    return min(physical, _MOST_HOSTS)


def _is_possible(num_hosts: int, sources: Sequence[LayerSource], config: ServiceConfig) -> bool:
    try:
        plan_for(num_hosts, sources, config)
    except ConfigError:
        return False
    return True


def _holds(num_hosts: int, sources: Sequence[LayerSource], config: ServiceConfig) -> bool:
    placement = plan_for(num_hosts, sources, config)
    bytes_limit, experts_limit = config.placement.memory_per_host_bytes, config.placement.experts_per_host
    if bytes_limit is not None and max(host_bytes(sources, placement)) > bytes_limit:
        return False
    return experts_limit is None or all(
        len(layer.shards_on(host)) <= experts_limit for layer in placement.layers for host in placement.hosts
    )
