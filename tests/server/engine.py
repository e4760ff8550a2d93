"""An engine that answers with what it got, and that a test can hold, break and look into."""

from __future__ import annotations

import asyncio

import torch

from moeserve.api.output import ForwardOutput
from moeserve.api.request import LayerRequest
from moeserve.config import GatingConfig, LayerSpec
from moeserve.observe.stats import HostStats, LayerStats, ServiceStats

HIDDEN, EXPERTS = 16, 4


def spec(name: str, hidden_size: int = HIDDEN) -> LayerSpec:
    return LayerSpec(
        name=name,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_experts=EXPERTS,
        activation="swiglu",
        bias=False,
        dtype="bfloat16",
        gating=GatingConfig(
            top_k=2,
            capacity_factor=1.5 if "5" in name else None,
            request_overrides=("capacity_factor", "noise") if "5" in name else (),
        ),
    )


class EchoEngine:
    """Layer n adds n to hidden_states. Requests wait while `gate` is closed."""

    model = "tiny"

    def __init__(self) -> None:
        self.layers = [spec("model.layers.3.mlp"), spec("model.layers.5.mlp")]
        self.requests: list[LayerRequest] = []
        self.error: BaseException | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.cancelled = 0
        self._changed = asyncio.Condition()

    async def forward(self, layer: int, request: LayerRequest) -> ForwardOutput:
        self.requests.append(request)
        await self._tell()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            await self._tell()
            raise
        if self.error is not None:
            raise self.error
        return output(request.hidden_states + layer, request.return_routing)

    async def until(self, started: int = 0, cancelled: int = 0) -> None:
        async with self._changed, asyncio.timeout(10):
            await self._changed.wait_for(lambda: len(self.requests) >= started and self.cancelled >= cancelled)

    def stats(self) -> ServiceStats:
        counts = torch.arange(EXPERTS)
        return ServiceStats(
            epoch=3,
            layers=[LayerStats(layer.name, 7, counts, counts + 1) for layer in self.layers],
            hosts=[HostStats("host-0", True, 2, "node-a", "cuda:0", "1", 4096)],
            queue_tokens=11,
        )

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def output(hidden_states: torch.Tensor, return_routing: bool = False) -> ForwardOutput:
    num_tokens, counts = len(hidden_states), torch.arange(EXPERTS)
    return ForwardOutput(
        hidden_states=hidden_states,
        requested=counts + 1,
        processed=counts,
        dropped=torch.ones_like(counts),
        dropped_tokens=torch.zeros(num_tokens, dtype=torch.bool),
        aux_loss=0.5,
        z_loss=0.25,
        topk_ids=torch.zeros(num_tokens, 2, dtype=torch.int64) if return_routing else None,
        topk_weights=torch.ones(num_tokens, 2) if return_routing else None,
        slots=torch.full((num_tokens, 2), -1) if return_routing else None,
        drop_reasons=torch.ones(num_tokens, 2, dtype=torch.int32) if return_routing else None,
    )
