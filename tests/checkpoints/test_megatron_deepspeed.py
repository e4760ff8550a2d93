"""Checkpoints of trainers that put more than tensors into DeepSpeed's files: what is needed is read, nothing of the rest is made or run."""

from __future__ import annotations

import argparse
import collections
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeserve import MoELayer
from moeserve.checkpoints import layer_sources
from moeserve.config import load_config
from moeserve.errors import CheckpointError
from tests.checkpoints import trainer_state
from tests.checkpoints.trainer_state import BESIDE, OwnDict
from tests.support.closeness import assert_close

H, INTERMEDIATE, EXPERTS = 16, 32, 4
MLP = "encoder.layers.1.mlp"
PREFIX = f"language_model.{MLP}"
GATE = "deepspeed_moe.gate.wg.weight"


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def expert_of(number: int) -> dict[str, Tensor]:
    shapes = {"dense_h_to_4h.weight": (INTERMEDIATE, H), "dense_h_to_4h.bias": (INTERMEDIATE,), "dense_4h_to_h.weight": (H, INTERMEDIATE)}
    shapes["dense_4h_to_h.bias"] = (H,)
    return {name: drawn(*shape, seed=10 * number + place) for place, (name, shape) in enumerate(shapes.items())}


def gate() -> Tensor:
    return drawn(EXPERTS, H, seed=99)


def flat(prefix: str = PREFIX) -> dict[str, Any]:
    return {"language_model.embedding.word_embeddings.weight": drawn(8, H, seed=5), f"{prefix}.{GATE}": gate()}


def nested() -> dict[str, Any]:
    """As `state_dict_for_save_checkpoint` of Megatron's models returns it."""
    encoder = collections.OrderedDict({"layers.0.mlp.dense_h_to_4h.weight": drawn(8, H, seed=6), f"layers.1.mlp.{GATE}": gate()})
    embedding = {"word_embeddings": collections.OrderedDict(weight=drawn(8, H, seed=5))}
    return {"language_model": {"embedding": embedding, "encoder": encoder}}


def write(tmp_path: Path, module: Any, beside: Mapping[str, Any], prefix: str = PREFIX, protocol: int = 2) -> Path:
    folder = tmp_path / "global_step10"
    folder.mkdir(parents=True)
    for number in range(EXPERTS):
        state = {f"{prefix}.deepspeed_moe.experts.deepspeed_experts.{number}.{name}": tensor for name, tensor in expert_of(number).items()}
        torch.save(state, folder / f"layer_0_expert_{number}_mp_rank_00_model_states.pt")
    main = {"module": module, "ds_config": {"fp16": {"enabled": True}}, "ds_version": "0.19.8", "num_experts": [EXPERTS], **beside}
    torch.save(main, folder / "mp_rank_00_model_states.pt", pickle_protocol=protocol)
    return folder


def layer_of(folder: Path) -> MoELayer:
    config = {"model": {"checkpoint": folder}, "layers": [{"activation": "gelu", "gating": {"top_k": 1}}]}
    (source,) = layer_sources(load_config(config))
    layer = MoELayer.__new__(MoELayer)
    layer._load(source)
    return layer


def assert_is_the_layer(layer: MoELayer) -> None:
    x = drawn(20, H, seed=1) * H**0.5
    weights, best = (x @ gate().T).softmax(1).max(1)
    expected = torch.zeros(20, H)
    for token, (weight, number) in enumerate(zip(weights, best.tolist(), strict=True)):
        up, up_bias, down, down_bias = expert_of(number).values()
        expected[token] = weight * (down @ F.gelu(up @ x[token] + up_bias) + down_bias)
    assert_close(layer(x), expected)


@pytest.mark.parametrize("module", [flat, nested])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_stands_beside_the_model_is_not_looked_at(
    module: Callable[[], Any], protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, module(), {name: make() for name, make in BESIDE.items()}, protocol=protocol)
    monkeypatch.delattr(trainer_state, "Gone")
    assert_is_the_layer(layer_of(folder))


@pytest.mark.parametrize("name", BESIDE)
def test_each_of_them(name: str, tmp_path: Path) -> None:
    assert_is_the_layer(layer_of(write(tmp_path, {**nested(), "head": {"extra": BESIDE[name]()}}, {"it": BESIDE[name]()})))


