"""Whatever is imported runs as a service, on the hosts it asks for, and answers as the same layers in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve import Client, MoELayer
from moeserve.compat import SYSTEMS, load
from moeserve.config import ServiceConfig
from moeserve.errors import ConfigError
from tests.support.closeness import assert_close, near
from tests.support.harness import ServiceHarness

from .cases import nested

#: sizes that no answer's correctness depends on
SMALL = {
    "deepspeed": {"intermediate_size": 24},
    "colossalai": {"intermediate_size": 24},
    "mindformers": {"hidden_size": 32, "moe_intermediate_size": 24},
    "trustformers": {"hidden_size": 32, "intermediate_size": 24},
}
TOKENS = 50


def examples(system: str) -> Iterator[ServiceConfig]:
    """What the rows of the system's table show, and its sizes all at once; each different configuration once."""
    table, seen = SYSTEMS[system], set()
    for flat in ({**case.beside, param.name: case.example} for param in table.params for case in param.cases):
        with suppress(ConfigError):
            config = load(system, nested({**table.smallest, **flat, **SMALL[system]})).config
            if config.model_dump_json() not in seen:
                seen.add(config.model_dump_json())
                yield config


def all_sizes() -> Iterator[Any]:
    yield "deepspeed", {"ep_size": 2, "mp_size": 2, "enable_expert_tensor_parallelism": True, "use_residual": True}
    yield "mindformers", {"expert_parallel": 2, "model_parallel": 2, "shared_expert_num": 2, "group_wise_a2a": True}
    sizes = {
        "parallelism.dp_size": 2,
        "parallelism.mp_size": 2,
        "parallelism.pp_size": 2,
        "expert_parallelism.communication_pattern": "Ring",
    }
    yield "trustformers", {**sizes, "expert_parallelism.expert_parallel_size": 2, "expert_parallelism.experts_per_device": 4}


def check(config: ServiceConfig, folder: Path) -> None:
    """Service and layers in one process agree on answers, counts and losses."""
    with ServiceHarness(config.model_dump(exclude_unset=True), "local", folder) as service, Client(service.target) as client:
        for index, layer in enumerate(config.layers):
            drawn = torch.Generator().manual_seed(index)
            rows = torch.randn(TOKENS, layer.hidden_size or 0, generator=drawn)
            token_ids = torch.randint(2**32, (TOKENS,), generator=drawn) if layer.gating.routing == "hash" else None
            given = {key: getattr(layer, key) for key in layer.model_fields_set - {"name", "shared_expert"}}
            shared = layer.shared_expert.model_dump() if layer.shared_expert else None
            dtype = torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32
            expected = MoELayer(**given, shared_expert=shared, dtype=dtype, quantization=config.model.quantization).run(
                rows, token_ids=token_ids
            )
            out = client.forward(rows, layer=index, token_ids=token_ids)
            # As in every layer, and a shared expert of at most twice the others' size.
            summed = 4 * rows.shape[1] + 3 * service.sources[index].spec.intermediate_size
            assert_close(out.hidden_states, expected.hidden_states, summed, rounded_to=dtype)
            assert torch.equal(out.requested, expected.requested) and torch.equal(out.dropped, expected.dropped)
            assert out.aux_loss == near(expected.aux_loss, summed + TOKENS)


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_row(system: str, tmp_path: Path) -> None:
    configs = list(examples(system))
    assert len(configs) >= 10
    for index, config in enumerate(configs):
        (tmp_path / str(index)).mkdir()
        check(config, tmp_path / str(index))


@pytest.mark.parametrize(("system", "flat"), [*all_sizes()])
def test_all_sizes_at_once(system: str, flat: dict[str, Any], tmp_path: Path) -> None:
    config = load(system, nested({**SYSTEMS[system].smallest, **flat, **SMALL[system]})).config
    assert config.placement.num_hosts in {4, 16}
    check(config, tmp_path)
