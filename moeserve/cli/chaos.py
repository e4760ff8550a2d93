"""`moeserve chaos`: start a service, load it, break its hosts on a schedule, and say what callers noticed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from moeserve.cli.arguments import check, check_seed
from moeserve.cli.flags import Overrides, with_config_flags
from moeserve.cli.serving import prepare_process, tell_start
from moeserve.cli.signals import preparing, until_signal
from moeserve.config import ServiceConfig, load_config

if TYPE_CHECKING:
    from moeserve.bench.chaos import ChaosPlan
    from moeserve.bench.chaos_findings import Findings

_HOSTS: Final = 4
_COPIES: Final = 2
#: nobody but its own clients calls this service
_SERVER: Final[Mapping[str, Any]] = {
    "host": "127.0.0.1",
    "port": 0,
    "metrics_port": 0,
    **dict.fromkeys(("health_port", "tls_cert", "tls_key", "client_ca", "auth_token_file", "admin_token_file")),
}
_DAY_S: Final = 86_400.0
_MOST_CLIENTS: Final = 1024
_TABLES: Final = ("model", "placement", "batching", "communication", "resilience", "cluster", "ray")


@with_config_flags(_TABLES, without={"address"})
def chaos(
    source: Annotated[str, typer.Argument(help="A TOML configuration or a checkpoint folder.")],
    overrides: Overrides,
    hosts: Annotated[int | None, typer.Option(help="As --num-hosts.", show_default="as SOURCE says, else 4, and 2 copies")] = None,
    faults: Annotated[str, typer.Option(help="Kinds of faults: any of kill, stop, slow, nan, leave.")] = "kill,stop,slow,nan,leave",
    every_s: Annotated[float, typer.Option(help="Seconds from one fault to the next.")] = 5.0,
    for_s: Annotated[float, typer.Option(help="Seconds in which faults begin; longer if a kind has not come by then.")] = 60.0,
    clients: Annotated[int, typer.Option(help="Callers, each with one request at a time.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the faults, their victims and the requests.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> int:
    """Start a service of its own, load it, break its hosts on a schedule, and say what callers noticed.

    Exit code 1: a call failed, an answer was wrong, or a host did not come back.
    """
    tell_start(f"reading {source}")
    if hosts is not None:
        overrides.setdefault("placement", {})["num_hosts"] = hosts
    config = _config(source, overrides)
    with preparing():
        from moeserve.bench.chaos_view import print_findings
        from moeserve.bench.report import print_json

    plan = _plan(config, faults, (every_s, for_s), clients, seed)
    prepare_process()
    with redirect_stdout(sys.stderr):  # Ray prints there what it says of the processes that end
        findings = asyncio.run(until_signal(_run(config, plan)))
    (print_json if as_json else print_findings)(findings.as_json())
    return 0 if findings.is_well else 1


async def _run(config: ServiceConfig, plan: ChaosPlan) -> Findings:
    from moeserve.bench.chaos import run
    from moeserve.bench.chaos_view import progress

    with progress(plan.total_s) as (tell, watch):
        return await run(config, plan, tell, watch)


def _config(source: str, overrides: Overrides) -> ServiceConfig:
    """As SOURCE says, but for its own clients only, with hosts that can be spared, and always as many."""
    overrides.update(server=dict(_SERVER), controller={"frontend_token_file": None}, autoscaling={"enabled": False})
    config = load_config(source, overrides)
    check(config.ray.address is None, f"ray.address is {config.ray.address!r}; allowed: unset, to break hosts of this machine only")
    given = config.placement.model_fields_set
    if not given & {"num_hosts", "experts_per_host"}:
        placement = overrides.setdefault("placement", {})
        placement.update({"num_hosts": _HOSTS} | ({} if "copies" in given else {"copies": _COPIES}))
        config = load_config(source, overrides)
    return config


def _plan(config: ServiceConfig, faults: str, times_s: tuple[float, float], clients: int, seed: int) -> ChaosPlan:
    from moeserve.bench.chaos import ChaosPlan
    from moeserve.bench.chaos_schedule import FAULT_KINDS

    every_s, for_s = times_s
    kinds = [kind for kind in FAULT_KINDS if kind in faults.split(",")]
    unknown = set(faults.split(",")) - set(kinds)
    check(not unknown, f"--faults has {', '.join(map(repr, sorted(unknown)))}; allowed: {', '.join(FAULT_KINDS)}")
    check(0.1 <= every_s <= _DAY_S, f"--every-s is {every_s:g}; allowed: 0.1 to {_DAY_S:g}")
    check(0 < for_s <= _DAY_S, f"--for-s is {for_s:g}; allowed: more than 0, at most {_DAY_S:g}")
    check_seed(seed)
    check(1 <= clients <= _MOST_CLIENTS, f"--clients is {clients}; allowed: 1 to {_MOST_CLIENTS}")
    hosts, copies = config.placement.num_hosts, config.placement.copies
    if "leave" in kinds and isinstance(hosts, int) and isinstance(copies, int):
        check(hosts > copies, f"--faults has leave, and {hosts} hosts have {copies} copies; allowed: more hosts than copies")
    return ChaosPlan(kinds, every_s, for_s, clients, seed)
