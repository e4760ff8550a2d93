"""Lazy, checked access to the tensors in a folder of DeepSpeed; nothing that its pickles name is imported, made or run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import torch

from moeserve.api.tensors import FLOAT_DTYPES, dtype_name
from moeserve.checkpoints.deepspeed_rest import GATE, Rest, joined
from moeserve.checkpoints.torch_file import TorchFile
from moeserve.config import Dtype
from moeserve.errors import CheckpointError
from moeserve.files import read_file

_MAIN = "mp_rank_00_model_states.pt"
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_EXPERTS = ".deepspeed_moe.experts.deepspeed_experts."
#: a folder's name is no longer
_MAX_TAG_BYTES = 1024
#: where torch keeps what a module has beside its tensors
_EXTRA_STATE = "_extra_state"


class DeepSpeedFolder:
    """The layers of one tag of a checkpoint. Raises CheckpointError naming the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = {(int(found[1]), int(found[2])): file for file, found in _expert_files(path) if int(found[3]) == 0}
        if any(int(found[3]) for _, found in _expert_files(path)):
            raise CheckpointError(f"{path} has experts that are split over model-parallel ranks; supported: one rank")
        for number in range(self.num_layers):
            for expert in range(self.num_experts(number)):
                if (number, expert) not in self._files:
                    raise CheckpointError(f"{path}: layer_{number}_expert_{expert}_mp_rank_00_model_states.pt is missing")

    @classmethod
    def find(cls, folder: Path) -> Self | None:
        """The folder itself, or the tag that its `latest` names; None without files of experts."""
        try:
            tag = _latest(folder)
            for path in (folder, *((folder / tag,) if tag and tag == Path(tag).name else ())):
                if path.is_dir() and _expert_files(path):
                    return cls(path)
        except OSError as error:
            raise CheckpointError(f"checkpoint folder {folder} cannot be read: {error.strerror}") from None
        return None

    @property
    def num_layers(self) -> int:
        """How many MoE layers there are: numbers count from 0."""
        return max(number for number, _ in self._files) + 1

    def num_experts(self, number: int) -> int:
        """How many experts the layer has: numbers count from 0."""
        return max((expert for layer, expert in self._files if layer == number), default=0) + 1

    def file(self, number: int, expert: int) -> Path:
        """The file of one expert."""
        return self._files[number, expert]

    def name(self, number: int) -> str:
        """What the model calls the layer; "moe" where the layer is the model."""
        return self._prefixes[number] or "moe"

    def expert(self, number: int, expert: int, *, read: str | None = None) -> dict[str, torch.Tensor]:
        """The tensors of one expert, by its own names: on the device "meta", but for the one of the name `read`."""
        file, start = TorchFile(self.file(number, expert)), f"{_EXPERTS}{expert}."
        names = {name: name.rpartition(start) for name in file.items if not name.endswith(_EXTRA_STATE)}
        if not names or any(not middle for _, middle, _ in names.values()):
            raise CheckpointError(f"{file.path}: its tensors are not named …{start}…, as those of one expert are")
        return {theirs: file.tensor(name, file.items[name], is_read=theirs == read) for name, (_, _, theirs) in names.items()}

    def gate_shape(self, number: int) -> tuple[int, int]:
        """E and H."""
        name = self.of_layer(number, GATE)
        gate = self.rest.tensor(name, is_read=False)
        if gate is None or gate.dim() != 2:
            raise CheckpointError(f"{self.rest.path}: tensor {name} is not a matrix")
        return gate.shape[0], gate.shape[1]

    def has_residual(self, number: int) -> bool:
        """Whether a dense branch is mixed with the experts (Residual MoE)."""
        return self.of_layer(number, "coefficient.weight") in self.rest

    def of_layer(self, number: int, name: str) -> str:
        """The name of a tensor of the layer in `rest`."""
        return joined(self._prefixes_of_rest[number], name)

    def dtype(self, number: int) -> Dtype:
        """Of the experts."""
        stored = next(iter(self.expert(number, 0).values())).dtype
        found = next((name for name, dtype in FLOAT_DTYPES.items() if dtype == stored), None)
        if found is None:
            raise CheckpointError(f"{self.file(number, 0)}: experts are {dtype_name(stored)}; supported: {', '.join(FLOAT_DTYPES)}")
        return found  # type: ignore[return-value]

    @cached_property
    def rest(self) -> Rest:
        """All but the experts."""
        return Rest(self.path / _MAIN)

    @cached_property
    def _prefixes(self) -> list[str]:
        """Where each layer stands in the model, by the files of its experts."""
        return [self._prefix(self.file(number, 0)) for number in range(self.num_layers)]

    @cached_property
    def _prefixes_of_rest(self) -> list[str]:
        return self.rest.prefixes(self._prefixes)

    def _prefix(self, file: Path) -> str:
        prefixes = {name.partition(_EXPERTS)[0] for name in TorchFile(file).items}
        if len(prefixes) != 1:
            raise CheckpointError(f"{file}: its tensors are not those of one layer: {sorted(prefixes)}")
        return prefixes.pop()


