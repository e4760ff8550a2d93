"""What a model of DeepSpeed has beside its experts: `module` in mp_rank_00_model_states.pt.

DeepSpeed writes it flat, `a.b.weight`; trainers as Megatron-DeepSpeed nest it by parts of the model, {"a": {"b.weight": …}}, may have had a
wrapper around the model when they wrote one of the two kinds of files, and put what else they need beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moeserve.checkpoints.torch_file import TorchFile, items_of
from moeserve.errors import CheckpointError

GATE = "deepspeed_moe.gate.wg.weight"
_MAX_NAME = 4096


class Rest:
    """Its tensors, by names as long as those of the experts; read when asked for. Raises CheckpointError naming the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def tensor(self, name: str, *, is_read: bool = True) -> torch.Tensor | None:
        """On the device "meta" unless `is_read`; None when there is nothing of that name."""
        return self._file.tensor(name, self._values[name], is_read=is_read) if name in self._values else None

    def prefixes(self, prefixes: Sequence[str]) -> list[str]:
        """Where the layers stand here whose experts say that they stand at `prefixes`: there, or with other parts in front."""
        gates = [name.removesuffix(GATE).removesuffix(".") for name in self._values if name == GATE or name.endswith(f".{GATE}")]
        found = [self._prefix(prefix, gates) for prefix in prefixes]
        for number, gate in enumerate(found):
            if gate in found[:number]:
                raise CheckpointError(f"{self.path}: gate {gate} is that of {prefixes[found.index(gate)]} or of {prefixes[number]}")
        return found

    def _prefix(self, prefix: str, gates: Sequence[str]) -> str:
        found = [gate for gate in gates if gate == prefix] or [gate for gate in gates if _end_alike(gate, prefix)]
        if len(found) == 1:
            return found[0]
        raise CheckpointError(f"{self.path}: tensor {joined(prefix, GATE)} is missing; it has gates of {', '.join(gates) or 'no layer'}")

    @cached_property
    def _file(self) -> TorchFile:
        return TorchFile(self.path)

    @cached_property
    def _values(self) -> dict[str, Any]:
        module = items_of(self._file.items.get("module"))
        if module is None:
            raise CheckpointError(f"{self.path} has no `module`, the state dict of the model")
        return self._flat(module)

    def _flat(self, module: Mapping[Any, Any]) -> dict[str, Any]:
        """Every value that is no mapping, by the keys that lead to it; a mapping that is there twice counts where it comes first.

        A key that is no text and no number is part of no name.
        """
        found: dict[str, Any] = {}
        waiting, seen = deque([("", module)]), {id(module)}
        while waiting:
            prefix, mapping = waiting.popleft()
            for key, value in mapping.items():
                if not isinstance(key, str | int):
                    continue
                name, inner = joined(prefix, str(key)), items_of(value)
                if len(name) > _MAX_NAME:
                    raise CheckpointError(f"{self.path}: the name of a tensor has more than {_MAX_NAME} characters")
                if inner is None and found.setdefault(name, value) is not value:
                    raise CheckpointError(f"{self.path}: there are two tensors {name}")
                if inner is not None and id(inner) not in seen:
                    seen.add(id(inner))
                    waiting.append((name, inner))
        return found


def joined(prefix: str, name: str) -> str:
    """The layer may be the model."""
    return f"{prefix}.{name}" if prefix else name


def _end_alike(one: str, other: str) -> bool:
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")
