"""Which family a class of transformers is of: `architectures` of config.json beside its `model_type`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

#: MixtralForCausalLM, Llama4ForConditionalGeneration, Qwen3MoeModel, ...
_CLASS: Final = re.compile(r"(\w+?)(For[A-Z]\w*|Model|LMHeadModel)")
#: Of longer names there is no class, and the time to match one grows with the square of its length.
_MAX_CLASS: Final = 256
#: model types that are not just their class's name in lower case
_ELSEWHERE: Final = {
    "hunyuanmoev1": "hunyuanv1moe",
    "minimaxm3sparse": "minimaxm3vl",
    "qwen3omnimoethinker": "qwen3omnimoe",
    "step3p7": "step3p5",
}


def named_family(config: Mapping[str, Any], model_types: Iterable[str]) -> str | None:
    """Of the model types, the one whose class `architectures` names first; None when it is the config's own, or names no known class."""
    own = _plain(str(config.get("model_type")))
    architectures = config.get("architectures")
    by_name = {_plain(model_type): model_type for model_type in reversed(list(model_types))}
    for architecture in architectures if isinstance(architectures, list) else ():
        match = _CLASS.fullmatch(str(architecture)) if len(str(architecture)) <= _MAX_CLASS else None
        stem = _plain(match[1]) if match else ""
        stem = _ELSEWHERE.get(stem, stem)
        if stem == own:
            return None
        if stem in by_name:
            return by_name[stem]
    return None


def _plain(name: str) -> str:
    """What a class and its model type have in common; the text model of a wrapper is written as the same class."""
    return re.sub(r"[^a-z0-9]", "", name.lower()).removesuffix("text")
