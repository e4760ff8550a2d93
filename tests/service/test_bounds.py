"""Every number from outside is compared with what can be before anything is allocated or looped for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moeserve import ConfigError, load_config

LAYER = {"hidden_size": 8, "intermediate_size": 8, "num_experts": 4}


def test_what_cannot_be_costs_nothing_and_is_a_sentence(tiny_moe: Path) -> None:
    """In a process that may take 1 GiB more than a small service: a list with an entry for each of 10^7 hosts takes more."""
    command = [sys.executable, "-m", "tests.service.asked_for_too_much", str(tiny_moe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    assert len(said) > 50
    refused = ("ConfigError: ", "CheckpointError: ", "InvalidRequest: ")
    assert not {case: sentence for case, sentence in said.items() if not sentence.startswith(refused) or "\n" in sentence}
    unsaid = {case: sentence for case, sentence in said.items() if not any(char.isdigit() for char in sentence)}
    assert not unsaid, "the value, or what is allowed"


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("server", "max_message_bytes", 2**31),
        ("server", "max_tokens_per_request", 2**31),
        ("server", "max_queued_tokens", 2**31),
        ("server", "drain_timeout_s", 1e9),
        ("batching", "max_batch_tokens", 2**31),
        ("batching", "max_batch_wait_ms", 1e12),
        ("batching", "micro_batches", 2**31),
        ("resilience", "request_timeout_s", 1e300),
        ("controller", "frontends", 10**6),
        ("placement", "experts_per_host", 2**40),
        ("placement", "memory_per_host_bytes", 10**30),
        ("placement", "gpus_per_host", 1e9),
        ("placement", "cpus_per_host", 1e9),
        ("placement", "wait_for_nodes_s", 1e9),
        ("ray", "num_cpus", 2**40),
        ("ray", "num_gpus", 2**40),
    ],
)
def test_numbers_of_the_configuration_have_an_upper_bound(table: str, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{table}\.{key}: Input should be less than or equal to .*got {value!r}".replace("+", r"\+")):
        load_config({"layers": [LAYER], table: {key: value}})


@pytest.mark.parametrize(
    ("gating", "sentence"),
    [
        ({"top_k": 2**32}, r"gating\.top_k: Input should be less than or equal to 1048576"),
        ({"min_capacity": 10**30}, r"gating\.min_capacity: Input should be less than or equal to 2147483647"),
        ({"capacity_multiple": 10**30}, r"gating\.capacity_multiple: Input should be less than or equal to 2147483647"),
        ({"seed": 2**63}, r"gating\.seed: Input should be less than 9223372036854775808"),
    ],
)
def test_so_have_those_of_the_gate(gating: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config({"layers": [{**LAYER, "gating": gating}]})


def test_what_is_wrong_is_not_repeated_at_length() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"layers": [LAYER], "server": {"port": "1" * 10**6}})
    assert len(str(caught.value)) < 1000
