"""How the experts of a layer are laid out on disk.

E experts, H hidden size, I intermediate size, i channels of a shard (I of a whole expert).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from moeserve.checkpoints.safetensors_folder import SafetensorsFolder
from moeserve.errors import CheckpointError
from moeserve.experts import FeedForward


@dataclass(frozen=True)
class Part:
    """What is to be read: `channels` of one expert of E, each H x I, whose tensors have names that begin with `prefix`."""

    files: SafetensorsFolder
    prefix: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    expert: int
    channels: slice

    def read(
        self,
        out: torch.Tensor,
        name: str,
        shape: tuple[int, ...],
        *,
        rows: slice | None = None,
        columns: slice | None = None,
        is_stacked: bool = False,
    ) -> None:
        """As `SafetensorsFolder.read_into`; a stack [E, ...] is cut at the expert."""
        name = f"{self.prefix}.{name.format(expert=self.expert)}"
        self.files.read_into(out, name, shape, self.expert if is_stacked else None, rows, columns)


class ExpertLayout(Protocol):
    """Names of tensors below the prefix of a layer, and how to fill a gated expert from them."""

    @property
    def first(self) -> str:
        """A tensor that has weights of expert 0: its presence tells the layout, its type that of the weights."""
        ...

    def weights(self, num_experts: int) -> Iterator[str]:
        """All tensors of the layer's experts but their biases."""
        ...

    def biases(self, num_experts: int) -> Iterator[str]:
        """The biases that experts of this layout have if they have any."""
        ...

    def fill(self, expert: FeedForward, part: Part) -> None:
        """gate_up_proj [2i, H], gate first, down_proj [H, i], gate_up_bias [2i] and down_bias [H] where there are biases."""
        ...

    def check_unbiased(self, part: Part) -> None:
        """Of experts without biases: AutoGPTQ writes some all the same. Raises CheckpointError when they are not zero."""
        ...


@dataclass(frozen=True)
class Separate:
    """A tensor for each projection of each expert: gate and up [I, H], down [H, I]; biases beside them."""

    gate: str = "experts.{expert}.gate_proj.weight"
    up: str = "experts.{expert}.up_proj.weight"
    down: str = "experts.{expert}.down_proj.weight"

    @property
    def first(self) -> str:
        return self.gate.format(expert=0)

    def weights(self, num_experts: int) -> Iterator[str]:
        return (name.format(expert=expert) for expert in range(num_experts) for name in (self.gate, self.up, self.down))

    def biases(self, num_experts: int) -> Iterator[str]:
        return map(_bias, self.weights(num_experts))

    def fill(self, expert: FeedForward, part: Part) -> None:
        hidden, intermediate, channels = part.hidden_size, part.intermediate_size, part.channels
        for name, out in zip((self.gate, self.up), expert.gate_up_proj.chunk(2), strict=True):
            part.read(out, name, (intermediate, hidden), rows=channels)
        part.read(expert.down_proj, self.down, (hidden, intermediate), columns=channels)
        if expert.gate_up_bias is not None and expert.down_bias is not None:
            for name, out in zip((self.gate, self.up), expert.gate_up_bias.chunk(2), strict=True):
                part.read(out[None], _bias(name), (intermediate,), columns=channels)
            part.read(expert.down_bias[None], _bias(self.down), (hidden,))

    def check_unbiased(self, part: Part) -> None:
        widths = {self.gate: part.intermediate_size, self.up: part.intermediate_size, self.down: part.hidden_size}
        for weight, width in widths.items():
            name = f"{part.prefix}.{_bias(weight).format(expert=part.expert)}"
            if name in part.files and part.files.read(name, (width,), torch.float32).any():
                raise CheckpointError(f"{part.files.folder}: tensor {name} is not zero, but this projection has no bias")


@dataclass(frozen=True)
class Stacked:
    """All experts in a tensor: gate_up [E, 2I, H] and down [E, H, I], or transposed [E, H, 2I] and [E, I, H].

    interleaved: gate and up channels alternate instead of standing one after the other. Biases are [E, 2I] and [E, H].
    """

    gate_up: str = "experts.gate_up_proj"
    down: str = "experts.down_proj"
    transposed: bool = False
    interleaved: bool = False
    gate_up_bias: str = "experts.gate_up_proj_bias"
    down_bias: str = "experts.down_proj_bias"

    @property
    def first(self) -> str:
        return self.gate_up

    def weights(self, num_experts: int) -> Iterator[str]:
        return iter((self.gate_up, self.down))

    def biases(self, num_experts: int) -> Iterator[str]:
        return iter((self.gate_up_bias, self.down_bias))

    def fill(self, expert: FeedForward, part: Part) -> None:
        count, hidden, intermediate = part.num_experts, part.hidden_size, part.intermediate_size
        for out, channels in self._spans(expert.gate_up_proj, part):
            if self.transposed:
                # [2i, H] or [i, 2, H], to be filled column by column.
                by_column = out.movedim(-1, 0)
                part.read(by_column, self.gate_up, (count, hidden, 2 * intermediate), columns=channels, is_stacked=True)
            else:
                part.read(out, self.gate_up, (count, 2 * intermediate, hidden), rows=channels, is_stacked=True)
        if self.transposed:
            part.read(expert.down_proj.t(), self.down, (count, intermediate, hidden), rows=part.channels, is_stacked=True)
        else:
            part.read(expert.down_proj, self.down, (count, hidden, intermediate), columns=part.channels, is_stacked=True)
        if expert.gate_up_bias is not None and expert.down_bias is not None:
            for out, channels in self._spans(expert.gate_up_bias, part):
                part.read(out[None], self.gate_up_bias, (count, 2 * intermediate), columns=channels, is_stacked=True)
            part.read(expert.down_bias[None], self.down_bias, (count, hidden), is_stacked=True)

    def check_unbiased(self, part: Part) -> None:
        """Nobody writes biases of stacks that have none."""

    def _spans(self, gate_up: torch.Tensor, part: Part) -> list[tuple[torch.Tensor, slice]]:
        """[2i, ...] as what can be filled in one go, and from which of the 2I channels on disk."""
        start, stop = part.channels.start, part.channels.stop
        if self.interleaved:
            return [(gate_up.unflatten(0, (2, -1)).transpose(0, 1), slice(2 * start, 2 * stop))]
        gate, up = gate_up.chunk(2)
        return [(gate, part.channels), (up, slice(part.intermediate_size + start, part.intermediate_size + stop))]


@dataclass(frozen=True)
class Flat:
    """All experts one below the other: gate, up and the transpose of down, each [E * I, H] (DBRX)."""

    gate: str
    up: str
    down: str

    @property
    def first(self) -> str:
        return self.gate

    def weights(self, num_experts: int) -> Iterator[str]:
        return iter((self.gate, self.up, self.down))

    def biases(self, num_experts: int) -> Iterator[str]:
        return iter(())

    def fill(self, expert: FeedForward, part: Part) -> None:
        shape = (part.num_experts * part.intermediate_size, part.hidden_size)
        first = part.expert * part.intermediate_size
        rows = slice(first + part.channels.start, first + part.channels.stop)
        gate, up = expert.gate_up_proj.chunk(2)
        for name, out in ((self.gate, gate), (self.up, up), (self.down, expert.down_proj.t())):
            part.read(out, name, shape, rows=rows)

    def check_unbiased(self, part: Part) -> None:
        """As for stacks."""


def _bias(weight: str) -> str:
    return f"{weight.removesuffix('.weight')}.bias"
