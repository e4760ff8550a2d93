"""What ranks of vLLM that share a batch send, and whether an error can be told: needs no vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moeserve.engines.vllm.calls import used_rows
from moeserve.engines.vllm.failures import can_fail_requests


@pytest.mark.parametrize(("num_real", "num_rows", "num_ranks"), [(7, 8, 2), (1, 1, 2), (3, 8, 4), (5, 7, 3), (8, 8, 1)])
def test_each_rank_sends_those_of_its_rows_that_are_of_requests(num_real: int, num_rows: int, num_ranks: int) -> None:
    """vLLM pads a batch until all ranks have as many rows."""
    is_padding = torch.arange(num_rows) >= num_real
    count = -(-num_rows // num_ranks)
    used = [used_rows(is_padding, rank, count) for rank in range(num_ranks)]
    assert all(len(each) == count for each in used)
    assert torch.cat(used).tolist() == [row < num_real for row in range(count * num_ranks)]


@pytest.mark.parametrize(
    ("stages", "executor", "is_sequence_parallel", "can"),
    [(1, "mp", False, True), (1, "uni", False, True), (1, "mp", True, False), (2, "mp", False, False), (1, "ray", False, False)],
)
def test_errors_fail_requests_only_where_the_rank_that_calls_is_the_one_that_reports(
    stages: int, executor: str, is_sequence_parallel: bool, can: bool
) -> None:
    """Of another rank, nobody would see the error, and what its rows had instead would be sampled from."""
    parallel = SimpleNamespace(pipeline_parallel_size=stages, distributed_executor_backend=executor)
    moe = SimpleNamespace(is_sequence_parallel=is_sequence_parallel)
    assert can_fail_requests(SimpleNamespace(parallel_config=parallel), moe) is can
