"""`moeserve simulate`: say what would happen on a cluster that is not there: balance, moves, losses, speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from moeserve.cli.arguments import check, check_seed
from moeserve.cli.signals import preparing
from moeserve.config import MAX_EXPERTS, MAX_HOSTS, MAX_LAYERS, MAX_PHYSICAL, ServiceConfig, load_config
from moeserve.errors import ConfigError, number_of

if TYPE_CHECKING:
    from moeserve.bench.costs import Costs
    from moeserve.simulate import Forecast, WhatIf, Workload

_MODEL: Final = {"layers": 58, "experts": 256, "top_k": 8}
_HOSTS: Final = 32
_MOST: Final = {
    "layers": MAX_LAYERS,
    "experts": MAX_EXPERTS,
    "top_k": MAX_EXPERTS,
    "hosts": MAX_HOSTS,
    "nodes": MAX_HOSTS,
    "tokens": 1_000_000,
    "concurrency": 4096,
    "frontends": 1024,
    "cores": 4096,
}
_MOST_CALLERS, _MOST_PAIRS = 2**14, 2**22
#: one frontend for so many hosts, and at most so many, if nobody says how many
_HOSTS_OF_A_FRONTEND, _MOST_FRONTENDS = 8, 64


def simulate(
    source: Annotated[str | None, typer.Argument(help="A TOML configuration or a checkpoint folder: layers, placement, balancing.")] = None,
    layers: Annotated[int | None, typer.Option(help="Without SOURCE: MoE layers.", show_default="58")] = None,
    experts: Annotated[int | None, typer.Option(help="Without SOURCE: experts of a layer.", show_default="256")] = None,
    top_k: Annotated[int | None, typer.Option(help="Without SOURCE: experts that a token chooses.", show_default="8")] = None,
    hosts: Annotated[int | None, typer.Option(help="Hosts.", show_default="as SOURCE says, else 32")] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes that share the hosts evenly.", show_default="one for each host")] = None,
    extra_copies: Annotated[float | None, typer.Option(help="As balancing.extra_copies: 0.25 = a quarter more.")] = None,
    load: Annotated[str, typer.Option(help="zipf:S, lognormal:S, or a file that bench --record has written.")] = "zipf:1",
    fail: Annotated[int, typer.Option(help="Lose this many random hosts; with --nodes, this many nodes.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the load, the choices of tokens and what fails.")] = 0,
    tokens: Annotated[int, typer.Option(help="Tokens of a request.")] = 64,
    concurrency: Annotated[int, typer.Option(help="Requests in progress at any time, at each frontend.")] = 8,
    frontends: Annotated[int | None, typer.Option(help="Frontends.", show_default="one for 8 hosts, at most 64")] = None,
    cores: Annotated[
        int | None, typer.Option(help="Cores of each node, for all on it.", show_default="one for each host and frontend")
    ] = None,
    costs: Annotated[Path | None, typer.Option(help="What bench --costs has measured.", show_default="two cores of a server")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the loads of the hosts and the latencies to this PNG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Play a load to the planner and to balancing on an imagined cluster, and simulate callers on what comes of it.

    It computes with the costs of one machine: compare clusters by it, and measure with `moeserve bench` before you promise anything.
    """
    numbers = {"layers": layers, "experts": experts, "top_k": top_k, "hosts": hosts, "nodes": nodes, "tokens": tokens}
    _check_numbers({**numbers, "concurrency": concurrency, "frontends": frontends, "cores": cores})
    check_seed(seed)
    with preparing():
        from moeserve.bench.costs import REFERENCE, read_costs
        from moeserve.simulate import SimulatedCluster, WhatIf, Workload, load_of, simulated

    cost = REFERENCE if costs is None else read_costs(costs)
    config = _config(source, {"layers": layers, "experts": experts, "top_k": top_k}, extra_copies, cost)
    num_hosts = _num_hosts(config, source, hosts)
    cluster = SimulatedCluster.of(config, num_hosts, nodes)
    specs = cluster.planner.layers.specs
    frontends = frontends or min(_MOST_FRONTENDS, -(-num_hosts // _HOSTS_OF_A_FRONTEND))
    workload = Workload(tokens, concurrency, frontends, config.batching.max_batch_tokens)
    _check_workload(workload, max(spec.gating.top_k for spec in specs))
    what_if = WhatIf(workload, cost, cores, fail, seed)
    _show(simulated(cluster, load_of(load, specs, seed), what_if), what_if, as_json, plot)


def _config(source: str | None, model: dict[str, int | None], extra_copies: float | None, costs: Costs) -> ServiceConfig:
    """That of SOURCE, or of a model with experts as large as those of the costs."""
    balancing = {} if extra_copies is None else {"balancing": {"extra_copies": extra_copies}}
    if source is not None:
        given = [name for name, value in model.items() if value is not None]
        check(not given, f"--{given[0].replace('_', '-') if given else ''} has no meaning with SOURCE, which says what the layers are")
        return load_config(source, balancing)
    sizes = {name: model[name] or default for name, default in _MODEL.items()}
    check(sizes["top_k"] <= sizes["experts"], f"--top-k is {sizes['top_k']}; allowed: 1 to --experts, {sizes['experts']}")
    number = sizes["layers"] * sizes["experts"]
    check(number <= MAX_PHYSICAL, f"--layers and --experts make {number} experts; allowed: at most {MAX_PHYSICAL}")
    layer = {
        "hidden_size": costs.hidden_size,
        "intermediate_size": costs.intermediate_size,
        "num_experts": sizes["experts"],
        "gating": {"top_k": sizes["top_k"]},
    }
    return load_config({"layers": [layer] * sizes["layers"], **balancing})


def _num_hosts(config: ServiceConfig, source: str | None, hosts: int | None) -> int:
    if hosts is not None:
        return hosts
    if source is None:
        return _HOSTS
    number = config.placement.num_hosts
    if number == "all":
        raise ConfigError("placement.num_hosts is 'all', which the nodes of a cluster decide: give --hosts")
    return number


def _show(forecast: Forecast, what_if: WhatIf, as_json: bool, plot: Path | None) -> None:
    if plot is not None:
        from moeserve.simulate.plot import draw

        draw(forecast, plot)
    if as_json:
        print(json.dumps(forecast.as_json()))
    else:
        print(_sentences(forecast, what_if))


def _sentences(forecast: Forecast, what_if: WhatIf) -> str:
    now, load = forecast.now, what_if.workload
    told = [
        f"Balancedness of {number_of(len(now.cluster.state.assignments), 'host')}: {forecast.balancedness:.3f}; "
        f"with one copy of each expert, as dealt, {forecast.balancedness_before:.3f}."
    ]
    what = f"{now.moves} experts move, {now.new} copies are added"
    if forecast.lost_experts is None:
        told.append(f"Balancing: {what}, {now.moved_bytes / 2**30:.1f} GiB are read; a plan takes {now.plan_seconds:.2f} s.")
    else:
        told.append(
            f"After the loss, {forecast.lost_experts} experts have no live copy; {what}, {now.moved_bytes / 2**30:.1f} GiB are read; "
            f"a plan takes {now.plan_seconds:.2f} s."
        )
    frontends = number_of(load.frontends, "frontend")
    told.append(
        f"{frontends} with {load.concurrency} requests of {load.tokens} tokens in progress at each: "
        f"{forecast.calls.tokens_per_s:,.0f} tokens/s of one layer, p99 {forecast.calls.p99_ms:.1f} ms."
    )
    return "\n".join(told)


def _check_numbers(numbers: dict[str, Any]) -> None:
    for name, value in numbers.items():
        flag = "--" + name.replace("_", "-")
        check(value is None or 1 <= value <= _MOST[name], f"{flag} is {value}; allowed: 1 to {_MOST[name]}")


def _check_workload(workload: Workload, top_k: int) -> None:
    """Checked before anything is as large as that."""
    callers, tokens = workload.concurrency * workload.frontends, workload.tokens
    pairs = top_k * max(tokens, min(workload.max_batch_tokens, workload.concurrency * tokens))
    check(callers <= _MOST_CALLERS, f"--concurrency at each of --frontends makes {callers} requests; allowed: at most {_MOST_CALLERS}")
    check(pairs <= _MOST_PAIRS, f"--tokens is {tokens}, with {pairs} rows of experts in a batch; allowed: at most {_MOST_PAIRS}")
