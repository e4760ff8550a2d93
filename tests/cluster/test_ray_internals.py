"""Ray's private parts do what `ray_internals` needs of them. A new Ray that fails here stays above the upper bound in pyproject.toml."""

from __future__ import annotations

import re
import socket
import time
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from inspect import getmembers, isclass, isfunction
from pathlib import Path
from typing import Any

import pytest
import ray
from packaging.requirements import Requirement
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moeserve.cluster import ray_internals as internals
from moeserve.cluster.ray_where import this_node
from tests.support.ray_service import processes
from tests.support.waiting import until

ROOM = Path(internals.__file__).parent
USERS = [path for path in sorted(ROOM.glob("ray_*.py")) if path.name != "ray_internals.py"]
PYPROJECT = ROOM.parents[1] / "pyproject.toml"
GROUP = "a-group-of-these-tests"
KEY = b"moeserve:a-key-of-these-tests"

#: what each needs, as far as it can be told without a Ray that runs
PARTS = [
    ("find_actor", internals.state.GlobalState, "_connect_and_get_accessor"),
    ("find_actor", internals.state.GlobalStateAccessor, "get_actor_info"),
    ("find_actor", internals.ActorTableData(), "ALIVE address pid num_restarts previous_incarnations"),
    ("exit_detail", internals.state.GlobalStateAccessor, "get_worker_info"),
    ("exit_detail", internals.WorkerTableData(), "is_alive exit_detail"),
    ("draining_nodes", internals.state.GlobalState, "get_draining_nodes"),
    ("available_resources", internals.state, "available_resources_per_node"),
    ("total_resources", internals.state, "total_resources_per_node"),
    ("log_dir", internals.worker, "_global_node"),
    ("log_dir", internals.Node, "get_logs_dir_path"),
    ("session_dir", internals.Node, "get_session_dir_path"),
    ("allow_clusters", internals.ray_constants, "ENABLE_RAY_CLUSTER"),
    ("prestart_worker", internals.PrestartWorkersRequest(), "language num_workers"),
    ("forget_cached_token", internals.Config, "initialize"),
    ("forget_cached_token", internals.AuthenticationTokenLoader, "instance reset_cache"),
    ("canonical_address", internals.services, "canonicalize_bootstrap_address_or_die"),
    ("is_cluster", internals.ray_constants, "GLOBAL_GRPC_OPTIONS"),
    ("nodes_here", internals.services, "find_node_ids"),
    ("ClusterFromOutside", internals.GcsClientOptions, "create"),
    ("ClusterFromOutside", internals.state.GlobalState, "_initialize_global_state node_table placement_group_table"),
    ("ClusterFromOutside", internals.state.GlobalState, "get_placement_group_by_name"),
]

Check = Callable[[Any], None]
CHECKS: dict[str, Check] = {}


def check_of(part: Callable[..., Any]) -> Callable[[Check], Check]:
    return lambda check: CHECKS.setdefault(part.__name__, check)


def blame(name: str) -> str:
    users = [path.name for path in USERS if re.search(rf"\b{name}\(", path.read_text())]
    return f"Ray {ray.__version__} has changed what ray_internals.{name} needs, which is used in {', '.join(users)}"


@ray.remote(num_cpus=0.25)
class Probe:
    def end(self) -> None:
        raise SystemExit(3)


@pytest.fixture(scope="module")
def probe(local_ray: None) -> Iterator[Any]:
    """An actor on a placement group of its own, as hosts are."""
    group = ray.util.placement_group([{"CPU": 0.25}], name=GROUP)
    actor = Probe.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0)).remote()
    ray.get(actor.__ray_ready__.remote())
    yield actor
    ray.kill(actor)
    ray.util.remove_placement_group(group)


def record_of(actor: Any) -> internals.ActorRecord:
    found = internals.find_actor(internals.actor_id(actor))
    assert found is not None, "it is not found"
    return found


@check_of(internals.actor_id)
def _(probe: Any) -> None:
    assert isinstance(internals.actor_id(probe), ray.ActorID)


@check_of(internals.find_actor)
def _(probe: Any) -> None:
    found = record_of(probe)
    assert (found.node_id, found.restarts, found.is_alive, len(found.worker_ids)) == (this_node(), 0, True, 1)
    assert b"Probe" in Path(f"/proc/{found.pid}/cmdline").read_bytes()
    assert internals.find_actor(ray.ActorID(b"\1" * 16)) is None


@check_of(internals.exit_detail)
def _(probe: Any) -> None:
    actor = Probe.options(num_cpus=0).remote()
    ray.get(actor.__ray_ready__.remote())
    (worker_id,) = record_of(actor).worker_ids
    assert internals.exit_detail(worker_id) == "", "it lives"
    actor.end.remote()
    assert "exit" in until(lambda: internals.exit_detail(worker_id)).lower()


@check_of(internals.draining_nodes)
def _(probe: Any) -> None:
    assert internals.draining_nodes() == set()


@check_of(internals.available_resources)
def _(probe: Any) -> None:
    until(lambda: 0 <= internals.available_resources()[this_node()]["CPU"] <= 7.75)  # nodes tell of it now and then


