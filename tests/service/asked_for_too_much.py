"""A program of its own, which may take little memory: a service that is asked for what cannot be. Prints what it says, as JSON by case."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moeserve import load_config
from moeserve.client import AdminClient
from moeserve.errors import MoEServeError
from moeserve.experts import ExpertShard
from tests.support.harness import ServiceHarness
from tests.support.planning import planner_of

LAYER = {"hidden_size": 8, "intermediate_size": 8, "num_experts": 4}
MORE_BYTES = 2**30
LARGE = (10**7, 2**32 - 1, 2**63, 10**30)


def planned(layer: Mapping[str, Any], placement: Mapping[str, Any]) -> None:
    config = load_config({"layers": [{**LAYER, **layer}], "placement": placement})
    planner_of(config).first_num_hosts()


def stored(folder: Path, changes: Mapping[str, Any], tiny: Path) -> None:
    written = json.loads((tiny / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | dict(changes)))
    config = load_config({"model": {"checkpoint": folder}, "placement": {"memory_per_host_bytes": 2**59}, "ray": {"address": "auto"}})
    planner = planner_of(config)
    planner.first_num_hosts()
    (layer, *_) = planner.layers.sources
    layer.router()
    layer.experts([ExpertShard(0)])


def answer(ask: Callable[[], object]) -> str:
    try:
        ask()
    except MoEServeError as error:
        return f"{type(error).__name__}: {error}"
    except MemoryError:
        return "MemoryError"
    return "done"


def main(tiny: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors").symlink_to(tiny / "model.safetensors")
        (folder / "admin").write_text("of-the-administrator")
        server = {"port": 0, "admin_token_file": folder / "admin"}
        with ServiceHarness({"layers": [LAYER], "server": server}, "local", folder) as service:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MORE_BYTES,) * 2)
            print(json.dumps(answers(folder / "model", tiny, service)))


def answers(folder: Path, tiny: Path, service: ServiceHarness) -> dict[str, str]:
    said = {}
    for number in LARGE:
        for key in ("num_hosts", "copies", "tensor_parallel", "pipeline_stages"):
            said[f"{key} = {number}"] = answer(lambda key=key, number=number: planned({}, {key: number}))
        said[f"copies on as many hosts, {number}"] = answer(lambda number=number: planned({}, {"num_hosts": number, "copies": number}))
        said[f"copies one by one, {number}"] = answer(lambda number=number: planned({}, {"experts_per_host": 1, "copies": number}))
        for key in ("num_experts", "identity_experts"):
            said[f"{key} = {number}"] = answer(lambda key=key, number=number: planned({key: number}, {}))
        for key in ("hidden_size", "intermediate_size", "num_local_experts", "num_experts_per_tok", "num_hidden_layers"):
            said[f"config.json: {key} = {number}"] = answer(lambda key=key, number=number: stored(folder, {key: number}, tiny))
        with AdminClient(service.target, "of-the-administrator") as admin:
            said[f"scale to {number}"] = answer(lambda admin=admin, number=number: admin.scale(number))
            said[f"swap expert {number}"] = answer(lambda admin=admin, number=number: admin.swap("layers.0", folder, [number]))
    said["as many copies as hosts can be"] = answer(lambda: planned({"num_experts": 65536}, {"num_hosts": 65536, "copies": 65536}))
    return said


if __name__ == "__main__":
    main(Path(sys.argv[1]))
