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
from moeserve.frontend.view import LayerView, Views
from moeserve.head import LayerHead
from moeserve.metrics import ExpertCounts, Metrics
from moeserve.output import ForwardOutput
from moeserve.placement import Placement
from moeserve.release import Release
from moeserve.request import LayerRequest
from moeserve.stats import HostShards, HostStats, LayerStats, ServiceStats
from moeserve.transport import KeyPair

OnHealth = Callable[[int, bool], None]


class Frontend:
    """Takes requests for any served layer and answers them with the hosts' help.

    `sources` are the layers of `release`, `hosts` its hosts in order: a name, and how to find the host's present incarnation; `keys` are
    shown to those on other nodes.
    `on_health` is told, whenever it may have changed, of every layer (by number) whether each of its experts has a live copy.
    """

    def __init__(
        self,
        sources: Sequence[LayerSource],
        release: Release,
        hosts: Sequence[tuple[str, Resolve]],
        config: ServiceConfig,
        metrics: Metrics,
        model: str,
        on_health: OnHealth,
        keys: KeyPair,
    ) -> None:
        self.model = model
        self.layers = [source.spec for source in sources]
        self._release = release
        self._metrics = metrics
        self._on_health = on_health
        self._timeout_s = config.resilience.request_timeout_s
        self._links = [HostLink(name, resolve, keys, metrics, self._hosts_changed) for name, resolve in hosts]
        self._budget = TokenBudget(config.server.max_queued_tokens, metrics.queue_tokens.set)
        self._compute = Compute()
        self._forwards = [self._forward(layer, release, source, config) for layer, source in enumerate(sources)]
        self._batchers = [Batcher(forward.run, config.batching, self._budget) for forward in self._forwards]

    def _forward(self, layer: int, release: Release, source: LayerSource, config: ServiceConfig) -> Forward:
        metrics, placing = self._metrics, config.placement
        exchange = Exchange(
            layer, source.spec, self._links, config.communication, config.resilience, placing.copy_choice, metrics, self._compute
        )
        views = Views(_view(layer, release, source))
        return Forward(layer, views, exchange, config.batching.micro_batches, metrics, self._compute)

    def publish(self, release: Release, sources: Sequence[LayerSource]) -> None:
        """Batches that begin from now on use `release`, of which `sources` are the layers; those under way end as they began.

        Raises CheckpointError when a gate cannot be read; then nothing has changed.
        """
        views = [_view(layer, release, source) for layer, source in enumerate(sources)]
        for forward, view in zip(self._forwards, views, strict=True):
            forward.views.publish(view)
        self.layers = [source.spec for source in sources]
        self._release = release
        self._hosts_changed()

    async def drained(self) -> None:
        """Until no batch uses an earlier release than the present one."""
        await asyncio.gather(*(forward.views.drained() for forward in self._forwards))

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
        metrics, release = self._metrics, self._release
        queues = metrics.host_queues()
        return ServiceStats(
            epoch=release.epoch,
            layers=[_layer_stats(index, spec.name, release.placement, metrics.experts) for index, spec in enumerate(self.layers)],
            hosts=[_host_stats(link, queues.get(link.name, 0)) for link in self._links],
            queue_tokens=self._budget.tokens,
            uptime_s=metrics.uptime_s,
            expert_retries=metrics.retries(),
            requests=metrics.request_durations(),
            stages=metrics.stage_durations(),
            calls=metrics.calls(),
            events=metrics.events.latest(),
        )

    def _hosts_changed(self) -> None:
        up = np.array([link.channel is not None for link in self._links])
        for index, layer in enumerate(self._release.placement.layers):
            copies = layer.live_copies(up)
            self._metrics.experts.live_copies[index][: len(copies)] = torch.from_numpy(copies)
            self._on_health(index, bool(copies.all()))


def _view(layer: int, release: Release, source: LayerSource) -> LayerView:
    return LayerView(release.epoch, release.revision(source.spec.name), LayerHead(source), release.placement.layers[layer])


def _layer_stats(index: int, name: str, placement: Placement, counts: ExpertCounts) -> LayerStats:
    layer = placement.layers[index]
    held = [(host, layer.shards_on(host)) for host in range(placement.num_hosts)]
    return LayerStats(
        name=name,
        tokens=counts.tokens[index],
        processed=counts.processed[index].clone(),
        dropped=counts.dropped[index].clone(),
        live_copies=counts.live_copies[index][: layer.num_experts].tolist(),
        tensor_parallel=layer.tensor_parallel,
        placement=[HostShards(host, [one.expert for one in shards], [one.shard for one in shards]) for host, shards in held if shards],
    )


def _host_stats(link: HostLink, queue_tokens: int) -> HostStats:
    info = link.info
    return HostStats(
        name=link.name,
        up=link.channel is not None,
        restarts=link.restarts,
        node=info.node if info else "",
        device=info.device if info else "",
        cuda_visible_devices=info.cuda_visible_devices if info else "",
        weights_bytes=info.weights_bytes if info else 0,
        queue_tokens=queue_tokens,
    )
