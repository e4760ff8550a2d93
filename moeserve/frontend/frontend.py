"""The engine behind the gRPC service: one batcher and one forward pass per layer, one link per host."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from moeserve.checkpoints import LayerSource
from moeserve.config import ServiceConfig
from moeserve.errors import DeadlineExceeded
from moeserve.frontend.batcher import Batcher, TokenBudget
from moeserve.frontend.compute import Compute
from moeserve.frontend.exchange import Exchange
from moeserve.frontend.forward import Forward
from moeserve.frontend.link import HostLink, Resolve
from moeserve.gating import Router
from moeserve.metrics import Metrics
from moeserve.output import ForwardOutput
from moeserve.placement import Placement
from moeserve.request import LayerRequest
from moeserve.stats import HostStats, LayerStats, ServiceStats
from moeserve.transport import KeyPair

OnHealth = Callable[[int, bool], None]


class Frontend:
    """Takes requests for any served layer and answers them with the hosts' help.

    `hosts` are the placement's hosts in order: a name, and how to find the host's present incarnation; `keys` are shown to those on
    other nodes.
    `on_health` is told, whenever it may have changed, of every layer (by number) whether each of its experts has a live copy.
    """

    def __init__(
        self,
        sources: Sequence[LayerSource],
        placement: Placement,
        hosts: Sequence[tuple[str, Resolve]],
        config: ServiceConfig,
        metrics: Metrics,
        model: str,
        on_health: OnHealth,
        keys: KeyPair,
    ) -> None:
        self.model = model
        self.layers = [source.spec for source in sources]
        self._placement = placement
        self._metrics = metrics
        self._on_health = on_health
        self._timeout_s = config.resilience.request_timeout_s
        self._links = [HostLink(name, resolve, keys, metrics, self._hosts_changed) for name, resolve in hosts]
        self._budget = TokenBudget(config.server.max_queued_tokens, metrics.queue_tokens.set)
        self._compute = Compute()
        self._batchers = [
            Batcher(
                self._forward(layer, source, config).run,
                config.batching,
                self._budget,
            )
            for layer, source in enumerate(sources)
        ]

    def _forward(self, layer: int, source: LayerSource, config: ServiceConfig) -> Forward:
        spec, metrics, compute = source.spec, self._metrics, self._compute
        exchange = Exchange(layer, spec, self._placement.epoch, self._links, config.communication, config.resilience, metrics, compute)
        router = Router(source.gate(), spec.gating)
        return Forward(layer, spec, router, self._placement.layers[layer], exchange, config.batching.micro_batches, metrics, compute)

    async def start(self, node: str) -> None:
        """Connect to every host: through memory to those on `node`, where this process runs, over TCP to the others."""
        await asyncio.gather(*(link.start(node) for link in self._links))

    async def close(self) -> None:
        """Let go of the hosts; requests that are still running fail."""
        await asyncio.gather(*(link.close() for link in self._links))
        self._compute.close()

    async def forward(self, layer: int, request: LayerRequest) -> ForwardOutput:
        """One validated request. Raises Overloaded, ExpertUnavailable, DeadlineExceeded; cancelling the task gives it up."""
        deadline = time.monotonic() + self._timeout_s if request.deadline is None else request.deadline
        if deadline <= time.monotonic():
            raise DeadlineExceeded("the deadline had passed when the request arrived")
        answer = self._batchers[layer].submit(request, deadline)
        try:
            async with asyncio.timeout_at(deadline):
                return await answer
        except TimeoutError:
            raise DeadlineExceeded(f"layer {self.layers[layer].name} did not answer before the deadline") from None

    def stats(self) -> ServiceStats:
        """Counts since the start and the state of the hosts."""
        counts = self._metrics.experts
        layers = [
            LayerStats(spec.name, counts.tokens[index], counts.processed[index].clone(), counts.dropped[index].clone())
            for index, spec in enumerate(self.layers)
        ]
        hosts = [_host_stats(link) for link in self._links]
        return ServiceStats(epoch=self._placement.epoch, layers=layers, hosts=hosts, queue_tokens=self._budget.tokens)

    def _hosts_changed(self) -> None:
        up = np.array([link.channel is not None for link in self._links])
        for index, layer in enumerate(self._placement.layers):
            living = layer.logical_of_physical[up[layer.host_of_physical]]
            copies = np.bincount(living, minlength=self.layers[index].num_experts)
            self._metrics.experts.live_copies[index] = torch.from_numpy(copies)
            self._on_health(index, bool(copies.all()))


def _host_stats(link: HostLink) -> HostStats:
    info = link.info
    return HostStats(
        name=link.name,
        up=link.channel is not None,
        restarts=link.restarts,
        node=info.node if info else "",
        device=info.device if info else "",
        cuda_visible_devices=info.cuda_visible_devices if info else "",
        weights_bytes=info.weights_bytes if info else 0,
    )
