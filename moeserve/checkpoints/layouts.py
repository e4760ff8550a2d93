"""How the experts of a layer are laid out on disk.

E experts, H hidden size, I intermediate size, i channels of a shard (I of a whole expert).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moeserve.checkpoints.safetensors_folder import SafetensorsFolder
from moeserve.errors import CheckpointError
from moeserve.experts import FeedForward


@dataclass(frozen=True)
class StoredPart:
    """What is to be read: `channels` of one expert of E, each H x I, whose tensors have names that begin with `prefix`."""

    files: SafetensorsFolder
    prefix: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    expert: int
    channels: slice


class Span(NamedTuple):
    """`rows` and `columns` (None = all) of a tensor of `shape`: a matrix or vector, or, stacked, one for each expert.

    transposed: rows are input channels. interleaved: gate and up channels alternate.
    """

    name: str
    shape: tuple[int, ...]
    rows: slice | None = None
    columns: slice | None = None
    is_stacked: bool = False
    transposed: bool = False
    interleaved: bool = False

    def read(self, out: torch.Tensor, part: StoredPart) -> None:
        """As `SafetensorsFolder.read_into`; out [rows, ...] stands as the layer has it, gate and up one after the other."""
        if self.interleaved:
            out = out.unflatten(0, (2, -1)).transpose(0, 1)
        if self.transposed:
            # To be filled column by column.
            out = out.movedim(-1, 0)
        if len(self.shape) - self.is_stacked == 1:
            out = out[None]
        expert = part.expert if self.is_stacked else None
        part.files.read_into(out, self.tensor(part), self.shape, expert, self.rows, self.columns)

    def tensor(self, part: StoredPart) -> str:
        """Its name in the checkpoint."""
        return f"{part.prefix}.{self.name.format(expert=part.expert)}"

    def must_be_zero(self, part: StoredPart) -> None:
        """AutoGPTQ writes biases for projections that have none. Raises CheckpointError when they are not zero."""
        name = self.tensor(part)
        if name in part.files and part.files.read(name, self.shape, torch.float32, part.expert if self.is_stacked else None).any():
            raise CheckpointError(f"{part.files.folder}: tensor {name} is not zero, but this projection has no bias")


class Spans(NamedTuple):
    """Where a part is. gate_up: the channels of gate, then those of up; or both interleaved in one."""

    gate_up: Sequence[Span]
    down: Span
    gate_up_bias: Sequence[Span]
    down_bias: Span


class ExpertLayout(ABC):
    """Names of tensors below the prefix of a layer, and where in them a gated expert is."""

    @property
    @abstractmethod
    def first(self) -> str:
        """A tensor that has weights of expert 0: its presence tells the layout, its type that of the weights."""

    @abstractmethod
    def spans(self, part: StoredPart) -> Spans: ...

    @abstractmethod
    def weights(self, num_experts: int) -> Iterator[str]:
        """All tensors of the layer's experts but their biases."""

    @abstractmethod
    def biases(self, num_experts: int) -> Iterator[str]:
        """The biases that experts of this layout have if they have any."""

    def fill(self, expert: FeedForward, part: StoredPart) -> None:
        """gate_up_proj [2i, H], gate first, down_proj [H, i], gate_up_bias [2i] and down_bias [H] where there are biases."""
        spans = self.spans(part)
        _read(spans.gate_up, expert.gate_up_proj, part)
        spans.down.read(expert.down_proj, part)
        self.fill_biases(expert.gate_up_bias, expert.down_bias, part)

    def fill_biases(self, gate_up_bias: torch.Tensor | None, down_bias: torch.Tensor | None, part: StoredPart) -> None:
        """The same."""
        spans = self.spans(part)
        if gate_up_bias is None or down_bias is None:
            for span in (*spans.gate_up_bias, spans.down_bias):
                span.must_be_zero(part)
        else:
            _read(spans.gate_up_bias, gate_up_bias, part)
            spans.down_bias.read(down_bias, part)


def _read(spans: Sequence[Span], out: torch.Tensor, part: StoredPart) -> None:
    for span, into in zip(spans, out.chunk(len(spans)), strict=True):
        span.read(into, part)


@dataclass(frozen=True)
class Separate(ExpertLayout):
    """A tensor for each projection of each expert: gate and up [I, H], down [H, I]; biases beside them. gate = "": there is none."""

    gate: str = "experts.{expert}.gate_proj.weight"
    up: str = "experts.{expert}.up_proj.weight"
    down: str = "experts.{expert}.down_proj.weight"

    @property
    def _projected(self) -> tuple[str, ...]:
        return (self.gate, self.up) if self.gate else (self.up,)

    @property
    def first(self) -> str:
        return self._projected[0].format(expert=0)

    def weights(self, num_experts: int) -> Iterator[str]:
        return (name.format(expert=expert) for expert in range(num_experts) for name in (*self._projected, self.down))

    def biases(self, num_experts: int) -> Iterator[str]:
        return map(_bias, self.weights(num_experts))

    def spans(self, part: StoredPart) -> Spans:
        hidden, intermediate, channels = part.hidden_size, part.intermediate_size, part.channels
        return Spans(
            [Span(name, (intermediate, hidden), rows=channels) for name in self._projected],
            Span(self.down, (hidden, intermediate), columns=channels),
            [Span(_bias(name), (intermediate,), columns=channels) for name in self._projected],
            Span(_bias(self.down), (hidden,)),
        )


