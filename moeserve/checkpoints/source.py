"""Where one layer's weights come from, whatever that is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from moeserve.api.tensors import FLOAT_DTYPES
from moeserve.config import LayerSpec
from moeserve.experts import BankForm, Expert, ExpertBank, ExpertShard, FeedForward, HeldExpert, Placer, QuantizedFeedForward, quantize
from moeserve.gating import Mixer, Router

_CPU = torch.device("cpu")
log = logging.getLogger(__name__)


class LayerSource(Protocol):
    """E experts, H hidden size. Nothing is read before one of the methods is called; all raise CheckpointError."""

    @property
    def spec(self) -> LayerSpec:
        """What the layer is, without its weights."""
        ...

    def files_read(self) -> Sequence[Path]:
        """All files that it is described by and its weights are in; none for a layer of a seed."""
        ...

    @property
    def held_as(self) -> str:
        """What the weights of most experts are held in, for people."""
        ...

    @property
    def has_router_bias(self) -> bool:
        """Whether something is added to the logits; known without reading it, as the next one is."""
        ...

    @property
    def has_selection_bias(self) -> bool:
        """Whether something is added to the scores for selection only."""
        ...

    def router(self) -> Router:
        """The gate with all that it owns."""
        ...

    def experts(self, shards: Sequence[ExpertShard]) -> list[Expert]:
        """The given experts, or shards of them, in that order; nothing else is read.

        In the few bits they are stored in if the spec allows that, else in its dtype.
        """
        ...

    def shared_expert(self) -> Expert | None:
        """The expert that every token goes to; None unless spec.shared_mixing says how it is added."""
        ...

    def mixer(self) -> Mixer | None:
        """How the shared expert is added."""
        ...

    def nbytes(self, shard: ExpertShard) -> int:
        """Bytes of a shard as a host holds it, quantized if the spec says so; known without reading it."""
        ...

    def shared_nbytes(self) -> int:
        """Bytes of the shared expert, 0 without one."""
        ...


def load_bank(source: LayerSource, shards: Sequence[ExpertShard], device: torch.device = _CPU) -> ExpertBank:
    """What one host holds of a layer: the given shards, then the shared expert; quantized if the spec says so. Raises CheckpointError."""
    placer = Placer(device, source.spec.kernel, source.spec.deterministic)
    held = list(placer.placed(load_experts(source, shards)))
    shared = list(placer.placed(load_experts(source, [None]), one_by_one=True)) if source.spec.shared_mixing is not None else []
    return make_bank(source, held, shared[0] if shared else None, device)


def make_bank(source: LayerSource, held: Sequence[HeldExpert], shared: HeldExpert | None, device: torch.device) -> ExpertBank:
    """A bank of experts of the layer that are on `device` already."""
    spec = source.spec
    bank = ExpertBank(
        held,
        spec.hidden_size,
        FLOAT_DTYPES[spec.dtype],
        shared=shared,
        device=device,
        scale_inputs=spec.gating.scale_inputs,
        deterministic=spec.deterministic,
    )
    if source.held_as != spec.dtype:
        about = (spec.name, bank.num_experts, source.held_as, bank.nbytes / 2**20)
        log.info("layer %s: %d experts held as %s (%.1f MiB), decoded for every projection", *about)
    return bank


def bank_form(spec: LayerSpec, device: torch.device) -> BankForm:
    """That of any bank of a layer."""
    has_shared = spec.shared_mixing is not None
    return BankForm(spec.hidden_size, FLOAT_DTYPES[spec.dtype], device, spec.gating.scale_inputs, has_shared, spec.deterministic)


def load_experts(
    source: LayerSource, shards: Sequence[ExpertShard | None], on_expert: Callable[[], None] = lambda: None
) -> Iterable[Expert]:
    """The given shards as a host holds them, None = the shared expert, each read when it is asked for.

    `on_expert` is called after each that has been read. Iterating raises CheckpointError.
    """
    return _OneByOne(source, shards, on_expert)


@dataclass(frozen=True)
class _OneByOne:
    """Loads the experts while it is iterated: beside what is held already, memory has the weights of one as they are stored."""

    source: LayerSource
    shards: Sequence[ExpertShard | None]
    on_expert: Callable[[], None]

    def __len__(self) -> int:
        return len(self.shards)

    def __iter__(self) -> Iterator[Expert]:
        for shard in self.shards:
            # No name holds it here while the next is loaded.
            yield _held(self._read(shard), self.source.spec)
            self.on_expert()

    def _read(self, shard: ExpertShard | None) -> Expert:
        if shard is not None:
            return self.source.experts([shard])[0]
        shared = self.source.shared_expert()
        assert shared is not None, "spec.shared_mixing says how it is added"
        return shared


def bank_bytes(source: LayerSource, shards: Sequence[ExpertShard]) -> int:
    """Bytes that `load_bank` will hold."""
    return sum(map(source.nbytes, shards)) + (source.shared_nbytes() if shards else 0)


def _held(expert: Expert, spec: LayerSpec) -> Expert:
    # Those that are stored in the bits that are asked for keep the numbers they have.
    if spec.quantized_to is None or isinstance(expert, QuantizedFeedForward):
        return expert
    assert isinstance(expert, FeedForward), "modules are not quantized: checked when layers are resolved"
    return quantize(expert, spec.quantized_to)
