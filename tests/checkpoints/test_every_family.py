"""Every family against its block in transformers: in one process, and behind hosts that hold whole experts or shards of them.

T tokens, H hidden size, K choices per token.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from moeserve import Client, MoELayer
from moeserve.checkpoints.families import FAMILIES, family_of, is_known
from moeserve.checkpoints.layouts import Separate, Stacked
from tests.checkpoints.newer_settings import NEWER_SETTINGS
from tests.checkpoints.saved import rewritten, saved, stacked, tensors_of
from tests.checkpoints.tiny_models import EXPERTS, SETTINGS, answer_of, moe_block, some_tokens, tiny_model
from tests.support.closeness import assert_close, relative_bound
from tests.support.harness import ServiceHarness

#: those that transformers does not have: test_families_by_keys.py
BY_KEYS = {"bailing_moe", "kimi_k2", "minimax_m1"}
#: those whose gate is not served: test_gates_of_callers.py
BY_CALLERS = {"gemma4", "inkling", "zaya"}
#: those whose experts transformers saves one by one, and whose names it does not change
BOTH_LAYOUTS = [
    name
    for name, family in FAMILIES.items()
    if name in SETTINGS and name not in NEWER_SETTINGS and {Separate, Stacked} <= {type(layout.experts) for layout in family.layouts}
]


def layer_of(family: str, folder: Path, dtype: torch.dtype | None = None) -> MoELayer:
    return MoELayer.from_checkpoint(folder, family_of(family).layer_name.format(index=1), dtype=dtype)


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.abs().max() > 0.1
    assert_close(ours, theirs)


def test_every_family_is_tested() -> None:
    assert {name.removesuffix("_text") for name in SETTINGS} | BY_KEYS | BY_CALLERS == set(FAMILIES)


def test_every_moe_model_of_transformers_is_served_or_said_not_to_be() -> None:
    listed = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    modeling = [path for path in Path(transformers.models.__path__[0]).glob("*/modeling_*.py") if "Experts(nn.Module)" in path.read_text()]
    assert len(modeling) > 60
    missing = {path.parent.name for path in modeling if not is_known(path.parent.name) and f"`{path.parent.name}`" not in listed}
    assert not missing


@pytest.mark.parametrize("family", SETTINGS)
def test_the_layer_equals_the_block(family: str) -> None:
    layer, block = layer_of(family, saved(family)), moe_block(tiny_model(family), family)
    for num_tokens in (1, 7, 64, 513):
        hidden_states = some_tokens(num_tokens)
        assert_equal(layer(hidden_states), answer_of(block, hidden_states))
    out = layer.run(some_tokens(64), return_routing=True)
    assert out.topk_ids is not None
    assert len({tuple(sorted(ids)) for ids in out.topk_ids.tolist()}) > EXPERTS, "the router must tell tokens apart"


@pytest.mark.parametrize("family", SETTINGS)
def test_in_bfloat16(family: str) -> None:
    """Their routers compute in bfloat16 and may choose another expert where two are almost equal; those tokens are left out."""
    layer, block = layer_of(family, saved(family, torch.bfloat16)), moe_block(tiny_model(family, torch.bfloat16), family)
    assert layer.bank.dtype == torch.bfloat16
    hidden_states = some_tokens(513, torch.bfloat16)
    ours, theirs = layer(hidden_states).float(), answer_of(block, hidden_states).float()
    same = (ours - theirs).norm(dim=1) < 0.1 * theirs.norm(dim=1)
    assert same.float().mean() > 0.9
    assert (ours - theirs)[same].norm() < relative_bound(0, torch.bfloat16) * theirs[same].norm()


@pytest.mark.parametrize("family", BOTH_LAYOUTS)
def test_stacked_experts(family: str, tmp_path: Path) -> None:
    tensors = stacked(tensors_of(saved(family)))
    assert any(name.endswith("experts.gate_up_proj") for name in tensors)
    folder = rewritten(saved(family), tmp_path, tensors)
    assert_equal(layer_of(family, folder)(some_tokens(64)), layer_of(family, saved(family))(some_tokens(64)))


@pytest.mark.parametrize(
    "family", ["mixtral", "minimax_m2", "phimoe", "exaone_moe", "granitemoe", "gpt_oss", "jamba", "qwen3_next", "dbrx"]
)
def test_the_names_of_the_model_in_memory(family: str, tmp_path: Path) -> None:
    """As `state_dict` has them, before `save_pretrained` turns them back into those a model was published with."""
    folder = rewritten(saved(family), tmp_path, tiny_model(family).state_dict())
    assert_equal(layer_of(family, folder)(some_tokens(64)), layer_of(family, saved(family))(some_tokens(64)))


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "granitemoe", "llama4"])
def test_in_many_files(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_equal(layer_of(family, tmp_path)(some_tokens(64)), layer_of(family, saved(family))(some_tokens(64)))


HOSTS = {
    "one host": {"num_hosts": 1},
    "three hosts": {"num_hosts": 3},
    "halves": {"num_hosts": 2, "tensor_parallel": 2},
    "thirds": {"num_hosts": 3, "tensor_parallel": 3},
}


@pytest.mark.parametrize(
    ("family", "hosts"),
    [(family, hosts) for family in SETTINGS for hosts in HOSTS if family not in NEWER_SETTINGS or hosts in ("one host", "three hosts")],
)
def test_behind_hosts(family: str, hosts: str, tmp_path: Path) -> None:
    config = {"model": {"checkpoint": saved(family), "layers": [family_of(family).layer_name.format(index=1)]}, "placement": HOSTS[hosts]}
    block = moe_block(tiny_model(family), family)
    with ServiceHarness(config, "local", tmp_path) as service, Client(service.target) as client:
        for num_tokens in (1, 7):
            hidden_states = some_tokens(num_tokens)
            assert_equal(client.forward(hidden_states, layer=0).hidden_states, answer_of(block, hidden_states))
