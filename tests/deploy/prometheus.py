"""A real Prometheus on loopback, with the project's own configuration but for where and how often it looks."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

import pytest
import yaml

from tests.deploy.files import ALERTS, DEPLOY, read_yaml
from tests.support.ports import kept_port
from tests.support.waiting import until

PATIENCE_S = 60
#: whatever proxy the environment names
_open = build_opener(ProxyHandler({})).open


class Prometheus:
    """Asks a running Prometheus over its HTTP API."""

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, path: str, **parameters: str) -> Any:
        try:
            with _open(f"{self._url}/api/v1/{path}?{urlencode(parameters)}", timeout=10) as answer:
                said = json.load(answer)
        except HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None
        assert said["status"] == "success", said
        return said["data"]

    def ask(self, expression: str, **at: str) -> list[tuple[dict[str, str], float]]:
        """The labels and the value of each series that answers, now or at a `time`."""
        data = self.get("query", query=expression, **at)
        assert data["resultType"] == "vector"
        return [(one["metric"], float(one["value"][1])) for one in data["result"]]

    def has_seen(self, scrapes: int) -> None:
        """Until the service was scraped so often again."""
        before = self._scrapes()
        until(lambda: self._scrapes() >= before + scrapes)

    def well_at(self) -> str:
        """The time of a scrape that has not failed. After one that was late, as on a busy machine, there are no series now."""
        ((_, seconds),) = until(lambda: self.ask('timestamp(up{job="moeserve"}) and up{job="moeserve"} == 1'))
        return str(seconds)

    def is_ready(self) -> bool:
        try:
            with _open(f"{self._url}/-/ready", timeout=10) as answer:
                return bool(answer.status == 200)
        except URLError:
            return False

    def _scrapes(self) -> float:
        return sum(value for _, value in self.ask('count_over_time(up{job="moeserve"}[1h])'))


@contextmanager
def prometheus(folder: Path, metrics_port: int) -> Iterator[Prometheus]:
    """Scrapes 127.0.0.1:metrics_port; skips the test where there is no Prometheus."""
    found = shutil.which("prometheus")
    if found is None:
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    config = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")
    config["global"] = {"scrape_interval": "250ms", "scrape_timeout": "250ms", "evaluation_interval": "250ms"}
    config["rule_files"] = [str(ALERTS)]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{metrics_port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{kept_port()}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                found,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stderr=log,
        )
        try:
            server = Prometheus(f"http://{address}")
            until(lambda: process.poll() is not None or server.is_ready())
            assert process.poll() is None, (folder / "log").read_text()
            yield server
        finally:
            process.terminate()
            process.wait()