@check_of(internals.total_resources)
def _(probe: Any) -> None:
    group = f"CPU_group_{ray.util.get_placement_group(GROUP).id.hex()}"
    total = until(lambda: (found := internals.total_resources()[this_node()]).keys() >= {group} and found)
    assert (total["CPU"], total["GPU"], total[group]) == (8, 8, 0.25), "with what a placement group has"


@check_of(internals.log_dir)
def _(probe: Any) -> None:
    folder, (worker_id,) = internals.log_dir(), record_of(probe).worker_ids
    assert folder is not None and list(folder.glob(f"worker-{worker_id.hex()}-*.err"))


@check_of(internals.session_dir)
def _(probe: Any) -> None:
    folder = internals.session_dir()
    assert folder is not None and (folder / "sockets").is_dir()


@check_of(internals.started_processes)
def _(probe: Any) -> None:
    started = internals.started_processes()
    for kind in (internals.GCS, internals.RAYLET):
        assert [process.poll() for process in started[kind]] == [None], kind


@check_of(internals.take_processes)
def _(probe: Any) -> None:
    started, in_ray = internals.started_processes(), internals.worker._global_node.all_processes
    kept = dict(in_ray)
    try:
        taken = internals.take_processes()
        assert internals.started_processes() == {}
    finally:
        in_ray.update(kept)
    assert taken[:1] == started[internals.RAYLET]
    assert {process.pid for process in taken} == {process.pid for processes in started.values() for process in processes}


@check_of(internals.allow_clusters)
def _(probe: Any) -> None:
    assert internals.allow_clusters(False) is False, "this Ray was started so"
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    assert host == "127.0.0.1"
    with socket.socket() as elsewhere, pytest.raises(ConnectionRefusedError):
        elsewhere.connect(("127.0.0.2", int(port)))


@check_of(internals.forget_cached_token)
def _(probe: Any) -> None:
    assert internals.AuthenticationTokenLoader.instance().has_token(), "this Ray was started with one"


@check_of(internals.prestart_worker)
def _(probe: Any) -> None:
    def idle() -> set[int]:
        return set(processes().get("ray::IDLE", []))

    known = idle()
    internals.prestart_worker(this_node())
    until(lambda: idle() - known)
    internals.prestart_worker("ab" * 28)


@check_of(internals.kv_get)
def _(probe: Any) -> None:
    assert internals.kv_get(KEY + b":nothing") is None


@check_of(internals.kv_put)
def _(probe: Any) -> None:
    for value in (b"first", b"second"):
        internals.kv_put(KEY, value)
        assert internals.kv_get(KEY) == value


@check_of(internals.kv_delete)
def _(probe: Any) -> None:
    internals.kv_put(KEY, b"value")
    internals.kv_delete(KEY)
    assert internals.kv_get(KEY) is None


@check_of(internals.canonical_address)
def _(probe: Any) -> None:
    address = ray.get_runtime_context().gcs_address
    assert internals.canonical_address(address) == address


@check_of(internals.is_cluster)
def _(probe: Any) -> None:
    assert internals.is_cluster(ray.get_runtime_context().gcs_address, 30)


@check_of(internals.nodes_here)
def _(probe: Any) -> None:
    assert this_node() in internals.nodes_here()


@check_of(internals.ClusterFromOutside)
def _(probe: Any) -> None:
    outside, group_id = internals.ClusterFromOutside(ray.get_runtime_context().gcs_address), ray.util.get_placement_group(GROUP).id.hex()
    assert outside.live_nodes() == {this_node()}
    assert outside.group_of(GROUP, "elsewhere") is None
    group = outside.placement_groups()[group_id]
    assert (group["name"], group["state"], group["bundles_to_node_id"]) == (GROUP, "CREATED", {0: this_node()})
    nobody = "ab" * 28
    assert outside.drain(nobody, "a test", time.time() + 60) == (True, "")


def test_each_private_part_has_a_check() -> None:
    own = {name: member for name, member in getmembers(internals) if getattr(member, "__module__", "") == internals.__name__}
    assert {name for name, member in own.items() if isfunction(member) or isclass(member)} - {"ActorRecord"} == CHECKS.keys()


def test_ray_still_has_what_is_needed_of_it() -> None:
    missing = [
        f"{getattr(owner, '__name__', type(owner).__name__)}.{attribute} is gone: {blame(name)}"
        for name, owner, attributes in PARTS
        for attribute in attributes.split()
        if not hasattr(owner, attribute)
    ]
    assert not missing, "\n".join(missing)


@pytest.mark.ray
@pytest.mark.parametrize("name", CHECKS)
def test_ray_still_does_what_is_needed_of_it(name: str, probe: Any) -> None:
    try:
        CHECKS[name](probe)
    except Exception as error:
        raise AssertionError(f"{blame(name)}: {type(error).__name__}: {error}") from error


def test_the_installed_ray_is_one_that_was_tried() -> None:
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    requirements = [Requirement(line) for line in extras["serve"]]
    (allowed,) = [each.specifier for each in requirements if each.name == "ray"]
    assert any(each.operator == "<" for each in allowed), "Ray has an upper bound"
    assert allowed.contains(version("ray")), f"Ray {version('ray')} is installed; allowed: {allowed}. Does this file pass with it?"
