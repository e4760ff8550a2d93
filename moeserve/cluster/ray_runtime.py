"""Starting a local Ray that only this machine and this user can reach, or joining one that runs."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import socket
import threading
from datetime import datetime
from pathlib import Path

import ray
from ray.exceptions import AuthenticationError

from moeserve.addresses import parse_target
from moeserve.cluster import ray_spare
from moeserve.cluster.folders import Hold, hold_new, remove_all_abandoned
from moeserve.cluster.ray_internals import allow_clusters, canonical_address, forget_cached_token, is_cluster, log_dir
from moeserve.cluster.ray_local import LocalRay, kept_handlers
from moeserve.cluster.timing import CLUSTER_TIMEOUT_S, KNOCK_TIMEOUT_S
from moeserve.config import PlacementConfig, RayConfig
from moeserve.errors import ConfigError, MoEServeError

log = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 80 * 2**20  # tensors do not travel through Ray; this is about the least it accepts


class RayRuntime:
    """A Ray to put hosts on; `stop` ends what `start` began and leaves a joined cluster alone. Both may be called from any thread."""

    def __init__(self, config: RayConfig, placement: PlacementConfig) -> None:
        self._config = config
        self._placement = placement
        self._previous_environment: dict[str, str | None] = {}
        self._may_cluster = True
        self._changing = threading.Lock()
        #: `stop` has not been called since `start` was
        self._is_wanted = False
        self._folder: Hold | None = None
        self._local: LocalRay | None = None
        self._has_joined = False

    @property
    def is_private(self) -> bool:
        """Whether it is a local Ray that this object started: no other machine takes part."""
        return self._local is not None

    @property
    def folder(self) -> Path | None:
        """The private folder of a local Ray, from `start` to `stop`: its files and the sockets of hosts."""
        return None if self._folder is None else self._folder.path

    @property
    def log_dir(self) -> Path:
        """The folder of the log files of Ray's processes on this node (worker-*.err); for a private Ray, until `stop`."""
        folder = log_dir()
        assert folder is not None, "a Ray that has started"
        return folder

    @property
    def node_id(self) -> str:
        """The Ray node this process is on."""
        node_id: str = ray.get_runtime_context().get_node_id()
        return node_id

    def start(self) -> None:
        """Blocks for some seconds. Raises ConfigError when the address does not answer, MoEServeError when a local Ray does not start."""
        self._is_wanted = True
        try:
            with self._changing:
                self._start()
        except BaseException:
            self.stop()
            raise
        if not self._is_wanted:
            self.stop()

    def stop(self) -> None:
        """Waits for a running `start` first, unless that joins a cluster: it may take for ever, and then leaves by itself. Idempotent."""
        self._is_wanted = False
        if self._changing.acquire(blocking=self._config.address is None):
            try:
                self._stop()
            finally:
                self._changing.release()

    def _start(self) -> None:
        if ray.is_initialized():
            log.info("using the Ray that this process is already connected to")
        elif self._config.address is not None:
            self._join(self._config.address)
        else:
            self._start_local()

    def _stop(self) -> None:
        atexit.unregister(self.stop)
        if self._has_joined:
            ray.shutdown()
            self._has_joined = False
        if self._local is not None:
            self._local.stop()
            self._local = None
            allow_clusters(self._may_cluster)
        for name, value in self._previous_environment.items():
            _set(name, value)
        self._previous_environment.clear()
        if self._folder is not None:
            self._folder.let_go()
            self._folder = None

    def _join(self, address: str) -> None:
        self._setenv("RAY_USAGE_STATS_ENABLED", "0")
        knock(address)
        try:
            with kept_handlers():
                ray.init(address=address, namespace=self._config.namespace, log_to_driver=False, logging_level=logging.ERROR)
        except AuthenticationError as error:
            raise ConfigError(f"the Ray cluster at {address} asks for a token: {str(error).split('. ')[0]}") from None
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise ConfigError(f"the Ray cluster at {address} cannot be joined: {' '.join(str(error).split())}") from None
        self._has_joined = True

    def _start_local(self) -> None:
        remove_all_abandoned(self._config.temp_dir)
        self._folder = hold_new(f"ray/{_session_name()}/sockets/plasma_store", self._config.temp_dir)
        atexit.register(self.stop)  # a program may end without
        token_file = self._folder.path / "ray-token"
        token_file.touch(mode=0o600)
        token_file.write_text(secrets.token_hex(32))
        # Ray binds its ports to 127.0.0.1 only when clusters are ruled out; otherwise anyone who reaches them can run code here.
        self._setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        self._may_cluster = allow_clusters(False)
        self._setenv("RAY_AUTH_MODE", "token")
        self._setenv("RAY_AUTH_TOKEN_PATH", str(token_file))
        self._setenv("RAY_USAGE_STATS_ENABLED", "0")
        self._setenv("RAY_LOG_TO_STDERR", "0")
        # Otherwise hosts have nice 15: a frontend or a client on the same cores, which waits for them, would hold them up.
        self._setenv("RAY_worker_niceness", "0")
        for name, value in ray_spare.SETTINGS.items():
            self._setenv(name, value)
        forget_cached_token()
        self._local = LocalRay(self._folder.path, self._init_local)
        try:
            self._local.start()
        except Exception as error:  # Ray raises plain Exceptions, too
            raise MoEServeError(f"a local Ray did not start: {' '.join(str(error).split())}") from error

    def _init_local(self) -> None:
        assert self._folder is not None
        hosts = 0 if self._placement.num_hosts == "all" else self._placement.num_hosts
        num_cpus = self._config.num_cpus or max(os.cpu_count() or 1, int(hosts * self._placement.cpus_per_host + 0.999))
        ray.init(
            address="local",  # or Ray would join one that another user runs on this machine
            num_cpus=num_cpus,
            num_gpus=self._config.num_gpus,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=str(self._folder.path / "ray"),  # which Ray opens to all users
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )

    def _setenv(self, name: str, value: str) -> None:
        self._previous_environment.setdefault(name, os.environ.get(name))
        os.environ[name] = value


def _session_name() -> str:
    """As long as Ray's own name, from the time and the process id."""
    return f"session_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{os.getpid()}"


def knock(address: str) -> None:
    """Raises ConfigError if no Ray answers there; Ray itself tries for minutes, or for ever."""
    try:
        # "auto" may name a cluster that has ended
        found = address if ":" in address else canonical_address(address)
        for where in parse_target(found, "ray.address").hosts:
            socket.create_connection(where, timeout=KNOCK_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"no Ray cluster answers at {address}: {why}") from None
    if not is_cluster(found, CLUSTER_TIMEOUT_S):
        raise ConfigError(f"no Ray cluster answers at {address}: what listens there is none; allowed: the head, as 10.0.0.1:6379")


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
