"""The host actor: a thin Ray shell around the host's loop."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.util
import torch

from moeserve.checkpoints import layer_sources, load_bank
from moeserve.config import ServiceConfig
from moeserve.experts import ExpertBank
from moeserve.host import HostLoop
from moeserve.placement import Placement
from moeserve.stats import HostInfo
from moeserve.transport import HostKeys, KeyPair, listen


@dataclass(frozen=True)
class HostOrder:
    """Everything a host needs to know to come up, again and again: who it is, what it holds, whom it works for."""

    name: str
    number: int
    config: ServiceConfig
    placement: Placement
    frontend: FrontendAddress


@dataclass(frozen=True)
class FrontendAddress:
    """The Ray node of the frontend, a folder for sockets there, and the public key it shows to hosts on other nodes."""

    node: str
    socket_dir: Path
    public_key: str


@ray.remote
class ExpertHost:
    """Holds the physical experts that the placement gives to host `order.number`, of every layer.

    Ray starts it again when it dies; each incarnation loads its experts anew and listens at an endpoint of its own.
    """

    def __init__(self, order: HostOrder) -> None:
        self._order = order
        self._info: HostInfo | None = None
        self._loop: HostLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> HostInfo:
        """Load the experts and listen, once per incarnation. Raises ConfigError."""
        if self._info is None:
            self._info = self._start()
        return self._info

    def stop(self) -> None:
        """Finish the pass that is running and remove the socket."""
        if self._loop is not None and self._thread is not None:
            self._loop.stop()
            self._thread.join()

    def _start(self) -> HostInfo:
        order = self._order
        granted = ray.get_runtime_context().get_assigned_resources()
        num_threads = max(1, int(granted.get("CPU", 1)))
        torch.set_num_threads(num_threads)
        # With no GPU granted Ray leaves all of them visible, so what counts is the grant.
        has_gpu = bool(granted.get("GPU", 0))
        device = torch.device("cuda" if has_gpu and torch.cuda.is_available() else "cpu")
        banks = _load(order, device)
        keys = KeyPair.generate()
        listener = listen(_endpoint(order), keys=HostKeys(keys, frozenset({order.frontend.public_key})))
        self._loop = HostLoop(banks, listener)
        self._thread = threading.Thread(target=_run, args=(self._loop, num_threads), name="expert-host", daemon=True)
        self._thread.start()
        return HostInfo(
            name=order.name,
            endpoint=listener.endpoints[0],
            public_key=keys.public,
            node=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            device=str(device),
            cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES", "") if has_gpu else "",
            num_threads=num_threads,
            weights_bytes=sum(bank.nbytes for bank in banks.values()),
        )


def _endpoint(order: HostOrder) -> str:
    """Shared memory beside the frontend, encrypted TCP from anywhere else."""
    if ray.get_runtime_context().get_node_id() == order.frontend.node:
        return f"unix:{order.frontend.socket_dir / order.name}-{os.getpid()}.sock"
    return f"tcp://{ray.util.get_node_ip_address()}:0"


def _run(loop: HostLoop, num_threads: int) -> None:
    # OpenMP keeps this setting per thread, and the math libraries below torch ask OpenMP: without it every matmul of this
    # thread would be spread over all cores of the machine.
    torch.set_num_threads(num_threads)
    loop.run()


def _load(order: HostOrder, device: torch.device) -> dict[int, ExpertBank]:
    layers = zip(layer_sources(order.config), order.placement.layers, strict=True)
    held = {number: (source, layer.shards_on(order.number)) for number, (source, layer) in enumerate(layers)}
    return {number: load_bank(source, shards, device) for number, (source, shards) in held.items() if shards}
