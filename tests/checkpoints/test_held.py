"""Experts that are held as they are published: the bytes of the file, the numbers of the file, unless something else is asked for.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moeserve import CheckpointError, Client, ConfigError, MoELayer
from moeserve.checkpoints import LayerSource, bank_bytes, layer_sources, load_bank
from moeserve.checkpoints.swapped import Swap
from moeserve.config import Quantization, load_config
from moeserve.experts import ExpertShard, FeedForward, QuantizedFeedForward
from tests.checkpoints.published import PUBLISHED
from tests.checkpoints.published_case import HIDDEN, INTERMEDIATE, LAYER, original, published_case
from tests.checkpoints.saved import rewritten, tensors_of
from tests.checkpoints.tiny_models import answer_of, some_tokens
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness
from tests.support.planning import swapped
from tests.support.stacked import in_full

#: formats that say for every column in which group it is
ORDERED = {name for name in PUBLISHED if name.startswith("gptq")}
#: tensors of these are about something else than weights, or are held as a number in Python
OTHERS = ("input_scale", "weight_scale_2", "global_scale", "weight_shape")


@pytest.fixture(scope="module", params=PUBLISHED)
def case(request: pytest.FixtureRequest) -> tuple[str, Path, nn.Module]:
    return request.param, *published_case(request.param)


@pytest.fixture(scope="module")
def fp8() -> tuple[Path, nn.Module]:
    return published_case("fp8")


def source_of(folder: Path, quantization: Quantization | None = None, dtype: str | None = None) -> LayerSource:
    model = {"checkpoint": folder, "layers": [LAYER], "quantization": quantization, "dtype": dtype}
    return layer_sources(load_config({"model": model}))[0]


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def bytes_in_file(name: str, tensor: Tensor, bits: int, has_order: bool) -> int:
    """That are to be held: zeros have a byte each, codes of 2 bits are held in 4, and an order only where it is one."""
    if name.endswith(OTHERS):
        return 0
    if name.endswith("g_idx"):
        return tensor.nbytes if has_order else 0
    if tensor.dtype == torch.int32:
        return tensor.nbytes * (8 if name.endswith(("qzeros", "zero_point")) else max(4, bits)) // bits
    return tensor.nbytes


def test_the_bytes_are_those_of_the_file(case: tuple[str, Path, nn.Module]) -> None:
    name, folder, _ = case
    settings = PUBLISHED[name].quantization_config
    bits = settings.get("bits") or (8 if "INT8" in name else 4)
    own = {key: tensor for key, tensor in tensors_of(folder).items() if key.startswith(f"{LAYER}.experts.3.")}
    expected = sum(bytes_in_file(key, tensor, bits, settings.get("desc_act", False)) for key, tensor in own.items())
    source = source_of(folder)
    (expert,) = source.experts([ExpertShard(3)])
    assert expert.nbytes == expected
    planned = source.nbytes(ExpertShard(3)) - expected
    assert 0 <= planned <= 4 * (2 * HIDDEN + INTERMEDIATE) if name in ORDERED else planned == 0


def test_a_host_holds_as_many_bytes_as_was_said(case: tuple[str, Path, nn.Module]) -> None:
    name, folder, _ = case
    for quantization, of in [(None, 1), (None, 3), (None, 7), (None, 2 * INTERMEDIATE), ("none", 3), ("int8", 5), ("fp8", 2)]:
        source = source_of(folder, quantization)
        for shard in range(min(of, 7)):
            held = [ExpertShard(6, shard, of)]
            said, found = bank_bytes(source, held), load_bank(source, held).nbytes
            assert found <= said if name in ORDERED else found == said


def test_answers_in_bfloat16(case: tuple[str, Path, nn.Module]) -> None:
    """No more is lost than rows and sums in bfloat16 lose: weights are those of the file."""
    _, folder, block = case
    layer = MoELayer.from_checkpoint(folder, LAYER)
    for num_tokens in (1, 33, 200):
        rows = some_tokens(num_tokens, hidden_size=HIDDEN).bfloat16()
        assert relative(layer(rows.float()), answer_of(block, rows.float())) < 0.01


def test_none_is_the_type_of_the_model(case: tuple[str, Path, nn.Module]) -> None:
    layer = MoELayer.from_checkpoint(case[1], LAYER, quantization="none")
    assert all(isinstance(expert, FeedForward) and expert.down_proj.dtype == torch.bfloat16 for expert in layer.bank.experts[:8])


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_what_is_stored_so_keeps_its_numbers(case: tuple[str, Path, nn.Module], quantization: Quantization) -> None:
    _, folder, block = case
    held, asked = source_of(folder, dtype="float32"), source_of(folder, quantization, "float32")
    before, after = (in_full(load_bank(source, [ExpertShard(1)]).experts[0]) for source in (held, asked))
    is_so = held.held_as.lower().startswith(quantization) or (quantization == "int8" and held.held_as.endswith("int8"))
    assert torch.equal(before.down_proj, after.down_proj) == is_so
    assert relative(after.down_proj, before.down_proj) < 0.04
    rows = some_tokens(20, hidden_size=HIDDEN)
    layer = MoELayer.from_checkpoint(folder, LAYER, dtype=torch.float32, quantization=quantization)
    assert relative(layer(rows), answer_of(block, rows)) < (1e-5 if is_so else 0.08)


def test_both_kinds_in_one_layer(fp8: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """Some experts are published in bfloat16, as `modules_to_not_convert` may say."""
    folder, block = fp8
    tensors, full = (
        tensors_of(folder),
        [f"{LAYER}.experts.{expert}.{kind}_proj.weight" for expert in (2, 5) for kind in ("gate", "up", "down")],
    )
    for name in full:
        scales = tensors.pop(f"{name}_scale_inv").repeat_interleave(32, 0).repeat_interleave(32, 1)
        tensors[name] = tensors[name].float() * scales[: tensors[name].shape[0], : tensors[name].shape[1]]
    excluded = {**PUBLISHED["fp8"].quantization_config, "modules_to_not_convert": [f"{LAYER}.experts.2", f"{LAYER}.experts.5"]}
    source = source_of(rewritten(folder, tmp_path, tensors, quantization_config=excluded), dtype="float32")
    everyone = [ExpertShard(expert) for expert in range(8)]
    bank = load_bank(source, everyone)
    assert [isinstance(expert, QuantizedFeedForward) for expert in bank.experts] == [expert not in (2, 5) for expert in range(8)] + [True]
    assert bank.nbytes == bank_bytes(source, everyone)
    rows = some_tokens(20, hidden_size=HIDDEN)
    layer = MoELayer.from_checkpoint(tmp_path, LAYER, dtype=torch.float32)
    assert relative(layer(rows), answer_of(block, rows)) < 1e-5


@pytest.mark.parametrize("part", ["experts.3.up_proj", "shared_expert.down_proj"])
def test_codes_that_are_not_numbers(fp8: tuple[Path, nn.Module], part: str, tmp_path: Path) -> None:
    tensors = tensors_of(fp8[0])
    name = f"{LAYER}.{part}.weight"
    tensors[name].view(torch.uint8)[3, 5] = 0x7F
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {name} holds NaN or Inf"):
        MoELayer.from_checkpoint(rewritten(fp8[0], tmp_path, tensors), LAYER)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_scales_that_make_no_numbers(fp8: tuple[Path, nn.Module], scale: float, tmp_path: Path) -> None:
    tensors = tensors_of(fp8[0])
    name = f"{LAYER}.experts.3.up_proj.weight"
    tensors[f"{name}_scale_inv"][1, 2] = scale
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {name} holds NaN or Inf, or its scales do"):
        MoELayer.from_checkpoint(rewritten(fp8[0], tmp_path, tensors), LAYER)


def test_weights_in_full_replace_those_in_few_bits(fp8: tuple[Path, nn.Module]) -> None:
    model = {"checkpoint": fp8[0], "layers": [LAYER], "dtype": "float32"}
    (source,) = swapped(load_config({"model": model}), [Swap(LAYER, original(), frozenset({2, 3}))])
    everyone = [ExpertShard(expert) for expert in range(8)]
    bank = load_bank(source, everyone)
    assert [isinstance(expert, FeedForward) for expert in bank.experts] == [expert in (2, 3) for expert in range(8)] + [False]
    assert bank.nbytes == bank_bytes(source, everyone)
    assert torch.equal(in_full(bank.experts[2]).down_proj, tensors_of(original())[f"{LAYER}.experts.2.down_proj.weight"])
    # And the other way round.
    (source,) = swapped(load_config({"model": {**model, "checkpoint": original()}}), [Swap(LAYER, fp8[0], frozenset({4}))])
    bank = load_bank(source, everyone)
    assert [isinstance(expert, QuantizedFeedForward) for expert in bank.experts[:8]] == [expert == 4 for expert in range(8)]


@pytest.mark.parametrize("to_fp8", [True, False])
def test_a_service_swaps_experts_for_those_in_other_bits(fp8: tuple[Path, nn.Module], to_fp8: bool, tmp_path: Path) -> None:
    before, after = (original(), fp8[0]) if to_fp8 else (fp8[0], original())
    config = {"model": {"checkpoint": before, "layers": [LAYER], "dtype": "float32"}, "placement": {"num_hosts": 2}}
    rows = some_tokens(20, hidden_size=HIDDEN)
    ids, weights = torch.tensor([[3, 4]]).expand(20, 2), torch.full((20, 2), 0.5)
    with ServiceHarness(config, "local", tmp_path) as service, Client(service.target) as client:
        assert client.forward(rows, layer=0).model_revision == 1
        service.call(service.controller.swap(LAYER, after, [3]))
        answer = client.forward(rows, layer=0, topk_ids=ids, topk_weights=weights)
    assert answer.model_revision == 2
    (source,) = swapped(load_config(config), [Swap(LAYER, after, frozenset({3}))])
    third, fourth = map(in_full, source.experts([ExpertShard(3), ExpertShard(4)]))
    assert_close(answer.hidden_states, (third(rows) + fourth(rows)) / 2)


def test_a_layer_in_few_bits_is_saved_in_full_only(fp8: tuple[Path, nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='few bits cannot be saved; allowed: those of a layer loaded with quantization = "none"'):
        MoELayer.from_checkpoint(fp8[0], LAYER).save(tmp_path / "saved")
    layer = MoELayer.from_checkpoint(fp8[0], LAYER, quantization="none")
    layer.save(tmp_path / "saved")
    rows = some_tokens(5, hidden_size=HIDDEN)
    assert torch.equal(MoELayer.from_checkpoint(tmp_path / "saved", LAYER)(rows), layer(rows))
