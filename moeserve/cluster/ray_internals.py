"""All uses of Ray's private API, and nothing else: Ray may change any of it without notice.

Each function says why the public API is not enough. tests/cluster/test_ray_internals.py uses each against a real Ray, and says which one a
new Ray has changed; the newest that has passed is the upper bound in pyproject.toml.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import ray
from ray._private import ray_constants, services, state, worker
from ray._private.grpc_utils import init_grpc_channel
from ray._private.node import Node
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient, GcsClientOptions  # type: ignore[attr-defined]
from ray.actor import ActorHandle
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]
from ray.core.generated.common_pb2 import Language  # type: ignore[attr-defined]
from ray.core.generated.gcs_pb2 import ActorTableData, WorkerTableData  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest  # type: ignore[attr-defined]
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from moeserve.addresses import join
from moeserve.cluster.timing import SPARE_TIMEOUT_S
from moeserve.errors import ExpertUnavailable

GCS, RAYLET = "gcs_server", "raylet"
#: after these words, Ray lists guesses about the end of a process
_GUESSES: Final = "Some common causes"
#: of whatever is no Ray, or answers too late
_NO_RAY: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNIMPLEMENTED)


@dataclass(frozen=True)
class ActorRecord:
    """The node and process of an actor, how often Ray has restarted it, and the ids of its workers, the latest last."""

    node_id: str
    pid: int
    restarts: int
    is_alive: bool
    worker_ids: Sequence[bytes]


def actor_id(actor: ActorHandle[Any]) -> ray.ActorID:
    """Whose handle it is. Public: only the actor itself can tell, and one that hangs does not."""
    found: ray.ActorID = actor._actor_id
    return found


def find_actor(actor_id: ray.ActorID) -> ActorRecord | None:
    """Ray's record of an actor, None = nothing yet. Public: `ray.util.state` asks the dashboard, which a local Ray does not have."""
    found = state.state._connect_and_get_accessor().get_actor_info(actor_id)
    if found is None:
        return None
    table = ActorTableData.FromString(found)
    before = [one.worker_id for one in getattr(table, "previous_incarnations", ())]  # not every Ray has it
    workers = [one for one in (*before, table.address.worker_id) if one]
    return ActorRecord(table.address.node_id.hex(), table.pid, table.num_restarts, table.state == ActorTableData.ALIVE, workers)


def exit_detail(worker_id: bytes) -> str:
    """Why a worker's process has ended, without guesses; "" while it lives. Public: as for `find_actor`."""
    found = state.state._connect_and_get_accessor().get_worker_info(ray.WorkerID(worker_id))
    if found is None:
        return ""
    table = WorkerTableData.FromString(found)
    return "" if table.is_alive else str(table.exit_detail.partition(_GUESSES)[0])


def draining_nodes() -> set[str]:
    """Ids of the nodes that Ray is draining. Public: nothing; `ray.nodes()` calls them alive."""
    return set(state.state.get_draining_nodes())


def available_resources() -> dict[str, dict[str, float]]:
    """What is free, by node. Public: only the sum over all nodes."""
    return dict(state.available_resources_per_node())


def total_resources() -> dict[str, dict[str, float]]:
    """What each node has, placement groups' shares of it included. Public: `ray.nodes()` leaves these out."""
    return dict(state.total_resources_per_node())


def log_dir() -> Path | None:
    """Where Ray's processes on this node write (worker-*.err); None = not connected. Public: nothing."""
    return None if worker._global_node is None else Path(worker._global_node.get_logs_dir_path())


def session_dir() -> Path | None:
    """The folder of the Ray that this process is connected to; None = to none. Public: nothing."""
    return None if worker._global_node is None else Path(worker._global_node.get_session_dir_path())


def started_processes() -> dict[str, list[subprocess.Popen[bytes]]]:
    """The processes of Ray that this one has started, by kind (`GCS`, `RAYLET` ...). Public: nothing."""
    node: Node | None = worker._global_node
    return {} if node is None else {kind: [info.process for info in infos] for kind, infos in node.all_processes.items()}


