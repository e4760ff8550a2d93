"""A checkpoint as DeepSpeed writes it, served as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moeserve import MoELayer
from moeserve.checkpoints import Swap, bank_bytes, layer_sources, load_bank
from moeserve.checkpoints.deepspeed_files import DeepSpeedFolder
from moeserve.compat.deepspeed import MoE
from moeserve.config import load_config
from moeserve.errors import CheckpointError, ConfigError
from moeserve.experts import ExpertShard
from tests.checkpoints.deepspeed_folders import PARAMETERS, config, gating, model_of, write
from tests.compat.modules import EXPERTS, HIDDEN, Block, sequential, shaken
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness
from tests.support.planning import swapped


def sources(folder: Path, **entry: Any) -> Any:
    return layer_sources(load_config(config(folder, **entry)))


KINDS: Mapping[str, tuple[nn.Module, dict[str, Any]]] = {
    "projections": (sequential(), {"activation": "gelu"}),
    "without bias": (sequential(activation=nn.ReLU, bias=False), {"activation": "relu"}),
    "module": (Block(24), {"expert": "tests.compat.modules:Block", "expert_args": {"width": 24}}),
}


@pytest.mark.parametrize("use_residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_served_as_it_is(kind: str, use_residual: bool, tmp_path: Path) -> None:
    expert, told = KINDS[kind]
    model = model_of(expert, use_residual)
    folder = write(tmp_path / "saved" / "global_step7", model)
    placement = {"num_hosts": 2, "tensor_parallel": 1 if kind == "module" else 2}
    x = torch.randn(30, HIDDEN)
    with ServiceHarness({**config(folder.parent, **told), "placement": placement}, "local", tmp_path) as service:
        for name in ("encoder.1", "encoder.3"):
            remote = MoE(HIDDEN, nn.Identity(), use_residual=use_residual, target=service.target, layer=name, **PARAMETERS)  # type: ignore
            for here, there in zip(model.get_submodule(name)(x), remote.eval()(x), strict=True):
                assert_close(there, here, summed=4 * HIDDEN + len(x))


def test_what_a_layer_does_when_experts_fail(tmp_path: Path) -> None:
    folder = write(tmp_path / "tag", model_of(sequential()))
    asked = config(folder, activation="gelu", resilience={"on_expert_failure": "residual", "k_min": 1})
    loaded = load_config({**asked, "layers": [*asked["layers"], {"name": "encoder.3", "resilience": {"k_min": 2}}]})
    assert [source.spec.name for source in layer_sources(loaded)] == ["encoder.1", "encoder.3"]
    assert [loaded.resilience_of(name).k_min for name in ("encoder.1", "encoder.3")] == [1, 2]


@torch.no_grad()
def test_a_model_that_is_one_layer(tmp_path: Path) -> None:
    layer = shaken(MoE(HIDDEN, sequential(), **PARAMETERS))  # type: ignore[arg-type]
    source = sources(write(tmp_path / "tag", layer), activation="gelu")[0]
    assert source.spec.name == "moe"
    x = torch.randn(30, HIDDEN)
    read = MoELayer.__new__(MoELayer)
    read._load(source)
    assert_close(read(x), layer(x)[0])


def test_experts_are_read_when_asked_for_and_cast(tmp_path: Path) -> None:
    folder = write(tmp_path / "tag", model_of(sequential()))
    for expert in range(1, EXPERTS):
        file = folder / f"layer_1_expert_{expert}_mp_rank_00_model_states.pt"
        state = torch.load(file, weights_only=True)
        torch.save({name: tensor.fill_(torch.nan) for name, tensor in state.items()}, file)
    second = layer_sources(load_config({**config(folder, activation="gelu"), "model": {"checkpoint": folder, "dtype": "bfloat16"}}))[1]
    (expert,) = second.experts([ExpertShard(0)])
    assert expert.nbytes == second.nbytes(ExpertShard(0))
    with pytest.raises(CheckpointError, match=r"layer_1_expert_2_.*: tensor 0\.weight holds NaN or Inf as bfloat16"):
        second.experts([ExpertShard(2)])


def test_experts_that_are_written_again_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at what is there and the reading of it."""
    folder = write(tmp_path / "tag", model_of(sequential()))
    source = sources(folder, activation="gelu")[0]
    looked = DeepSpeedFolder.expert

    def expert(self: DeepSpeedFolder, number: int, expert: int, *, read: str | None = None) -> dict[str, torch.Tensor]:
        if read is not None:
            state = torch.load(self.file(number, expert), weights_only=True)
            torch.save({name: tensor[:1] for name, tensor in state.items()}, self.file(number, expert))
        return looked(self, number, expert, read=read)

    monkeypatch.setattr(DeepSpeedFolder, "expert", expert)
    with pytest.raises(CheckpointError, match=r"layer_0_expert_2_.* changed while the checkpoint was read"):
        source.experts([ExpertShard(2)])