@dataclass(frozen=True)
class Stacked(ExpertLayout):
    """All experts in a tensor: gate_up [E, 2I, H] and down [E, H, I], or transposed [E, H, 2I] and [E, I, H].

    transposed = None: the shapes of the tensors tell. interleaved: gate and up channels alternate instead of following one another.
    Biases are [E, 2I] and [E, H]. gated = False: there is no gate, and I where it says 2I.
    """

    gate_up: str = "experts.gate_up_proj"
    down: str = "experts.down_proj"
    transposed: bool | None = False
    interleaved: bool = False
    gate_up_bias: str = "experts.gate_up_proj_bias"
    down_bias: str = "experts.down_proj_bias"
    gated: bool = True

    @property
    def first(self) -> str:
        return self.gate_up

    def weights(self, num_experts: int) -> Iterator[str]:
        return iter((self.gate_up, self.down))

    def biases(self, num_experts: int) -> Iterator[str]:
        return iter((self.gate_up_bias, self.down_bias))

    def spans(self, part: StoredPart) -> Spans:
        count, hidden, channels = part.num_experts, part.hidden_size, self._channels(part)
        both, transposed = self._projected(part), self._is_transposed(part)
        return Spans(
            [_stacked(self.gate_up, (count, both, hidden), transposed, each)._replace(interleaved=self.interleaved) for each in channels],
            _stacked(self.down, (count, hidden, part.intermediate_size), transposed, None, part.channels),
            [Span(self.gate_up_bias, (count, both), None, each, is_stacked=True, interleaved=self.interleaved) for each in channels],
            Span(self.down_bias, (count, hidden), is_stacked=True),
        )

    def _projected(self, part: StoredPart) -> int:
        return part.intermediate_size * (2 if self.gated else 1)

    def _is_transposed(self, part: StoredPart) -> bool:
        if self.transposed is not None:
            return self.transposed
        # One of the two is square at most.
        count, hidden, intermediate = part.num_experts, part.hidden_size, part.intermediate_size
        expected = {self.gate_up: (count, hidden, self._projected(part)), self.down: (count, intermediate, hidden)}
        names = [f"{part.prefix}.{name}" for name in expected]
        # Before they are downloaded, as they are published.
        return not all(map(part.files.is_here, names)) or list(map(part.files.shape, names)) == list(expected.values())

    def _channels(self, part: StoredPart) -> Iterable[slice]:
        """Of the 2I on disk."""
        start, stop = part.channels.start, part.channels.stop
        if self.interleaved:
            return [slice(2 * start, 2 * stop)]
        return [slice(first + start, first + stop) for first in range(0, self._projected(part), part.intermediate_size)]


@dataclass(frozen=True)
class Stacks(ExpertLayout):
    """All experts in a tensor for each projection: gate and up [E, I, H], down [E, H, I]; without biases."""

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

    def spans(self, part: StoredPart) -> Spans:
        count, hidden, intermediate = part.num_experts, part.hidden_size, part.intermediate_size
        gate_up = [_stacked(name, (count, intermediate, hidden), False, part.channels) for name in (self.gate, self.up)]
        return Spans(gate_up, _stacked(self.down, (count, hidden, intermediate), False, None, part.channels), [], Span("", ()))


@dataclass(frozen=True)
class Joined(ExpertLayout):
    """One expert: gate and up in a tensor [2I, H], and down [H, I]; biases beside them."""

    gate_up: str
    down: str

    @property
    def first(self) -> str:
        return self.gate_up

    def weights(self, num_experts: int) -> Iterator[str]:
        return iter((self.gate_up, self.down))

    def biases(self, num_experts: int) -> Iterator[str]:
        return map(_bias, self.weights(num_experts))

    def spans(self, part: StoredPart) -> Spans:
        hidden, intermediate, channels = part.hidden_size, part.intermediate_size, part.channels
        parts = [slice(first + channels.start, first + channels.stop) for first in (0, intermediate)]
        return Spans(
            [Span(self.gate_up, (2 * intermediate, hidden), rows=each) for each in parts],
            Span(self.down, (hidden, intermediate), columns=channels),
            [Span(_bias(self.gate_up), (2 * intermediate,), columns=each) for each in parts],
            Span(_bias(self.down), (hidden,)),
        )


@dataclass(frozen=True)
class Flat(ExpertLayout):
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

    def spans(self, part: StoredPart) -> Spans:
        shape = (part.num_experts * part.intermediate_size, part.hidden_size)
        first = part.expert * part.intermediate_size
        rows = slice(first + part.channels.start, first + part.channels.stop)
        gate, up, down = (Span(name, shape, rows) for name in (self.gate, self.up, self.down))
        return Spans([gate, up], down._replace(transposed=True), [], Span("", ()))


def _stacked(name: str, shape: tuple[int, int, int], transposed: bool, rows: slice | None = None, columns: slice | None = None) -> Span:
    """Of a stack that has `shape`, or on disk that of its transposed matrices."""
    if transposed:
        shape, rows, columns = (shape[0], shape[2], shape[1]), columns, rows
    return Span(name, shape, rows, columns, is_stacked=True, transposed=transposed)


def _bias(weight: str) -> str:
    return f"{weight.removesuffix('.weight')}.bias"
