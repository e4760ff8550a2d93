"""Where a folder says how its weights are stored: in config.json, or in the files that tools write beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from moeserve.checkpoints.formats import Scheme, scheme_of
from moeserve.checkpoints.json_file import read_json
from moeserve.errors import CheckpointError

_KEY: Final = "quantization_config"
#: file -> the method it is about: NVIDIA's Model Optimizer, AutoGPTQ, AutoAWQ
BESIDE: Final = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}


def read_scheme(folder: Path, config: Mapping[str, Any]) -> Scheme:
    """How the weights of the folder are stored. Raises CheckpointError naming the file and the key."""
    where, settings = folder / "config.json", config.get(_KEY)
    if settings is None:
        # Models that see or hear have it in the table of the language model.
        tables = (table for table in config.values() if isinstance(table, Mapping))
        settings = next((table[_KEY] for table in tables if table.get(_KEY) is not None), None)
    beside = next((name for name in BESIDE if (folder / name).is_file()), None)
    if settings is None and beside is not None:
        where = folder / beside
        settings = {"quant_method": BESIDE[beside], **read_json(where)}
    try:
        return scheme_of(settings, config)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
