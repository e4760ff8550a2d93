"""Are the tensors of the MoE layers those that are read? Names alone tell, so this works before anything is downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from moeserve.checkpoints.family import Family
from moeserve.checkpoints.huggingface import HuggingFaceLayer
from moeserve.checkpoints.keys import Config
from moeserve.checkpoints.safetensors_folder import SafetensorsFolder
from moeserve.checkpoints.wrappers import everywhere
from moeserve.errors import CheckpointError

#: what training leaves behind and no forward pass looks at: counts of tokens per expert, state of Transformer Engine, rotary tables
HARMLESS: Final = re.compile(
    r"(.*\.)?((local_|global_)?tokens_per_expert(_ema)?|expert_usage|expert_load|num_batches_tracked|_extra_state|inv_freq|[kvq]_scale)"
)


_OF_EXPERTS: Final = re.compile("expert|moe|router")
#: how many experts there are, in the words of all families
_COUNTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


def is_dense(config: Config, files: SafetensorsFolder) -> bool:
    """Whether nothing in the folder is about experts, whatever its `model_type`."""
    tables = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    has_count = any(table.get(key) not in (None, 0, 1) for table in tables for key in _COUNTS)
    return not has_count and not any(_OF_EXPERTS.search(name) for name in files.names)


def check_tensors(layer: HuggingFaceLayer, family: Family) -> None:
    """Every tensor that is read is there, and every tensor below the layer is read. Raises CheckpointError naming the first that is not."""
    files, read = layer.files, set[str]()
    for name in layer.tensors():
        stored = files.stored_as(name)
        if not stored:
            raise CheckpointError(f"{files.folder}: tensor {name} is missing")
        read.update(stored)
    # transformers writes projections of the experts that answer the token itself too, and never looks at them.
    for name in layer.layout.experts.weights(layer.spec.num_experts):
        read.update(files.stored_as(f"{layer.prefix}.{name}"))
    below = (name for part in _parts(layer, family) for name in files.below(part))
    unread = [name for name in below if name not in read and not HARMLESS.fullmatch(name)]
    if unread:
        others = f" (and {len(unread) - 1} more)" if len(unread) > 1 else ""
        raise CheckpointError(
            f"{files.folder}: tensor {unread[0]}{others} belongs to an MoE layer, but config.json describes a model that does not read it"
        )


def check_dense(indexes: Iterable[int], files: SafetensorsFolder, family: Family) -> None:
    """Layers that config.json says are dense have no gate. Raises CheckpointError naming the tensor."""
    for index in sorted(indexes):
        for layout in everywhere(family.layouts):
            router = f"{layout.prefix.format(index=index)}.{layout.router}"
            if router in files:
                raise CheckpointError(f"{files.folder}: config.json says that layer {index} is dense, but there is a tensor {router}")


def _parts(layer: HuggingFaceLayer, family: Family) -> Iterable[str]:
    """What the tensors of the MoE layer stand below, whichever of the family's layouts they have; of the experts alone without a gate."""
    layouts = everywhere(family.layouts) if layer.layout.router else [layer.layout]
    prefixes = [(layout.prefix.format(index=layer.index), layout.beside) for layout in layouts]
    return dict.fromkeys(f"{prefix}.{name}" if name else prefix for prefix, beside in prefixes for name in beside or ("",))
