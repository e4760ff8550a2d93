"""An error of a configuration is about the value that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeserve.config import LayerConfig, load_config
from moeserve.errors import ConfigError

LAYER = {"hidden_size": 64, "intermediate_size": 128, "num_experts": 8}


@pytest.mark.parametrize(
    ("table", "value", "sentence"),
    [
        (
            "placement",
            {"copies": {"a-b": 0}},
            "placement.copies.a-b: Input should be greater than or equal to 1, or a table (got 0)",
        ),
        ("placement", {"copies": {"a[0]": {"3": 0}}}, "placement.copies.a[0].3: Input should be greater than or equal to 1 (got 0)"),
        ("placement", {"copies": "x"}, "placement.copies: Input should be a valid integer, or a table (got 'x')"),
        ("placement", {"num_hosts": "some"}, "placement.num_hosts: Input should be a valid integer, or 'all' (got 'some')"),
        ("placement", {"node_labels": {"a-b": 3}}, "placement.node_labels.a-b: Input should be a valid string (got 3)"),
        (
            "layers",
            [{**LAYER, "intermediate_size": [8, 0]}],
            "layers.0.intermediate_size.1: Input should be greater than or equal to 1 (got 0)",
        ),
        ("layers", 3, "layers: Input should be a list (got 3)"),
        ("layers", [{**LAYER, "gating": 3}], "layers.0.gating: Input should be a table (got 3)"),
        (
            "layers",
            [{**LAYER, "a\nb": 1}],
            r"layers.0.'a\nb' is not a key of the configuration (got 1); allowed here: " + ", ".join(LayerConfig.model_fields),
        ),
        (
            "layers",
            [LAYER, {**LAYER, "gating": {"noise": "jitter"}}],
            "layers.1.gating.seed is required with layers.1.gating.noise = 'jitter'",
        ),
        (
            "layers",
            [LAYER, {**LAYER, "shared_expert": {}}],
            "layers.1.shared_expert needs intermediate_size or expert, and not both",
        ),
        (
            "layers",
            [{**LAYER, "gating": {"routing": "gating.Mine"}}],
            "layers.0.gating.routing is 'gating.Mine'; allowed: learned, expert_choice, hash, token_table, random, least_loaded, "
            "similarity, mindformers, sparsemixer, caller, or a plug-in 'package.module:Class'",
        ),
        (
            "observability",
            {"otlp_endpoint": "127.0.0.1:4317"},
            "observability.otlp_endpoint is '127.0.0.1:4317'; allowed: http://host:port or https://host:port",
        ),
    ],
)
def test_what_is_wrong_is_said_of_the_value_that_is_wrong(table: str, value: object, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"layers": [LAYER], table: value})
    assert str(caught.value) == f"configuration: {sentence}"


def test_a_number_of_too_many_digits_is_not_spelled_out(tmp_path: Path) -> None:
    (tmp_path / "service.toml").write_text(f"[server]\nport = 0x{'f' * 6000}")
    with pytest.raises(ConfigError, match=r"server\.port: .* \(got a number of too many digits\)"):
        load_config(tmp_path / "service.toml")


def test_the_same_key_twice_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "service.toml").write_text("[cluster]\nnum_cpus = 1\n[ray]\nnum_cpus = 2\n")
    with pytest.raises(ConfigError, match=r"service\.toml: cluster\.num_cpus and ray\.num_cpus are the same key"):
        load_config(tmp_path / "service.toml")
