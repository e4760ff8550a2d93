"""A key of config.json that holds something odd: a sentence that names file, key and value, or the layers as they are without it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeserve import CheckpointError, load_config
from moeserve.checkpoints import layer_sources
from tests.checkpoints.saved import config_of, language_model, saved
from tests.checkpoints.tiny_models import SETTINGS

PYTHONS_OWN_WORDS = re.compile(r"object|not supported|TypeError|KeyError|subscriptable|iterable|unhashable|NoneType|attribute|int\(\)")
#: of a null in place of kinds of layers: the default does not fit the tensors, or a model of two layers
DEFAULT = re.compile(r"none of the layers is an MoE layer$|: tensor \S+ is missing$")
#: lists that need not have one for every layer, or may have more
OF_SOME_LAYERS = {"mlp_only_layers", "moe_layers", "swiglu_limits", "swiglu_limits_shared"}
ODD = (
    st.none()
    | st.booleans()
    | st.text(max_size=3)
    | st.sampled_from(["8", "1.0", "true"])
    | st.integers(max_value=-1)
    | st.floats()
    | st.just([])
    | st.lists(st.integers(), min_size=3, max_size=3)
    | st.just({})
    | st.dictionaries(st.text(max_size=2), st.integers(), max_size=1)
)


def section_of(family: str) -> dict[str, Any]:
    return language_model(config_of(family))


def layers(family: str, section: dict[str, Any]) -> list[Any]:
    """All that is known of the layers when the language model is described like that."""
    text = config_of(family)
    text = {**text, "text_config": section} if "text_config" in text else section
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(text))
        (Path(folder) / "model.safetensors").symlink_to(saved(family) / "model.safetensors")
        sources: list[Any] = layer_sources(load_config(folder))
        return [(source.spec, source.layout, source.index, source.shared_size, source.shared_bias) for source in sources]


def is_odd(key: str, value: Any, usual: Any) -> bool:
    """Whether it is of another kind than what the key holds, or out of all bounds."""
    if isinstance(usual, bool) or usual is None or key in {"architectures", "text_config"}:
        return usual is not None and not isinstance(value, bool)
    if isinstance(usual, int | float) and type(value) in (int, float):
        return not value >= 0 or value == float("inf") or (isinstance(usual, int) and value != int(value))
    return type(value) is not type(usual) or (isinstance(usual, list) and key not in OF_SOME_LAYERS and len(value) != len(usual))


@st.composite
def oddities(draw: st.DrawFn) -> tuple[str, str, Any]:
    family = draw(st.sampled_from(sorted(SETTINGS)))
    key = draw(st.sampled_from(sorted(section_of(family))))
    usual = section_of(family)[key]
    return family, key, draw(ODD.filter(lambda value: is_odd(key, value, usual)) if usual is not None else st.none())


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(oddities())
def test_an_odd_value_is_named_or_is_as_good_as_none(oddity: tuple[str, str, Any]) -> None:
    family, key, value = oddity
    section = section_of(family)
    try:
        found = layers(family, section | {key: value})
    except CheckpointError as error:
        assert ("config.json: " in str(error) and key in str(error)) or (value is None and DEFAULT.search(str(error))), error
        assert not PYTHONS_OWN_WORDS.search(str(error).replace(json.dumps(value), "")), error
        return
    assert found in ([layers(family, section)] + ([layers(family, drop(section, key))] if can_be_dropped(family, key) else []))


def drop(section: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name != key}


def can_be_dropped(family: str, key: str) -> bool:
    try:
        layers(family, drop(section_of(family), key))
    except CheckpointError:
        return False
    return True


NUMBERS = {
    "routed_scaling_factor": "a positive number",
    "n_group": "a positive whole number",
    "topk_group": "a positive whole number",
    "n_shared_experts": "a whole number of at least 0",
    "first_k_dense_replace": "a whole number of at least 0",
    "num_experts_per_tok": "a positive whole number",
}


@pytest.mark.parametrize("value", [None, -1, "2", True, 1.5, [1], {}, float("nan")], ids=json.dumps)
@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_of_deepseek(key: str, value: Any) -> None:
    if value is None and key in ("n_group", "n_shared_experts"):
        pytest.skip("null says that there is none")
    if key == "routed_scaling_factor" and value == 1.5:
        pytest.skip("is a number")
    with pytest.raises(CheckpointError) as caught:
        layers("deepseek_v3", section_of("deepseek_v3") | {key: value})
    assert f"config.json: {key} must be {NUMBERS[key]}" in str(caught.value)
    assert str(caught.value).endswith(f"but is {json.dumps(value)}")


@pytest.mark.parametrize("value", [0, -8])
@pytest.mark.parametrize("family", sorted(SETTINGS))
def test_no_groups_at_all(family: str, value: int) -> None:
    """Also where nobody reads the key."""
    with pytest.raises(CheckpointError, match=rf"config\.json: n_group .*{value}"):
        layers(family, section_of(family) | {"n_group": value})


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("hunyuan_v1_moe", "moe_topk", [3]),
        ("hunyuan_v1_moe", "moe_topk", [3, 3, 3]),
        ("hunyuan_v1_moe", "moe_topk", []),
        ("hunyuan_v1_moe", "num_experts", [8, None]),
        ("mellum", "mlp_layer_types", ["dense"]),
        ("mellum", "mlp_layer_types", ["dense", "sparse", "sparse"]),
        ("mellum", "mlp_layer_types", ["dense", "moe"]),
        ("exaone_moe", "mlp_layer_types", "sparse"),
        ("llama4_text", "moe_layers", [1.5]),
        ("qwen3_moe", "mlp_only_layers", [-1]),
    ],
)
def test_lists_of_another_length_or_kind(family: str, key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} must be .*, but is {re.escape(json.dumps(value))}$"):
        layers(family, section_of(family) | {key: value})
