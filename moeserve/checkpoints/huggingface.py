"""The MoE layers of a Hugging Face folder: config.json + safetensors, as downloaded.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from moeserve.api.tensors import FLOAT_DTYPES
from moeserve.checkpoints.described import expert_bytes
from moeserve.checkpoints.family import Layout
from moeserve.checkpoints.held import held_bytes, held_projections, held_title
from moeserve.checkpoints.layouts import ExpertLayout, StoredPart
from moeserve.checkpoints.safetensors_folder import SafetensorsFolder
from moeserve.checkpoints.whole_numbers import read_whole_numbers
from moeserve.config import Activation, LayerSpec
from moeserve.experts import Expert, ExpertShard, FeedForward, QuantizedFeedForward, computed_in, is_gated
from moeserve.gating import Mixer, Router
from moeserve.loops import in_threads

log = logging.getLogger(__name__)

#: experts a host reads at once: enough to keep a disk busy, few enough not to need memory of their own
READERS: Final = 4
_SECONDS_BETWEEN_LINES: Final = 10.0


class _Progress:
    """A line in the log when several experts are read, and every ten seconds before."""

    def __init__(self, layer: str, total: int) -> None:
        self._layer, self._total = layer, total
        self._count = self._nbytes = 0
        self._started = self._spoken = time.monotonic()

    def add(self, nbytes: int) -> None:
        self._count, self._nbytes, now = self._count + 1, self._nbytes + nbytes, time.monotonic()
        if self._count == self._total > 1 or now - self._spoken > _SECONDS_BETWEEN_LINES:
            self._spoken, took_s = now, now - self._started
            log.info("layer %s: %d of %d experts, %.1f MiB, %.1f s", self._layer, self._count, self._total, self._nbytes / 2**20, took_s)


@dataclass(frozen=True)
class HuggingFaceLayer:
    """One MoE layer of the folder. shared_size: I of the shared expert, 0 = there is none; shared_activation: None = as in the others.

    `layout` names of the gate only what there is: its biases, its table of token ids, and nothing at all when it stays with the callers.
    """

    spec: LayerSpec
    layout: Layout
    index: int
    files: SafetensorsFolder
    shared_size: int = 0
    shared_bias: bool = False
    shared_activation: Activation | None = None

    def tensors(self) -> Iterator[str]:
        """Names of all that is read of the layer, as a layout has them: what they are stored as is for the files to say."""
        layout, experts, count = self.layout, self.layout.experts, self.spec.num_hosted_experts
        gate = (layout.router, layout.router_bias, layout.score_correction_bias, layout.expert_table)
        yield from (f"{self.prefix}.{name}" for name in gate if name)
        yield from (f"{self.prefix}.{name}" for name in experts.weights(count))
        yield from (f"{self.prefix}.{name}" for name in experts.biases(count) if self.spec.bias)
        if self.shared_size:
            shared = layout.shared_projections
            yield from (f"{self.prefix}.{name}" for name in shared.weights(1))
            yield from (f"{self.prefix}.{name}" for name in shared.biases(1) if self.shared_bias)
        if self.spec.shared_mixing == "sigmoid":
            yield f"{self.prefix}.{layout.shared_gate}"

    def files_read(self) -> Sequence[Path]:
        return self.files.files_below(self.prefix)

    @property
    def prefix(self) -> str:
        return self.layout.prefix.format(index=self.index)

    @property
    def has_router_bias(self) -> bool:
        return bool(self.layout.router_bias)

    @property
    def has_selection_bias(self) -> bool:
        return bool(self.layout.score_correction_bias)

    def router(self) -> Router:
        count, layout = self.spec.num_experts, self.layout
        if not layout.router:
            # The gate stays with the callers; nobody asks this one.
            return Router(torch.zeros((), dtype=torch.float32).expand(count, self.spec.hidden_size), self.spec.gating)
        return Router(
            self._read(layout.router, (count, self.spec.hidden_size)),
            self.spec.gating,
            bias=self._read(layout.router_bias, (count,)) if layout.router_bias else None,
            score_correction_bias=self._score_correction_bias() if layout.score_correction_bias else None,
            token_experts=self._token_experts() if layout.expert_table else None,
        )

    def experts(self, shards: Sequence[ExpertShard]) -> list[Expert]:
        experts: list[Expert] = []
        progress = _Progress(self.spec.name, len(shards))
        for expert in in_threads(self._expert, shards, READERS):
            experts.append(expert)
            progress.add(expert.nbytes)
        return experts

    def shared_expert(self) -> Expert | None:
        if not self.shared_size:
            return None
        part, activation = self._part(ExpertShard(0), self.shared_size), self.shared_activation or self.spec.activation
        return self._read_expert(self.layout.shared_projections, part, activation, self.shared_bias)

    def mixer(self) -> Mixer | None:
        if self.spec.shared_mixing is None:
            return None
        has_gate = self.spec.shared_mixing == "sigmoid"
        return Mixer(self.spec.shared_mixing, self._read(self.layout.shared_gate, (1, self.spec.hidden_size)) if has_gate else None)

    @property
    def held_as(self) -> str:
        part = self._part(ExpertShard(0), self.spec.intermediate_size)
        return held_title(self.layout.experts, part, self.spec.quantization) or self.spec.quantized_to or self.spec.dtype

    def nbytes(self, shard: ExpertShard) -> int:
        return self._nbytes(self.layout.experts, shard, self.spec.intermediate_size, self.spec.bias)

    def shared_nbytes(self) -> int:
        return self._nbytes(self.layout.shared_projections, ExpertShard(0), self.shared_size, self.shared_bias) if self.shared_size else 0

    def _nbytes(self, names: ExpertLayout, shard: ExpertShard, intermediate_size: int, bias: bool) -> int:
        part = self._part(shard, intermediate_size)
        held = held_bytes(names, part, self.spec.quantization)
        if held is None:
            return expert_bytes(self.spec, intermediate_size, shard, bias)
        return held + sum(each.nbytes for each in self._biases(part, bias) if each is not None)

    @property
    def _dtype(self) -> torch.dtype:
        return FLOAT_DTYPES[self.spec.dtype]

    def _expert(self, shard: ExpertShard) -> FeedForward | QuantizedFeedForward:
        part = self._part(shard, self.spec.intermediate_size)
        expert = self._read_expert(self.layout.experts, part, self.spec.activation, self.spec.bias)
        if expert.down_bias is not None and not shard.is_first:
            expert.down_bias.zero_()
        return expert

    def _read_expert(self, names: ExpertLayout, part: StoredPart, activation: Activation, bias: bool) -> FeedForward | QuantizedFeedForward:
        held = held_projections(names, part, self.spec.quantization)
        gate_up_bias, down_bias = self._biases(part, bias)
        if held is not None:
            names.fill_biases(gate_up_bias, down_bias, part)
            return QuantizedFeedForward(activation, *held, gate_up_bias, down_bias, computed_in(self._dtype))
        spans = names.spans(part)
        for span in (*spans.gate_up, spans.down):
            self.files.checked(span.tensor(part), span.shape, part.expert if span.is_stacked else None)
        hidden, width, dtype = self.spec.hidden_size, part.channels.stop - part.channels.start, self._dtype
        weights = torch.empty(self._projected * width, hidden, dtype=dtype), torch.empty(hidden, width, dtype=dtype)
        expert = FeedForward(activation, *weights, gate_up_bias, down_bias)
        names.fill(expert, part)
        return expert

    @property
    def _projected(self) -> int:
        """Channels of the first projection for each of the second, in the shared expert too."""
        return 2 if is_gated(self.spec.activation) else 1

    def _biases(self, part: StoredPart, bias: bool) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        if not bias:
            return None, None
        gate_up = self._projected * (part.channels.stop - part.channels.start)
        return torch.empty(gate_up, dtype=self._dtype), torch.empty(self.spec.hidden_size, dtype=self._dtype)

    def _part(self, shard: ExpertShard, intermediate_size: int) -> StoredPart:
        spec = self.spec
        return StoredPart(
            self.files,
            self.prefix,
            spec.num_hosted_experts,
            spec.hidden_size,
            intermediate_size,
            shard.expert,
            shard.span(intermediate_size),
        )

    def _score_correction_bias(self) -> torch.Tensor:
        name = f"{self.prefix}.{self.layout.score_correction_bias}"
        # Ernie 4.5 keeps a row of them for each kind of token, of which there is one.
        is_row = len(self.files.shape(name)) == 2
        bias = self.files.read(name, (1, self.spec.num_experts) if is_row else (self.spec.num_experts,), torch.float32)
        return bias.flatten()

    def _token_experts(self) -> torch.Tensor:
        name = f"{self.prefix}.{self.layout.expert_table}"
        return read_whole_numbers(self.files, name, (*self.files.shape(name)[:1], self.spec.gating.top_k))

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.files.read(f"{self.prefix}.{name}", shape, torch.float32)
