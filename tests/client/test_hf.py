"""Hugging Face models with remote experts against the same models with their own."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import moeserve
from moeserve import Client, ConfigError, MoEServeError, connect_experts
from tests.support.closeness import assert_close
from tests.support.engine import Experts, FakeEngine, identity, spec
from tests.support.servers import served

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: in a whole model: two layers, each with norms, attention and experts over at most eight times the hidden size; then norm and head
SUMMED = 2 * 8 * 32 + 2 * 32
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
FAMILIES: dict[str, dict[str, object]] = {
    "mixtral": LOCAL,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "qwen3_moe": {**EXPERTS, "head_dim": 16, "norm_topk_prob": True},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": DEEPSEEK,
    "granitemoe": LOCAL,
    "phimoe": LOCAL,
    "gpt_oss": {**LOCAL, "head_dim": 16},
}


def local_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager", dtype=dtype).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "_apply_gate")}


def as_layer(experts: nn.Module) -> Experts:
    def run(hidden_states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return experts(hidden_states, ids, weights.to(hidden_states.dtype))

    return run


def serving(model: nn.Module, names: list[str] | None = None) -> FakeEngine:
    found = experts_of(model)
    names = [name.rpartition(".")[0] for name in found] if names is None else names
    return FakeEngine([(spec(name, 32, 4), as_layer(experts)) for name, experts in zip(names, found.values(), strict=True)])


def remote_model(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The same model, from disk as users do it, with every expert weight ruined: none may be used."""
    model.save_pretrained(folder)
    remote = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moeserve", dtype=model.dtype).eval()
    for experts in experts_of(remote).values():
        for parameter in experts.parameters():
            nn.init.constant_(parameter, float("nan"))
    return remote


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_remote_experts_give_the_same_logits(family: str, tmp_path: Path, input_ids: torch.Tensor) -> None:
    model = local_model(family)
    engine = serving(model)
    remote = remote_model(model, tmp_path)
    with served(engine) as (target, _, _), connect_experts(remote, target), torch.no_grad():
        assert_close(remote(input_ids).logits, model(input_ids).logits, summed=SUMMED)
    assert [layer for layer, _ in engine.requests] == list(range(len(engine.layers)))
    assert all(request.num_tokens == 10 and request.is_routed for _, request in engine.requests)


def test_bfloat16_stays_bfloat16_and_generation_works(tmp_path: Path, input_ids: torch.Tensor) -> None:
    model = local_model("mixtral", torch.bfloat16)
    engine = serving(model)
    remote = remote_model(model, tmp_path)
    with served(engine) as (target, _, _), connect_experts(remote, target), torch.no_grad():
        assert remote(input_ids).logits.dtype == torch.bfloat16
        ours, theirs = (each.generate(input_ids, max_new_tokens=4, do_sample=False) for each in (remote, model))
    assert torch.equal(ours, theirs)
    assert {request.hidden_states.dtype for _, request in engine.requests} == {torch.bfloat16}


@pytest.fixture
def model() -> PreTrainedModel:
    return local_model("qwen2_moe")


@pytest.fixture
def remote(model: PreTrainedModel, tmp_path: Path) -> PreTrainedModel:
    return remote_model(model, tmp_path)


@pytest.fixture
def client(model: PreTrainedModel) -> Iterator[Client]:
    with served(serving(model)) as (target, _, _), Client(target) as client:
        yield client


def test_a_model_that_is_not_connected_says_what_to_do(remote: PreTrainedModel, input_ids: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=r"call moeserve\.connect_experts\(model, target\) first"):
        remote(input_ids)


def test_it_is_found_under_its_names_of_today_and_of_before() -> None:
    from moeserve.client import hf as former
    from moeserve.client import hf_loader as former_loader
    from moeserve.engines import hf

    assert hf.load_model is former.load_model is former_loader.load_model is moeserve.load_model
    assert hf.connect_experts is former.connect_experts is connect_experts
    with pytest.raises(AttributeError, match="load_models"):
        hf.load_models  # noqa: B018


def test_a_copy_is_not_connected(remote: PreTrainedModel, client: Client, input_ids: torch.Tensor) -> None:
    assert connect_experts(remote, client) is client
    with pytest.raises(ConfigError, match="not connected"):
        copy.deepcopy(remote)(input_ids)


def test_sequences_of_a_batch_keep_their_shape(model: PreTrainedModel, remote: PreTrainedModel, client: Client) -> None:
    connect_experts(remote, client)
    name, experts = next(iter(experts_of(remote).items()))
    hidden_states, ids, weights = torch.randn(2, 3, 32), torch.tensor([[[0, 1], [1, 2], [2, 3]]] * 2), torch.rand(2, 3, 2)
    with torch.no_grad():
        got = experts(hidden_states, ids, weights)
        expected = model.get_submodule(name)(hidden_states.flatten(0, 1), ids.flatten(0, 1), weights.flatten(0, 1))
    assert_close(got, expected.view(2, 3, 32))


