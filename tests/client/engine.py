"""An engine whose layers are given as functions, and a server for it in a thread of its own.

T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from moeserve.addresses import join
from moeserve.api.output import ForwardOutput
from moeserve.api.request import LayerRequest
from moeserve.config import GatingConfig, LayerSpec, ServerConfig
from moeserve.errors import MoEServeError
from moeserve.observe.stats import HostStats, LayerStats, ServiceStats
from moeserve.server import GrpcServer

HIDDEN, EXPERTS = 16, 4
X = torch.arange(3.0 * HIDDEN).view(3, HIDDEN)

#: hidden_states [T, H], topk_ids [T, K], topk_weights [T, K] -> [T, H]
Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def spec(name: str, hidden_size: int, num_experts: int) -> LayerSpec:
    gating = GatingConfig(top_k=2, capacity_factor=1.25, request_overrides=("capacity_factor", "noise"))
    return LayerSpec(name, hidden_size, 32, num_experts, "swiglu", False, "bfloat16", gating)


class FunctionEngine:
    """Caller-routed batches go through their layer's function; others choose experts 0 and 1 with weight 1/2."""

    model = "tiny"

    def __init__(self, layers: Sequence[tuple[LayerSpec, Experts]]) -> None:
        self.layers = [layer for layer, _ in layers]
        self.requests: list[tuple[int, LayerRequest]] = []
        #: raised by the next requests, in turn
        self.errors: list[MoEServeError] = []
        #: requests wait while it is closed; it belongs to the server's event loop
        self.gate = asyncio.Event()
        self.gate.set()
        self.started = threading.Event()
        self.cancelled = threading.Event()
        self._experts = [experts for _, experts in layers]

    async def forward(self, layer: int, request: LayerRequest) -> ForwardOutput:
        self.requests.append((layer, request))
        self.started.set()
        if self.errors:
            raise self.errors.pop(0)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        num_tokens, num_experts = request.num_tokens, self.layers[layer].num_experts
        ids, weights = request.topk_ids, request.topk_weights
        if ids is None or weights is None:
            ids, weights = torch.tensor([[0, 1]]).expand(num_tokens, 2), torch.full((num_tokens, 2), 0.5)
        counts = ids[ids >= 0].bincount(minlength=num_experts)
        return ForwardOutput(
            hidden_states=self._experts[layer](request.hidden_states, ids, weights),
            requested=counts,
            processed=counts,
            dropped=torch.zeros_like(counts),
            dropped_tokens=torch.zeros(num_tokens, dtype=torch.bool),
            aux_loss=0.5,
            z_loss=0.25,
            topk_ids=ids.long() if request.return_routing else None,
            topk_weights=weights.float() if request.return_routing else None,
        )

    def stats(self) -> ServiceStats:
        counts = torch.arange(2)
        layers = [LayerStats(layer.name, 5, counts, counts + 1) for layer in self.layers]
        return ServiceStats(3, layers, [HostStats("host-0", True, 2, "node", "cuda:0", "1", 4096)], 11)


@contextmanager
def served(engine: FunctionEngine, **config: object) -> Iterator[tuple[str, GrpcServer, asyncio.AbstractEventLoop]]:
    """host:port, the server and its event loop, which runs in another thread."""
    where, loop = ServerConfig(**{"port": 0, **config}), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> tuple[GrpcServer, int]:
        server = GrpcServer(where, lambda method, code, seconds: None, engine=engine)
        return server, await server.start()

    server, port = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield join(where.host, port), server, loop
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
