"""Experts as they are read -> experts in the form and place that a device computes them in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from operator import length_hint
from typing import Final

import torch

from moeserve.config import Kernel
from moeserve.experts.choice import Choice, chosen
from moeserve.experts.expert import Expert
from moeserve.experts.feed_forward import FeedForward
from moeserve.experts.held import Alone, HeldExpert
from moeserve.experts.packable import packable
from moeserve.experts.packed_expert import PackedExpert, pack
from moeserve.experts.ragged import ExpertStacks, StackedExpert, can_stack
from moeserve.kernels import WeightArenas, arena_bytes

_HELD: Final = (Alone, PackedExpert, StackedExpert)


class Placer:
    """For the experts of one layer, so that those of one kind are computed by one kernel, whenever they come.

    kernel: what computes feed-forward experts on the CPU. deterministic: the answer to a row is bitwise the same whatever other rows there
    are.
    """

    def __init__(self, device: torch.device, kernel: Kernel = "auto", deterministic: bool = False) -> None:
        self._device = device
        self._kernel = kernel
        self._deterministic = deterministic
        #: by kind of expert, that of the first; None = torch's operators
        self._kernels: dict[object, str | None] = {}
        #: by kind and size: experts that come later, in another thread with other settings, are computed like the first
        self._choices: dict[object, Choice] = {}

    def placed(self, experts: Iterable[Expert | HeldExpert], *, one_by_one: bool = False) -> Iterator[HeldExpert]:
        """Each expert when it is asked for; of an iterable that loads them, no more than one is in memory beside what is held.

        Those that are held already stay as they are. one_by_one: on CUDA, they are not computed together. Raises ConfigError when the
        kernel cannot run here.
        """
        arenas = WeightArenas(length_hint(experts))
        stacks = None if one_by_one or self._device.type != "cuda" else ExpertStacks(length_hint(experts), self._device)
        for expert in experts:
            held = expert if isinstance(expert, _HELD) else self._placed(expert, arenas, stacks)  # type: ignore[arg-type]
            del expert  # before the next is loaded
            yield held
            del held

    def _placed(self, expert: Expert, arenas: WeightArenas, stacks: ExpertStacks | None) -> HeldExpert:
        if stacks is not None and can_stack(expert):
            return stacks.place(expert)
        whole = packable(expert) if self._device.type == "cpu" else None
        if whole is None:
            return Alone(expert.to(self._device))
        shape = whole.kind, whole.down_proj.shape
        if shape not in self._choices:
            self._choices[shape] = chosen(whole, self._kernel, self._deterministic)
        choice = self._choices[shape]
        kernel = self._kernels.setdefault(whole.kind, choice.kernel)
        if kernel is not None:
            return pack(whole, kernel, expert.nbytes, arenas)
        if isinstance(expert, FeedForward):
            expert = replace(expert, forms=choice.forms).placed(arenas.arena(arena_bytes(expert.tensors.values())))
        return Alone(expert)
