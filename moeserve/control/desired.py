"""What [placement] asks of the nodes, with how few and how many hosts the experts can be served."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from moeserve.checkpoints import LayerSource, check_memory, host_bytes, memory_bytes
from moeserve.config import ServiceConfig
from moeserve.control.assignments import Wanted
from moeserve.control.state import NumHosts
from moeserve.errors import ConfigError
from moeserve.placement import Placement, fewest_hosts, most_hosts, plan_placement


def plan_for(num_hosts: int, sources: Sequence[LayerSource], config: ServiceConfig) -> Placement:
    """The placement on so many hosts, whatever [placement] says of their number. Raises ConfigError when there is none, or no memory."""
    placing = config.placement.model_copy(update={"num_hosts": num_hosts, "experts_per_host": None})
    placement = plan_placement([source.spec for source in sources], placing)
    check_memory(host_bytes(sources, placement), config, memory_bytes())
    return placement


def first_num_hosts(config: ServiceConfig, sources: Sequence[LayerSource]) -> NumHosts:
    """placement.num_hosts, or as many as placement.experts_per_host takes. Raises ConfigError when so many cannot share the experts."""
    if config.placement.num_hosts == "all":
        return "all"
    placement = plan_placement([source.spec for source in sources], config.placement)
    check_memory(host_bytes(sources, placement), config, memory_bytes())
    return placement.num_hosts


def wanted_hosts(num_hosts: NumHosts, sources: Sequence[LayerSource], config: ServiceConfig) -> Wanted:
    """What `num_hosts` of them ask of the nodes. Raises ConfigError when so many, or any number, cannot share the experts."""
    placing, specs = config.placement, [source.spec for source in sources]
    fewest = fewest_hosts(specs, placing)
    if num_hosts == "all":  # the search takes seconds for the largest models, and nobody else needs it
        upper = most = most_hosts(specs, placing)
        if fewest > most:
            plan_placement(specs, placing.model_copy(update={"num_hosts": fewest, "experts_per_host": None}))  # says why not
            raise ConfigError(f"placement needs {fewest} hosts, of which some would hold no expert; allowed: at most {most}")
    else:
        plan_for(num_hosts, sources, config)
        upper, most = max(fewest, num_hosts), None
    return Wanted(
        num_hosts=num_hosts,
        cpus=placing.cpus_per_host,
        gpus=placing.gpus_per_host,
        labels=placing.node_labels,
        strategy=placing.node_strategy,
        least=_least(config, sources, fewest, upper),
        most=most,
    )


def _least(config: ServiceConfig, sources: Sequence[LayerSource], fewest: int, most: int) -> int:
    """How many hosts it takes so that each has room for its weights."""
    if config.placement.memory_per_host_bytes is None:
        return fewest
    largest = max(_bytes(config, sources, most))
    if largest > config.placement.memory_per_host_bytes:
        check_memory([largest], config, memory_bytes())
    numbers = range(fewest, most + 1)
    limit = config.placement.memory_per_host_bytes
    return numbers[bisect_left(numbers, True, key=lambda number: max(_bytes(config, sources, number)) <= limit)]


def _bytes(config: ServiceConfig, sources: Sequence[LayerSource], num_hosts: int) -> list[int]:
    placing = config.placement.model_copy(update={"num_hosts": num_hosts, "experts_per_host": None})
    return host_bytes(sources, plan_placement([source.spec for source in sources], placing))