class DeepSpeedTensors:
    """The tensors of one layer by moeserve's names. parts: its names of the tensors of an expert -> theirs; empty for modules."""

    def __init__(self, folder: DeepSpeedFolder, number: int, name: str, parts: Mapping[str, str]) -> None:
        self._folder, self._number, self._name, self._parts = folder, number, name, parts

    def __contains__(self, name: str) -> bool:
        return self._find(name, is_read=False)[2] is not None

    def files_below(self, prefix: str) -> Sequence[Path]:
        """Those of its experts, and that of everything else."""
        assert prefix == self._name, "it has one layer"
        experts = range(self._folder.num_experts(self._number))
        return [self._folder.rest.path, *(self._folder.file(self._number, expert) for expert in experts)]

    def read(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A copy of the tensor, which must have `shape`, cast to `dtype`; finite."""
        path, theirs, found = self._find(name, is_read=False)
        if found is None:
            raise CheckpointError(f"{path}: tensor {theirs} is missing")
        if found.dtype not in FLOAT_DTYPES.values():
            raise CheckpointError(f"{path}: tensor {theirs} is stored as {dtype_name(found.dtype)}; supported: {', '.join(FLOAT_DTYPES)}")
        if found.shape != tuple(shape):
            raise CheckpointError(f"{path}: tensor {theirs} has shape {list(found.shape)}, expected {list(shape)}")
        _, _, numbers = self._find(name, is_read=True)
        if numbers is None or (numbers.dtype, numbers.shape) != (found.dtype, found.shape):
            raise CheckpointError(f"{path} changed while the checkpoint was read; load it again when no process writes to it")
        tensor = numbers.to(dtype)
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: tensor {theirs} holds NaN or Inf as {dtype_name(dtype)}")
        return tensor

    def _find(self, name: str, *, is_read: bool) -> tuple[Path, str, torch.Tensor | None]:
        kind, _, rest = name.removeprefix(f"{self._name}.").partition(".")
        if kind == "experts":
            expert, _, part = rest.partition(".")
            theirs = self._parts.get(part, part)
            found = self._folder.expert(self._number, int(expert), read=theirs if is_read else None)
            return self._folder.file(self._number, int(expert)), theirs, found.get(theirs)
        theirs = {
            "gate": f"deepspeed_moe.gate.wg.{rest}",
            "mixer": f"coefficient.{rest}",
            "shared_expert": f"mlp.{self._parts.get(rest, rest)}",
        }[kind]
        theirs = self._folder.of_layer(self._number, theirs)
        return self._folder.rest.path, theirs, self._folder.rest.tensor(theirs, is_read=is_read)


def _latest(folder: Path) -> str:
    """The tag that the file of that name holds; "" without one. Raises CheckpointError when it is no name."""
    latest = folder / "latest"
    if not latest.is_file():
        return ""
    try:
        return read_file(latest, _MAX_TAG_BYTES).decode("utf-8").strip()
    except UnicodeDecodeError:
        raise CheckpointError(f"{latest} is not text; expected the name of a folder") from None
    except OSError as error:
        raise CheckpointError(f"{latest} cannot be read: {error.strerror}") from None


def _expert_files(path: Path) -> list[tuple[Path, re.Match[str]]]:
    return [(file, found) for file in sorted(path.iterdir()) if (found := _EXPERT.fullmatch(file.name))]