def take_processes() -> list[subprocess.Popen[bytes]]:
    """The same, no longer ended by `ray.shutdown`; the raylet, which would replace others, first. Public: nothing."""
    started = started_processes()
    if worker._global_node is not None:
        worker._global_node.all_processes.clear()
    return [process for kind in sorted(started, key=RAYLET.__ne__) for process in started[kind]]


def allow_clusters(is_allowed: bool) -> bool:
    """Whether a Ray that this process starts listens on more than 127.0.0.1; returns what was so before.

    Public: an environment variable that only Windows and macOS are documented for; Ray reads it when it is imported.
    """
    before: bool = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = is_allowed
    return before


def forget_cached_token() -> None:
    """Have Ray read its settings and its token again. Public: nothing; it has cached the absence of a token when it was imported."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def prestart_worker(node: str) -> None:
    """Have the raylet of a node start an idle worker. Raises ExpertUnavailable.

    Public: nothing; a worker that has run a task never becomes that of an actor.
    """
    found = next((each for each in ray.nodes() if each["NodeID"] == node and each["Alive"]), None)
    if found is None:
        return
    address = join(found["NodeManagerAddress"], found["NodeManagerPort"])
    request = PrestartWorkersRequest(language=Language.PYTHON, num_workers=1)
    with init_grpc_channel(address) as channel:
        try:
            NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=SPARE_TIMEOUT_S)
        except grpc.RpcError as error:
            raise ExpertUnavailable(f"Ray on node {node} starts no worker ahead of time: {error}") from None


def kv_get(key: bytes) -> bytes | None:
    """A value that outlives actors, None = there is none. Public: nothing; a detached actor would be one more to lose."""
    value: bytes | None = _internal_kv_get(key)
    return value


def kv_put(key: bytes, value: bytes) -> None:
    """Keep a value, in place of what was there."""
    _internal_kv_put(key, value, overwrite=True)


def kv_delete(key: bytes) -> None:
    """Forget a value."""
    _internal_kv_del(key)


def canonical_address(address: str) -> str:
    """host:port of the Ray that `address` ("auto") means here. Raises ConnectionError. Public: only within `ray.init`."""
    return str(services.canonicalize_bootstrap_address_or_die(address))


def is_cluster(address: str, timeout_s: float) -> bool:
    """Whether a Ray cluster answers at host:port, be it that it asks for a token. Public: `ray.init` tries for ever."""
    with init_grpc_channel(address, ray_constants.GLOBAL_GRPC_OPTIONS) as channel:
        try:
            NodeInfoGcsServiceStub(channel).GetClusterId(GetClusterIdRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            return error.code() not in _NO_RAY
    return True


def nodes_here() -> set[str]:
    """Ids of the nodes whose raylets run on this machine. Public: only for a process that has joined."""
    return set(services.find_node_ids())


class ClusterFromOutside:
    """A cluster that this process does not join. Public: `ray.init` needs a raylet of this machine, which may be about to end."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._state = state.GlobalState()
        self._state._initialize_global_state(
            GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        )

    def live_nodes(self) -> set[str]:
        """Their ids."""
        return {node["NodeID"] for node in self._state.node_table() if node["Alive"]}

    def placement_groups(self) -> Mapping[str, Mapping[str, Any]]:
        """As `ray.util.placement_group_table` has them, by id."""
        groups: Mapping[str, Mapping[str, Any]] = self._state.placement_group_table()
        return groups

    def group_of(self, name: str, namespace: str) -> str | None:
        """The id of the placement group of this name; None = there is none."""
        found = self._state.get_placement_group_by_name(name, namespace)
        return found["placement_group_id"] if found else None

    def drain(self, node: str, why: str, deadline: float) -> tuple[bool, str]:
        """Tell Ray that a node goes, idle or not, at `deadline` (epoch seconds): whether it lets it, and why not. Public: nothing."""
        accepted, refusal = GcsClient(address=self._address).drain_node(node, DRAIN_NODE_REASON_PREEMPTION, why, int(deadline * 1000))
        return bool(accepted), refusal
