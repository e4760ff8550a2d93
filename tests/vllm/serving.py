"""vLLM's API server as docs/vllm.md starts it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.vllm.environment import PYTHON, REPOSITORY, environment, free_port


class Engine:
    """The server with the arguments of the page, but for the ports."""

    def __init__(self, target: str, embedded: str, log: Path, *more: str) -> None:
        page = (REPOSITORY / "docs" / "vllm.md").read_text()
        (command,) = re.findall(r"^python (-m vllm.+?)^```", page, re.M | re.S)
        settings = f'"target": "{target}", "timeout_s": 15, "embedded": {embedded}'
        arguments = shlex.split(command.replace("\\\n", " ").replace('"target": "127.0.0.1:50051"', settings))
        self.port = free_port()
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [PYTHON, *arguments, "--host", "127.0.0.1", "--port", str(self.port), *more],
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


@contextmanager
def engine(target: str, embedded: str, log: Path, *more: str) -> Iterator[Engine]:
    """With `more` arguments than those of the page."""
    running = Engine(target, embedded, log, *more)
    try:
        yield running
    finally:
        running.process.terminate()
        running.process.wait(60)
