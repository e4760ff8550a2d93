"""An error of a configuration is about the value that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeserve.config import load_config
from moeserve.errors import ConfigError

LAYER = {"hidden_size": 64, "intermediate_size": 128, "num_experts": 8}


@pytest.mark.parametrize(
    ("table", "value", "sentence"),
    [
        (
            "placement",
            {"copies": {"a-b": 0}},
            "placement.copies.a-b: Input should be greater than or equal to 1, or a valid dictionary (got 0)",
        ),
        ("placement", {"copies": {"a[0]": {"3": 0}}}, "placement.copies.a[0].3: Input should be greater than or equal to 1 (got 0)"),
        ("placement", {"copies": "x"}, "placement.copies: Input should be a valid integer, or a valid dictionary (got 'x')"),
        ("placement", {"num_hosts": "some"}, "placement.num_hosts: Input should be a valid integer, or 'all' (got 'some')"),
        ("placement", {"node_labels": {"a-b": 3}}, "placement.node_labels.a-b: Input should be a valid string (got 3)"),
        (
            "layers",
            [{**LAYER, "intermediate_size": [8, 0]}],
            "layers.0.intermediate_size.1: Input should be greater than or equal to 1 (got 0)",
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