def test_gradients_are_refused_not_lost(remote: PreTrainedModel, client: Client, input_ids: torch.Tensor) -> None:
    connect_experts(remote, client)
    loss = remote(input_ids).logits.sum()
    with pytest.raises(MoEServeError, match="no gradient flows"):
        loss.backward()


def test_a_model_loaded_without_the_implementation_is_refused(model: PreTrainedModel, client: Client) -> None:
    with pytest.raises(ConfigError, match='experts_implementation="moeserve"'):
        connect_experts(model, client)


@pytest.mark.parametrize("prefix", ["", "language_model.model."])
def test_prefixes_do_not_matter(model: PreTrainedModel, remote: PreTrainedModel, prefix: str, input_ids: torch.Tensor) -> None:
    assert_same_with(serving(model, [f"{prefix}layers.{n}.mlp" for n in range(2)]), model, remote, input_ids)


def test_names_win_over_order(model: PreTrainedModel, remote: PreTrainedModel, input_ids: torch.Tensor) -> None:
    engine = serving(model)
    swapped = FakeEngine(list(zip(engine.layers, engine._experts, strict=True))[::-1])
    assert_same_with(swapped, model, remote, input_ids)


def test_the_same_name_wins_over_one_that_ends_alike(model: PreTrainedModel, remote: PreTrainedModel, input_ids: torch.Tensor) -> None:
    engine = serving(model)
    further = [(spec(f"draft.{layer.name}", 32, 4), identity) for layer in engine.layers]
    assert_same_with(FakeEngine([*zip(engine.layers, engine._experts, strict=True), *further]), model, remote, input_ids)


def test_names_that_say_nothing_go_by_order(model: PreTrainedModel, remote: PreTrainedModel, input_ids: torch.Tensor) -> None:
    assert_same_with(serving(model, ["first", "second"]), model, remote, input_ids)


def assert_same_with(engine: FakeEngine, model: PreTrainedModel, remote: PreTrainedModel, input_ids: torch.Tensor) -> None:
    with served(engine) as (target, _, _), connect_experts(remote, target), torch.no_grad():
        assert_close(remote(input_ids).logits, model(input_ids).logits, summed=SUMMED)


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ([spec("model.layers.0.mlp", 32, 4)], r"not served: model\.layers\.1\.mlp\.experts; served: model\.layers\.0\.mlp"),
        ([spec("only", 32, 4)], "the model has 2 MoE layers and the service 1"),
        ([spec("mlp", 32, 4)], r"layers\.0\.mlp\.experts and model\.layers\.1\.mlp\.experts would both be the served layer mlp"),
        (
            [spec(f"{part}.model.layers.{n}.mlp", 32, 4) for part in ("one", "two") for n in range(2)],
            r"model\.layers\.0\.mlp\.experts may be any of the served layers one\.model\.layers\.0\.mlp, two\.model\.layers\.0\.mlp",
        ),
        ([spec(f"model.layers.{n}.mlp", 32, 8) for n in range(2)], "has 4 experts of hidden size 32, .* has 8 of 32"),
        ([spec(f"model.layers.{n}.mlp", 64, 4) for n in range(2)], "has 4 experts of hidden size 32, .* has 4 of 64"),
    ],
)
def test_a_service_of_another_model_is_refused(remote: PreTrainedModel, layers: list, sentence: str) -> None:
    engine = FakeEngine([(layer, identity) for layer in layers])
    with served(engine) as (target, _, _), pytest.raises(ConfigError, match=sentence):
        connect_experts(remote, target)


def test_a_client_whose_calls_are_awaited_is_refused(remote: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="target is an AsyncClient, and a model does not await its experts"):
        connect_experts(remote, moeserve.AsyncClient("127.0.0.1:1"))  # type: ignore[arg-type]


def test_a_service_that_is_not_there_is_named(remote: PreTrainedModel) -> None:
    with pytest.raises(moeserve.ExpertUnavailable, match=r"127\.0\.0\.1:1 is unavailable"):
        connect_experts(remote, "127.0.0.1:1")


@pytest.mark.parametrize("order", ["import moeserve.client; import transformers", "import transformers; import moeserve.client"])
def test_the_implementation_is_known_as_soon_as_both_are_imported(order: str) -> None:
    program = f"{order}; from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS; assert 'moeserve' in ALL_EXPERTS_FUNCTIONS"
    subprocess.run([sys.executable, "-c", program], check=True)
