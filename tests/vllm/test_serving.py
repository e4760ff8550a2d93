"""vLLM's API server as docs/vllm.md starts it, and what its users see when the service is away."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.harness import ServiceHarness
from tests.support.waiting import until
from tests.vllm.environment import PYTHON, REPOSITORY, environment, free_port, needs_vllm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), needs_vllm]
#: longer than a block of vLLM's cache of prefixes
LONG = "The import statement and the class statement. " * 16


class Engine:
    """The server with the arguments of the page, but for the ports."""

    def __init__(self, target: str, embedded: str, log: Path) -> None:
        page = (REPOSITORY / "docs" / "vllm.md").read_text()
        (command,) = re.findall(r"^python (-m vllm.+?)^```", page, re.M | re.S)
        settings = f'"target": "{target}", "timeout_s": 15, "embedded": {embedded}'
        arguments = shlex.split(command.replace("\\\n", " ").replace('"target": "127.0.0.1:50051"', settings))
        self.port = free_port()
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [PYTHON, *arguments, "--host", "127.0.0.1", "--port", str(self.port)],
                cwd=REPOSITORY,
                env=environment(),
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-8000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=10) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def chat(self, text: str, **more: object) -> tuple[int, str]:
        body = {"model": "tiny-moe", "max_tokens": 12, "temperature": 0, "messages": [{"role": "user", "content": text}], **more}
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(asked, timeout=120) as answer:
                return answer.status, json.load(answer)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture
def engine_of(tmp_path: Path) -> Iterator[list[Engine]]:
    started: list[Engine] = []
    yield started
    for each in started:
        each.process.terminate()
        each.process.wait(60)


@pytest.mark.parametrize("embedded", ['"auto"', "false"])
def test_chats_and_a_service_that_is_away_for_a_while(embedded: str, tiny_moe: Path, tmp_path: Path, engine_of: list[Engine]) -> None:
    config = {"model": {"checkpoint": tiny_moe, "dtype": "float32"}, "placement": {"num_hosts": 2}, "server": {"port": free_port()}}
    with ServiceHarness(config, "shm", tmp_path) as service:
        engine = Engine(service.target, embedded, tmp_path / "vllm.log")
        engine_of.append(engine)
        until(engine.is_up, 900)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(engine.chat, ["The import statement", "class", "def f(", "The import statement"]))
        inside = [member.name for member in service.frontends.members() if member.name.endswith("(vLLM)")]
        assert len(inside) == (embedded != "false")
        assert [status for status, _ in answers] == [200] * 4 and answers[0] == answers[3] != answers[1]
    status, told = engine.chat(LONG)
    assert status == 500 and engine.is_up(), told
    with ServiceHarness(config, "shm", tmp_path):
        assert engine.chat("The import statement") == answers[0]
        # Nothing of the failed step is in the cache.
        first = engine.chat(LONG)
        assert first[0] == 200 and first == engine.chat(LONG, cache_salt="another")
