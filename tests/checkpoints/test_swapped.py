"""New weights in place of old ones: which come from where, and what cannot replace what."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moeserve import ConfigError, UnknownLayer, load_config
from moeserve.checkpoints.swapped import ServedLayers, Swap, compacted
from moeserve.control.record import release_message
from moeserve.placement import plan_placement
from moeserve.release import Release
from tests.support.checkpoints_on_disk import CONFIG, layer_tensors, write_folder
from tests.support.planning import swapped
from tests.support.stacked import stacked, whole

LAYER = "model.layers.0.mlp"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints of the same sizes."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        write_folder(tmp_path / name, CONFIG, {key: torch.randn(tensor.shape) for key, tensor in layer_tensors().items()})
    return tmp_path / "old", tmp_path / "new"


def test_some_experts_are_new_and_the_rest_is_as_it_was(folders: tuple[Path, Path]) -> None:
    old, new = folders
    (source,) = swapped(old, [Swap(LAYER, new, frozenset({1, 3}))])
    (before,), (after,) = swapped(old, []), swapped(new, [])
    ids = [3, 0, 1, 2]
    mixed, older, newer = (stacked(each.experts(whole(ids))) for each in (source, before, after))
    for slot, expert in enumerate(ids):
        assert torch.equal(mixed.down_proj[slot], (newer if expert in {1, 3} else older).down_proj[slot])
    assert torch.equal(source.router().gate, before.router().gate)
    assert sum(map(source.nbytes, whole(ids))) == sum(map(before.nbytes, whole(ids)))


def test_a_whole_layer_brings_its_gate_and_swaps_follow_one_another(folders: tuple[Path, Path]) -> None:
    old, new = folders
    (source,) = swapped(old, [Swap(LAYER, new), Swap(LAYER, old, frozenset({2}))])
    (before,), (after,) = swapped(old, []), swapped(new, [])
    assert torch.equal(source.router().gate, after.router().gate)
    mixed = stacked(source.experts(whole(range(4)))).gate_up_proj
    assert torch.equal(mixed[2], stacked(before.experts(whole([2]))).gate_up_proj[0])
    assert torch.equal(mixed[:2], stacked(after.experts(whole([0, 1]))).gate_up_proj)


def test_the_operators_changes_to_the_gate_stay(folders: tuple[Path, Path]) -> None:
    old, new = folders
    config = load_config({"model": {"checkpoint": old}, "layers": [{"gating": {"capacity_factor": 1.5}}]})
    (source,) = swapped(config, [Swap(LAYER, new)])
    assert source.spec.gating.capacity_factor == 1.5


def test_what_does_not_fit_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = folders
    with pytest.raises(UnknownLayer, match=r"there is no layer 'nowhere'; served: model\.layers\.0\.mlp"):
        swapped(old, [Swap("nowhere", new)])
    with pytest.raises(ConfigError, match=r"has no expert 4; it has 0\.\.3"):
        swapped(old, [Swap(LAYER, new, frozenset({0, 4}))])
    wide = {**CONFIG, "num_experts_per_tok": 1}
    (tmp_path / "other").mkdir()
    write_folder(tmp_path / "other", wide, layer_tensors())
    with pytest.raises(ConfigError, match=r"/other: gating of layer model\.layers\.0\.mlp is .*; the served layer has"):
        swapped(old, [Swap(LAYER, tmp_path / "other", frozenset({0}))])


def test_a_layer_may_be_swapped_any_number_of_times(folders: tuple[Path, Path]) -> None:
    """What later swaps have replaced is forgotten, wherever a release goes; what is read is of the last."""
    old, new = folders
    config = load_config(old)
    release, sizes = Release(plan_placement([swapped(config, [])[0].spec], config.placement)), []
    for number in range(1250):
        experts = frozenset({number % 4, (number + 1) % 4}) if number % 50 else None
        made = Swap(LAYER, (old, new)[number % 2], experts, release.revision(LAYER) + 1)
        release = replace(release, swaps=compacted([*release.swaps, made]))
        assert release.revision(LAYER) == number + 2
        sizes.append(len(pickle.dumps(release.swaps)) + len(release_message(release).SerializeToString()))
    assert max(sizes[1200:]) <= max(sizes[50:100]) + 16, "numbers of revisions have grown by a byte or two"
    (source,) = release.sources(ServedLayers.read(config))
    (before,), (after,) = (swapped(folder, []) for folder in folders)
    mixed = stacked(source.experts(whole(range(4)))).down_proj
    # The last: 1249 (expert 1, 2) from new, 1248 (0, 1) from old, 1247 (3, 0) from new; 1200 was of the whole layer, from old.
    for expert, origin in enumerate((before, after, after, after)):
        assert torch.equal(mixed[expert], stacked(origin.experts(whole([expert]))).down_proj[0])
    assert torch.equal(source.router().gate, before.router().gate)


def test_swaps_in_any_number_are_read_as_the_last_of_each_expert(folders: tuple[Path, Path]) -> None:
    old, new = folders
    (source,) = swapped(old, [Swap(LAYER, (old, new)[number % 2]) for number in range(1200)])
    (after,) = swapped(new, [])
    assert torch.equal(source.router().gate, after.router().gate)
    assert len(source.experts(whole(range(4)))) == 4
