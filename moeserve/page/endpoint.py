"""The metrics port: the page at /, its data at /stats.json, Prometheus' text at /metrics. GET and HEAD only, and no authentication:
it tells what the metrics tell, beside the names of hosts and nodes and what is placed where.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import gzip_accepted

from moeserve.page.document import load_document
from moeserve.page.exposition import expose
from moeserve.page.http_request import Request
from moeserve.page.http_server import Answer, HttpServer
from moeserve.stats import ServiceStats
from moeserve.summary import as_json

_HEADERS: Final = {
    "Server": "moeserve",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
#: of a host, what only callers with the token are told
_PRIVATE: Final = ("device", "cuda_visible_devices", "weights_bytes")
#: higher levels take ten times as long for a fifth less
_GZIP_LEVEL: Final = 1


class StatusPage:
    """Listens from the moment it is made; `stats` is called from its thread. Raises OSError when it cannot listen."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry, stats: Callable[[], ServiceStats]) -> None:
        self._registry = registry
        self._stats = stats
        self._document = load_document()
        self._server = HttpServer(host, port, self._answer, _HEADERS)

    @property
    def port(self) -> int:
        return self._server.port

    def stop(self) -> None:
        """Answers nothing from here on."""
        self._server.stop()

    def _answer(self, request: Request) -> Answer:
        if request.method not in ("GET", "HEAD"):
            return Answer(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET and HEAD\n", {"Allow": "GET, HEAD", **_TEXT})
        match request.path:
            case "/":
                headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": self._document.policy}
                return Answer(HTTPStatus.OK, self._document.body, headers)
            case "/stats.json":
                return Answer(HTTPStatus.OK, json.dumps(public_json(self._stats())).encode(), {"Content-Type": "application/json"})
            case "/metrics":
                return self._scrape(request)
        return Answer(HTTPStatus.NOT_FOUND, b"there are /, /metrics and /stats.json\n", _TEXT)

    def _scrape(self, request: Request) -> Answer:
        exposition = expose(self._registry, request.headers.get("accept", ""), request.query.get("name[]", ()))
        headers = {"Content-Type": exposition.content_type}
        if not gzip_accepted(request.headers.get("accept-encoding", "")):
            return Answer(HTTPStatus.OK, exposition.body, headers)
        return Answer(HTTPStatus.OK, gzip.compress(exposition.body, _GZIP_LEVEL), {**headers, "Content-Encoding": "gzip"})


_TEXT: Final = {"Content-Type": "text/plain; charset=utf-8"}


def public_json(stats: ServiceStats) -> dict[str, Any]:
    """What may be told without a token."""
    said = as_json(stats)
    said["hosts"] = [{name: value for name, value in host.items() if name not in _PRIVATE} for host in said["hosts"]]
    return said