def test_experts_can_be_quantized(tmp_path: Path) -> None:
    folder = write(tmp_path / "tag", model_of(sequential(), use_residual=True))
    model = {"checkpoint": folder, "quantization": "int8"}
    stored, source = (
        layer_sources(load_config({**config(folder, activation="gelu"), "model": held}))[0] for held in ({"checkpoint": folder}, model)
    )
    shards = [ExpertShard(0), ExpertShard(1)]
    assert load_bank(source, shards).nbytes == bank_bytes(source, shards) < bank_bytes(stored, shards)
    folder = write(tmp_path / "modules", model_of(Block(24)))
    with pytest.raises(ConfigError, match="only feed-forward experts are quantized"):
        layer_sources(load_config({**config(folder, **KINDS["module"][1]), "model": {**model, "checkpoint": folder}}))


def test_layers_can_be_told_apart(tmp_path: Path) -> None:
    folder = write(tmp_path / "tag", model_of(sequential()))
    entries = [{"gating": gating(), "activation": "gelu"}, {"name": "encoder.3", "gating": {"top_k": 1, "drop_policy": "position"}}]
    found = layer_sources(load_config({"model": {"checkpoint": folder}, "layers": entries}))
    assert [(source.spec.name, source.spec.gating.top_k) for source in found] == [("encoder.1", 2), ("encoder.3", 1)]
    only = layer_sources(load_config({"model": {"checkpoint": folder, "layers": ["encoder.3"]}, "layers": entries}))
    assert [source.spec.name for source in only] == ["encoder.3"]


def test_newer_weights_come_from_files_of_the_same_kind(tmp_path: Path) -> None:
    old, new = (write(tmp_path / tag / "step", model_of(sequential())) for tag in ("old", "new"))
    file = new / "layer_1_expert_2_mp_rank_00_model_states.pt"
    torch.save({name: 2 * tensor for name, tensor in torch.load(file, weights_only=True).items()}, file)
    swap = Swap("encoder.3", new, frozenset({2}))
    experts = [
        layers[1].experts([ExpertShard(expert) for expert in range(3)])
        for layers in (sources(old, activation="gelu"), swapped(load_config(config(old, activation="gelu")), [swap]))
    ]
    assert torch.equal(experts[1][1].down_proj, experts[0][1].down_proj)
    assert torch.equal(experts[1][2].down_proj, 2 * experts[0][2].down_proj)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({}, r"an expert of {'0.weight': \[20, 12\], .* is not two projections with swiglu between them: set layers.activation"),
        ({"activation": "gelu", "gating": {"capacity_factor": 1.0}}, "layer encoder.1: .* give layers.gating.top_k"),
        ({"activation": "gelu", "num_experts": 6}, "layers.num_experts cannot be set: the checkpoint of DeepSpeed decides it"),
        ({"activation": "gelu", "name": "encoder.2"}, "'encoder.2' is not a layer of .* it has encoder.1, encoder.3"),
        (
            {"expert": "tests.compat.modules:Block"},
            "an expert 'tests.compat.modules:Block' and the file do not both have the tensor 0.bias",
        ),
        ({"activation": "gelu", "gating": {"top_k": 7}}, "gating.top_k is 7, but it has 6 experts"),
    ],
)
def test_what_is_told_must_fit(entry: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "tag", model_of(sequential()))
    with pytest.raises(ConfigError, match=sentence):
        sources(folder, **entry)


def remove(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


def rename(file: Path) -> None:
    torch.save({f"x{name}": tensor for name, tensor in torch.load(file, weights_only=True).items()}, file)


def second_rank(file: Path) -> None:
    file.with_name(file.name.replace("rank_00", "rank_01")).write_bytes(file.read_bytes())


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("layer_1_expert_3_", remove, "layer_1_expert_3_mp_rank_00_model_states.pt is missing"),
        ("layer_1_expert_5_", remove, "has files of 5 experts, its gate has 6"),
        ("", remove, "mp_rank_00_model_states.pt is missing"),
        ("", rename, "has no `module`"),
        ("", cut, "mp_rank_00_model_states.pt is not a file of tensors"),
        ("layer_0_expert_0_", cut, "layer_0_expert_0_.* is not a file of tensors"),
        ("layer_0_expert_0_", rename, r"xencoder\.1\.deepspeed_moe\.gate\.wg\.weight is missing"),
        ("layer_0_expert_0_", lambda file: torch.save({"a": torch.ones(1)}, file), "its tensors are not named"),
        ("layer_0_expert_0_", lambda file: torch.save([1], file), "holds a list"),
        ("layer_0_expert_0_", second_rank, "experts that are split over model-parallel ranks"),
    ],
)
def test_files_that_are_wrong(name: str, change: Callable[[Path], Any], sentence: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "tag", model_of(sequential()))
    change(folder / f"{name}mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=sentence):
        sources(folder, activation="gelu")
