"""Regular expressions of checkpoints: those that are published match as Python has it, and those that could take for ever are refused."""

from __future__ import annotations

import re

import pytest

from moeserve.checkpoints.formats.pattern import is_in, matches

NAMES = (
    "model.layers.7.mlp.experts.12.gate_proj",
    "model.layers.18.mlp.gate",
    "model.language_model.layers.60.block_sparse_moe.experts.127.gate_up_proj",
    "thinker.model.layers.0.mlp.shared_expert_gate",
    "lm_head",
)
PUBLISHED = (
    ".*lm_head",
    ".*mlp.gate$",
    ".*mlp.shared_expert_gate$",
    ".*self_attn.*",
    ".*(self_attn|shared_experts).*",
    "^mtp.*",
    "visual.*",
    r"model\.layers\.\d+\..*",
    r".*\.mlp\..*",
    r".*\.18\..*gate.*",
    r".*\.(?:1[0-9]|2[0-9])\..*gate.*",
    r".*experts\.[01]\..*",
    r".*layers\.(0|1|2)\..*",
    r".*mlp\.(gate|up|gate_up|down)_proj.*",
    r".*layers\.\d+\.mlp\.experts\.\d+\.(gate|up|gate_up|down)_proj$",
    rf".*layers\.({'|'.join(map(str, range(61)))})\..*experts.*proj$",
    r"model\.layers\.(?:[0-9]|[1-5][0-9]|60)\.mlp\.experts\..*",
    r"(model\.)?(language_model\.)?.*block_sparse_moe\.gate",
    r"^(?!.*(shared_experts|lm_head)).*$",
    r"model.*layers\.\d+\.mlp.*experts\.\d+\.(gate|up)_proj.*$",
    r"[\w.]*experts[\w.]*",
    "(?i).*LM_Head",
    "",
)


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_published_patterns_match_as_python_has_it(pattern: str) -> None:
    for name in NAMES:
        assert matches(pattern, name) == (re.match(pattern, name) is not None)
        assert is_in(pattern, name) == (re.search(pattern, name) is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+!",
        "(a|a)*!",
        "(?:a|aa)+!",
        "(?i)(?:ab|AB){50}!",
        "(?:a?){50}!",
        "a?" * 50 + "!",
        ".*" * 8 + "!",
        ".{1,40}" * 8 + "!",
        "(?:.*a){12}!",
        "(?=(a+)+!)",
        "(?:){4000000000}!",
        "(?=m){4000000000}!",
        r"(.*)\1!",
    ],
)
def test_a_pattern_without_end_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"a\.b has the pattern .* in too many ways; allowed: fewer of"):
        matches(pattern, NAMES[0], "a.b")
    assert not is_in(pattern, NAMES[0])


@pytest.mark.parametrize("pattern", ["(", "(" * 900 + ")" * 900, "a{99999999999}", "(?L)a"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"has the pattern .*, which is none: "):
        matches(pattern, NAMES[0])
    assert not is_in(pattern, NAMES[0])


def test_a_pattern_of_a_book_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has a pattern of 3000 characters, .*; allowed: up to 2000"):
        matches("x" * 3000, NAMES[0])


def test_the_longer_a_name_the_fewer_parts_a_pattern_can_have() -> None:
    assert matches(".*a.*b.*c.*", "abc" * 20)
    with pytest.raises(ValueError, match="too many ways"):
        matches(".*a.*b.*c.*", "abc" * 200)
