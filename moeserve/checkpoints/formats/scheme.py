"""What config.json says of how weights are stored, and what the names in the index say: which format each weight has."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

from moeserve.checkpoints.formats.number_format import NumberFormat, Plain
from moeserve.checkpoints.formats.pattern import is_in
from moeserve.config import MAX_SIZE

Settings = Mapping[str, Any]

#: (name of a weight, names in the index) -> its format, None when the index has no tensors of that format for it
Recipe = Callable[[str, Container[str]], NumberFormat | None]

#: what is beside a weight, or in its place, when it is stored in some format of few bits
_TELLTALE: Final = ("_scale_inv", "_scale", "_packed", "_scale_2", "_global_scale", "_weight_scale")
_TELLTALE_OF_MODULES: Final = (".qweight", ".qscale_weight", ".scale", ".scales", ".qzeros")


@dataclass(frozen=True)
class Scheme:
    """How the weights of one checkpoint are stored.

    recipe: that of a module, by name; None = the configuration says nothing of it. is_excluded: whether the configuration may mean that
    the module stays as it is, by the widest reading there is: what is stored decides.
    """

    recipe: Callable[[str], Recipe | None]
    is_excluded: Callable[[str], bool]
    #: as messages call what the configuration says
    title: str

    def format_of(self, name: str, index: Container[str]) -> NumberFormat | None:
        """None when no tensor of it is in the index. Raises ValueError for tensors that the configuration does not explain."""
        recipe = self.recipe(module_of(name))
        found = recipe(name, index) if recipe is not None else None
        if found is not None:
            missing = next((part for part in found.names if part not in index), None)
            if missing is not None:
                raise ValueError(f"tensor {missing} is missing, which belongs to {name} as {found.title}")
            return found
        if name not in index:
            told = next((told for told in telltales(name) if told in index), None)
            if told is not None:
                raise ValueError(f"the index has {told}, but {self.title} does not say how {name} is stored")
            return None
        if recipe is not None and _is_expert(name) and not self.is_excluded(module_of(name)):
            raise ValueError(f"{self.title} says that {name} is stored in few bits, but the index has no scales of it")
        return Plain(name)


#: every tensor is what its name says
AS_IS: Final = Scheme(lambda module: lambda name, index: Plain(name) if name in index else None, lambda module: True, "the checkpoint")


def _is_expert(name: str) -> bool:
    """Of gates and the like configurations do not always say that they stay as they are."""
    return ".experts." in name and name.endswith(".weight")


def module_of(name: str) -> str:
    """The module that has the weight of this name."""
    return name.removesuffix(".weight")


def telltales(name: str) -> list[str]:
    """Tensors that only a weight in few bits has, whatever the format."""
    beside = [f"{name}{suffix}" for suffix in _TELLTALE]
    return beside + [f"{module_of(name)}{suffix}" for suffix in _TELLTALE_OF_MODULES] if name.endswith(".weight") else beside


def mentions(patterns: object) -> Callable[[str], bool]:
    """Whether one of the patterns, in whatever style (part of a name, `re:`, shell), could mean a module."""
    if not isinstance(patterns, list):
        return lambda module: False
    texts = [str(pattern).removeprefix("re:") for pattern in patterns]

    def is_mentioned(module: str) -> bool:
        return any(text in module or is_in(text, module) or is_in(text.replace(".", r"\.").replace("*", ".*"), module) for text in texts)

    return is_mentioned


def positive(settings: Settings, key: str, default: int | None = None) -> int:
    """Raises ValueError with one sentence."""
    value = settings.get(key, default)
    if not is_size(value):
        raise ValueError(f"quantization_config.{key} is {value!r}; allowed: a positive whole number, at most {MAX_SIZE}")
    return value


def is_size(value: object) -> TypeGuard[int]:
    """Whether so many rows or columns can share a scale."""
    return type(value) is int and 1 <= value <= MAX_SIZE
