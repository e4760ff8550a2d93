"""The metrics port over real HTTP: what it answers, and what it refuses."""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.client
import json
import re
import socket

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moeserve import Client
from moeserve.observe.page import StatusPage
from moeserve.observe.summary import as_json
from tests.page.loaded import TOKENS, Loaded


def ask(loaded: Loaded, path: str, method: str = "GET", **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", loaded.page.port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


def test_the_data(loaded: Loaded) -> None:
    status, headers, body = ask(loaded, "/stats.json")
    assert (status, headers["Content-Type"], headers["Cache-Control"]) == (200, "application/json", "no-store")
    said = json.loads(body)
    assert [layer["tokens"] for layer in said["layers"]] == [TOKENS, 0]
    assert said["layers"] == as_json(loaded.service.frontend.stats())["layers"]
    assert [host["up"] for host in said["hosts"]] == [True, True, False]
    assert "host_lost" in [event["kind"] for event in said["events"]]


def test_it_tells_no_more_than_the_metrics_beside_names_and_placement(loaded: Loaded) -> None:
    """A new field of GetStats must be thought about before it is told to callers without a token."""
    said = json.loads(ask(loaded, "/stats.json")[2])
    assert set(said) == {
        "epoch", "uptime_s", "queue_tokens", "expert_retries", "layers", "hosts", "requests", "stages", "calls", "events", "changing",
    }  # fmt: skip
    assert set(said["hosts"][0]) == {"name", "up", "restarts", "node", "queue_tokens", "num_threads", "state", "demand_share", "busy_ratio"}
    assert set(said["layers"][0]) == {
        "name", "tokens", "processed", "dropped", "balancedness", "live_copies", "tensor_parallel", "placement",
        "host_balancedness",
    }  # fmt: skip
    with Client(loaded.service.target) as client:
        assert client.stats().hosts[0].device == "cpu"


def test_the_metrics_are_what_they_were(loaded: Loaded) -> None:
    status, headers, body = ask(loaded, "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain")
    names = {family.name for family in text_string_to_metric_families(body.decode())}
    assert {"moeserve_tokens", "moeserve_host_up", "moeserve_expert_tokens"} <= names
    assert re.search(rb'^moeserve_host_up\{host="host-2"\} 0\.0$', body, re.M)
    _, headers, body = ask(loaded, "/metrics", **{"Accept-Encoding": "gzip", "Accept": "application/openmetrics-text"})
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert gzip.decompress(body).endswith(b"# EOF\n")
    assert b"moeserve_queue_tokens" in (only := ask(loaded, "/metrics?name[]=moeserve_queue_tokens")[2]) and b"host_up" not in only


@pytest.mark.parametrize(
    ("accepted", "is_compressed"),
    [("gzip", True), ("br, GZIP;q=0.5", True), ("gzip; q=1.0", True), ("gzip;q=0", False), ("gzip ; q=0.000, br", False), ("br", False)],
)
def test_metrics_are_compressed_for_those_who_take_it(loaded: Loaded, accepted: str, is_compressed: bool) -> None:
    _, headers, _ = ask(loaded, "/metrics", **{"Accept-Encoding": accepted})
    assert (headers["Content-Encoding"] == "gzip") == is_compressed


def test_the_page_is_one_document_whose_policy_lets_only_itself_run(loaded: Loaded) -> None:
    status, headers, body = ask(loaded, "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'" and policy["frame-ancestors"] == "'none'"
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", body.decode(), re.S)
        assert policy[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert set(re.findall(rb"https?://[^/']+", body)) == {b"http://www.w3.org"}
    assert not re.search(rb"""\s(style|on\w+)=|innerHTML""", body)


@pytest.mark.parametrize("path", ["/", "/metrics", "/stats.json"])
def test_head_has_the_headers_of_get_and_no_body(loaded: Loaded, path: str) -> None:
    status, headers, body = ask(loaded, path, "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 100
    assert headers["Content-Type"] == ask(loaded, path)[1]["Content-Type"]
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/metrics", "/stats.json"])
def test_nothing_but_get_and_head(loaded: Loaded, method: str, path: str) -> None:
    status, headers, _ = ask(loaded, path, method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/x", "/../pyproject.toml", "/page.js"])
def test_there_is_nothing_else(loaded: Loaded, path: str) -> None:
    assert ask(loaded, path)[0] == 404


def test_a_caller_who_says_nothing_keeps_nobody_waiting(loaded: Loaded) -> None:
    with socket.create_connection(("127.0.0.1", loaded.page.port)):
        assert ask(loaded, "/stats.json")[0] == 200


def test_a_taken_port(loaded: Loaded) -> None:
    with pytest.raises(OSError, match="in use"):
        StatusPage("127.0.0.1", loaded.page.port, loaded.service.metrics.registry, loaded.service.frontend.stats)


def test_ipv6_and_stopping(loaded: Loaded) -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    page = StatusPage("::1", 0, loaded.service.metrics.registry, loaded.service.frontend.stats)
    with socket.create_connection(("::1", page.port)):
        pass
    page.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("::1", page.port))
