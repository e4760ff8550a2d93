"""What users of vLLM's API server see when the service is away: `make test-vllm`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.harness import ServiceHarness
from tests.support.waiting import until
from tests.vllm.environment import free_port, needs_vllm
from tests.vllm.serving import engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), needs_vllm]
#: longer than a block of vLLM's cache of prefixes
LONG = "The import statement and the class statement. " * 16


@pytest.mark.parametrize("embedded", ['"auto"', "false"])
def test_chats_and_a_service_that_is_away_for_a_while(embedded: str, tiny_moe: Path, tmp_path: Path) -> None:
    config = {"model": {"checkpoint": tiny_moe, "dtype": "float32"}, "placement": {"num_hosts": 2}, "server": {"port": free_port()}}
    with ExitStack() as stack:
        with ServiceHarness(config, "shm", tmp_path) as service:
            vllm = stack.enter_context(engine(service.target, embedded, tmp_path / "vllm.log"))
            until(vllm.is_up, 900)
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(vllm.chat, ["The import statement", "class", "def f(", "The import statement"]))
            inside = [member.name for member in service.frontends.members() if member.name.endswith("(vLLM)")]
            assert len(inside) == (embedded != "false")
            assert [status for status, _ in answers] == [200] * 4 and answers[0] == answers[3] != answers[1]
        status, told = vllm.chat(LONG)
        assert status == 500 and vllm.is_up(), told
        with ServiceHarness(config, "shm", tmp_path):
            assert vllm.chat("The import statement") == answers[0]
            # Nothing of the failed step is in the cache.
            first = vllm.chat(LONG)
            assert first[0] == 200 and first == vllm.chat(LONG, cache_salt="another")