@pytest.mark.parametrize(
    ("module", "prefix"),
    [
        (flat(f"module.{PREFIX}"), PREFIX),
        (flat(), f"module.module.{PREFIX}"),
        ({"module": nested()}, PREFIX),
        ({"language_model": {"encoder": {"layers": {1: {"mlp": OwnDict({GATE: gate()})}}}}}, PREFIX),
        ({"deepspeed_moe": {"gate": {"wg": {"weight": gate()}}}}, ""),
        ({**flat(), "language_model.encoder.layers.11.mlp.x": {}, f"critic.{PREFIX}.{GATE}": -gate()}, PREFIX),
        (flat("transformer.h.3.mlp"), "transformer.h.3.mlp"),
        ({**flat(), PREFIX: {"deepspeed_moe._extra_state": Path("x")}}, PREFIX),
    ],
    ids=[
        "wrapped",
        "unwrapped",
        "wrapped and nested",
        "nested to the end",
        "the layer is the model",
        "two of that ending",
        "others",
        "state",
    ],
)
def test_wherever_the_layer_stands(module: Any, prefix: str, tmp_path: Path) -> None:
    layer = layer_of(write(tmp_path, module, {}, prefix))
    assert layer.spec.name == (prefix or "moe")
    assert_is_the_layer(layer)


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (flat("decoder.layers.1.mlp"), rf"tensor {PREFIX}.{GATE} is missing; it has gates of decoder\.layers\.1\.mlp"),
        ({"language_model": {}}, r"is missing; it has gates of no layer"),
        ({**flat(f"a.{PREFIX}"), **flat(f"b.{PREFIX}")}, rf"is missing; it has gates of a\.{PREFIX}, b\.{PREFIX}"),
        ({**nested(), f"{PREFIX}.{GATE}": -gate()}, rf"there are two tensors {PREFIX}\.{GATE}"),
        ({f"{PREFIX}.{GATE}": argparse.Namespace()}, rf"{GATE} is an object made by .*; expected a dense tensor, and nothing was run"),
        ([nested()], "has no `module`, the state dict of the model"),
        (argparse.Namespace(), "has no `module`, the state dict of the model"),
        ({"x" * 5000: gate()}, "the name of a tensor has more than 4096 characters"),
    ],
)
def test_a_gate_that_cannot_be_found(module: Any, sentence: str, tmp_path: Path) -> None:
    folder = write(tmp_path, module, {})
    with pytest.raises(CheckpointError, match=sentence) as refusal:
        layer_of(folder)
    assert str(folder / "mp_rank_00_model_states.pt") in str(refusal.value)


def test_two_layers_do_not_share_a_gate(tmp_path: Path) -> None:
    folder = write(tmp_path, flat(MLP), {}, f"one.{MLP}")
    other = write(tmp_path / "other", flat(MLP), {}, f"other.{MLP}")
    for file in other.glob("layer_0_*"):
        file.rename(folder / file.name.replace("layer_0", "layer_1"))
    with pytest.raises(CheckpointError, match=rf"gate {MLP} is that of one\.{MLP} or of other\.{MLP}"):
        layer_of(folder)


class Runs:
    """What a file of somebody with bad intentions holds."""

    def __init__(self, run: Callable[..., Any], *arguments: Any) -> None:
        self.run, self.arguments = run, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.run, self.arguments


GADGETS: Mapping[str, Callable[[str], Any]] = {
    "os.system": lambda trace: Runs(os.system, f"touch {trace}"),
    "eval": lambda trace: Runs(eval, f"__import__('os').system('touch {trace}')"),
    "exec": lambda trace: Runs(exec, f"import os; os.system('touch {trace}')"),
    "a partial": lambda trace: Runs(functools.partial(os.system, f"touch {trace}")),
    "a method": lambda trace: Runs(Path.touch, Path(trace)),
    "a key": lambda trace: {Runs(os.system, f"touch {trace}"): 1},
}


@pytest.mark.parametrize("place", ["beside", "in the model", "the gate", "an expert"])
@pytest.mark.parametrize("gadget", GADGETS)
def test_code_is_never_run(gadget: str, place: str, tmp_path: Path) -> None:
    """Beside what is needed it is passed over; in its place it is refused."""
    trace = tmp_path / "trace"
    code, name = GADGETS[gadget](str(trace)), f"{PREFIX}.{GATE}"
    module = {**flat(), **({"more": [code]} if place == "in the model" else {}), **({name: code} if place == "the gate" else {})}
    folder = write(tmp_path, module, {"more": code} if place == "beside" else {})
    file = folder / "mp_rank_00_model_states.pt"
    if place == "an expert":
        file = folder / "layer_0_expert_2_mp_rank_00_model_states.pt"
        state = torch.load(file, weights_only=True)
        torch.save(dict.fromkeys(state, code), file)
    if place in {"beside", "in the model"}:
        assert_is_the_layer(layer_of(folder))
    else:
        with pytest.raises(CheckpointError, match=r"expected a dense tensor, and nothing was run|is missing") as refusal:
            layer_of(folder)
        assert str(file) in str(refusal.value) and "\n" not in str(refusal.value)
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists(), "it would have run"


def test_a_key_that_is_no_name_is_part_of_none(tmp_path: Path) -> None:
    key: Any = ()
    for _ in range(200):  # in words, it would be longer than there is memory
        key = (key, key)
    assert_is_the_layer(layer_of(write(tmp_path, {**flat(), Runs(print, key): {"x": 1}}, {Runs(print, key): 1})))
