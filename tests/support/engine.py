"""The engine of tests that need none: its layers are functions, and a test can hold it, break it and look into it.

T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from moeserve.api.output import ForwardOutput
from moeserve.api.request import LayerRequest
from moeserve.config import GatingConfig, LayerSpec
from moeserve.errors import Overloaded
from moeserve.observe.stats import HostStats, LayerStats, ServiceStats

HIDDEN, EXPERTS = 16, 4
X = torch.arange(3.0 * HIDDEN).view(3, HIDDEN)

#: hidden_states [T, H], topk_ids [T, K], topk_weights [T, K] -> [T, H]
Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
#: the requests of the message that a task belongs to
_REACHED: contextvars.ContextVar[list[LayerRequest]] = contextvars.ContextVar("reached")


def spec(name: str, hidden_size: int = HIDDEN, num_experts: int = EXPERTS, **gating: Any) -> LayerSpec:
    chosen = {"top_k": 2, "capacity_factor": 1.25, "request_overrides": ("capacity_factor", "noise"), **gating}
    return LayerSpec(name, hidden_size, 32, num_experts, "swiglu", False, "bfloat16", GatingConfig(**chosen))


class FakeEngine:
    """Batches that come with a routing go through their layer's function by it; others choose experts 0 and 1 with weight 1/2.

    `stamped`: what every answer says in the place of what was counted.
    """

    model = "tiny"

    def __init__(self, layers: Sequence[tuple[LayerSpec, Experts]], **stamped: Any) -> None:
        self.layers = [layer for layer, _ in layers]
        self.requests: list[tuple[int, LayerRequest]] = []
        #: raised by the next requests, in turn
        self.errors: list[BaseException] = []
        #: requests wait while it is closed; it belongs to the server's event loop
        self.gate = asyncio.Event()
        self.gate.set()
        self._loop: asyncio.AbstractEventLoop | None = None
        #: what calls are told before they are read, and whose they were
        self.refusing: Overloaded | None = None
        self.callers: list[str] = []
        #: how many were cancelled while they waited
        self.cancelled = 0
        #: how many requests reached it together, each time
        self.together_sizes: list[int] = []
        self._experts = [experts for _, experts in layers]
        self._stamped = stamped

    def open_gate(self) -> None:
        """From another thread than the server's, once a request has come."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.gate.set)

    async def forward(self, layer: int, request: LayerRequest) -> ForwardOutput:
        self._loop = asyncio.get_running_loop()
        self.requests.append((layer, request))
        _REACHED.get([]).append(request)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.errors:
            raise self.errors.pop(0)
        return self.answer(layer, request)

    @contextmanager
    def together(self) -> Iterator[None]:
        reached: list[LayerRequest] = []
        token = _REACHED.set(reached)
        yield
        _REACHED.reset(token)
        self.together_sizes.append(len(reached))

    def refusal(self, caller: str, deadline: float | None) -> Overloaded | None:
        self.callers.append(caller)
        return self.refusing

    def revision(self, layer: int) -> int:
        return int(self._stamped.get("model_revision", 1))

    def answer(self, layer: int, request: LayerRequest) -> ForwardOutput:
        num_tokens, num_experts = request.num_tokens, self.layers[layer].num_experts
        ids, weights = request.topk_ids, request.topk_weights
        if ids is None or weights is None:
            ids, weights = torch.tensor([[0, 1]]).expand(num_tokens, 2), torch.full((num_tokens, 2), 0.5)
        counts, returns = ids[ids >= 0].bincount(minlength=num_experts), request.return_routing
        counted = ForwardOutput(
            hidden_states=self._experts[layer](request.hidden_states, ids, weights),
            requested=counts,
            processed=counts,
            dropped=torch.zeros_like(counts),
            dropped_tokens=torch.zeros(num_tokens, dtype=torch.bool),
            aux_loss=0.5,
            z_loss=0.25,
            topk_ids=ids.long() if returns else None,
            topk_weights=weights.float() if returns else None,
            slots=torch.full(ids.shape, -1) if returns else None,
            drop_reasons=torch.ones(ids.shape, dtype=torch.int32) if returns else None,
        )
        return replace(counted, **self._stamped)

    def stats(self) -> ServiceStats:
        numbers = [range(layer.num_experts + 1) for layer in self.layers]
        layers = [LayerStats(layer.name, 7, counts[:-1], counts[1:]) for layer, counts in zip(self.layers, numbers, strict=True)]
        facts = {
            "node": "node-a",
            "device": "cuda:0",
            "cuda_visible_devices": "1",
            "num_threads": 3,
            "experts_held": 5,
            "weights_bytes": 4096,
        }
        return ServiceStats(3, layers, [HostStats("host-0", True, 2, **facts)], 11)


def identity(rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return rows


def echo_engine() -> FakeEngine:
    """Layer n adds n to the rows. Whatever is asked, the counts of its answers are not equal to one another."""
    layers = [
        (spec("model.layers.3.mlp", capacity_factor=None, request_overrides=()), identity),
        (spec("model.layers.5.mlp", capacity_factor=1.5), lambda rows, ids, weights: rows + 1),
    ]
    counts = torch.arange(EXPERTS)
    return FakeEngine(layers, requested=counts + 1, processed=counts, dropped=torch.ones_like(counts))
