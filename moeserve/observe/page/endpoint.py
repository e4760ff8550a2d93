"""The metrics port: the page at /, its data at /stats.json, Prometheus' text at /metrics.

GET and HEAD only, and no authentication: it shows the metrics, the names of hosts and nodes, and the placement.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

from prometheus_client import CollectorRegistry

from moeserve.observe.page.document import load_document
from moeserve.observe.page.exposition import expose
from moeserve.observe.page.http_request import Request
from moeserve.observe.page.http_server import HttpAnswer, HttpServer
from moeserve.observe.page.others import OtherProcesses
from moeserve.observe.records import columns
from moeserve.observe.stats import HostStats, ServiceStats
from moeserve.observe.summary import as_json

_HEADERS: Final = {
    "Server": "moeserve",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
#: higher levels take ten times as long for a fifth less
_GZIP_LEVEL: Final = 1


class StatusPage:
    """Listens from the moment it is made; `stats` is called from its thread. Raises OSError when it cannot listen.

    `others`: processes whose counts /metrics shows, too.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        stats: Callable[[], ServiceStats],
        others: OtherProcesses | None = None,
    ) -> None:
        self._registry, self._others = registry, others
        self._stats = stats
        self._document = load_document()
        self._server = HttpServer(host, port, self._answer, _HEADERS)

    @property
    def port(self) -> int:
        """The port it listens on, also if port 0 was configured."""
        return self._server.port

    def stop(self) -> None:
        """Stops listening."""
        self._server.stop()

    def _answer(self, request: Request) -> HttpAnswer:
        if request.method not in ("GET", "HEAD"):
            return HttpAnswer(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET and HEAD\n", headers={"Allow": "GET, HEAD"})
        match request.path:
            case "/":
                policy = {"Content-Security-Policy": self._document.policy}
                return HttpAnswer(HTTPStatus.OK, self._document.body, "text/html; charset=utf-8", policy)
            case "/stats.json":
                return HttpAnswer(HTTPStatus.OK, json.dumps(public_json(self._stats())).encode(), "application/json")
            case "/metrics":
                return self._scrape(request)
        return HttpAnswer(HTTPStatus.NOT_FOUND, b"there are /, /metrics and /stats.json\n")

    def _scrape(self, request: Request) -> HttpAnswer:
        accept, names = request.headers.get("accept", ""), request.query.get("name[]", [])
        exposition = expose(self._registry, accept, names)
        if self._others is not None:
            exposition = self._others.add_to(exposition, accept, names)
        if not _takes_gzip(request.headers.get("accept-encoding", "")):
            return HttpAnswer(HTTPStatus.OK, exposition.body, exposition.content_type)
        body = gzip.compress(exposition.body, _GZIP_LEVEL)
        return HttpAnswer(HTTPStatus.OK, body, exposition.content_type, {"Content-Encoding": "gzip"})


def _takes_gzip(accept_encoding: str) -> bool:
    for each in accept_encoding.lower().split(","):
        name, _, weight = each.replace(" ", "").partition(";q=")
        if name == "gzip":
            return re.fullmatch(r"0(\.0*)?", weight) is None
    return False


def public_json(stats: ServiceStats) -> dict[str, Any]:
    """The fields that are public: shown without a token."""
    said = as_json(stats)
    public = {"name", "up", "demand_share", *(column.key for column in columns(HostStats) if column.is_public)}
    said["hosts"] = [{name: value for name, value in host.items() if name in public} for host in said["hosts"]]
    return said
