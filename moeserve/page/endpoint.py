"""The metrics port: the page at /, its data at /stats.json, Prometheus' text at /metrics. GET and HEAD only, and no authentication:
it tells what the metrics tell, beside the names of hosts and nodes and what is placed where.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from socketserver import ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

from moeserve.page.document import load_document
from moeserve.stats import ServiceStats
from moeserve.summary import as_json

_READ_TIMEOUT_S: Final = 10.0
_HEADERS: Final = (
    ("Server", "moeserve"),
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
#: of a host, what only callers with the token are told
_PRIVATE: Final = ("device", "cuda_visible_devices", "weights_bytes")

#: status line, headers, body
Answer = tuple[str, Sequence[tuple[str, str]], bytes]


class StatusPage:
    """Listens from the moment it is made; `stats` is called from its threads. Raises OSError when it cannot listen."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry, stats: Callable[[], ServiceStats]) -> None:
        self._metrics = make_wsgi_app(registry)
        self._stats = stats
        self._document = load_document()
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self._server = _server_class(family)((str(address[0]), int(address[1])), _Handler)
        self._server.set_app(self._serve)
        self._thread = threading.Thread(target=self._server.serve_forever, name="moeserve-page", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_port

    def stop(self) -> None:
        """Answers nothing from here on."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        status, headers, body = self._answer(environ)
        start_response(status, [*headers, *_HEADERS, ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _answer(self, environ: WSGIEnvironment) -> Answer:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return "405 Method Not Allowed", [("Allow", "GET, HEAD"), _TEXT], b"only GET and HEAD\n"
        match environ["PATH_INFO"]:
            case "/":
                html = ("Content-Type", "text/html; charset=utf-8")
                return "200 OK", [html, ("Content-Security-Policy", self._document.policy)], self._document.body
            case "/stats.json":
                return "200 OK", [("Content-Type", "application/json")], json.dumps(public_json(self._stats())).encode()
            case "/metrics":
                return self._scrape(environ)
        return "404 Not Found", [_TEXT], b"there are /, /metrics and /stats.json\n"

    def _scrape(self, environ: WSGIEnvironment) -> Answer:
        told: list[tuple[str, list[tuple[str, str]]]] = []

        def start_response(status: str, headers: list[tuple[str, str]], *_: Any) -> Any:
            told.append((status, headers))

        body = b"".join(self._metrics({**environ, "REQUEST_METHOD": "GET"}, start_response))
        (status, headers) = told[0]
        return status, headers, body


_TEXT: Final = ("Content-Type", "text/plain; charset=utf-8")


def public_json(stats: ServiceStats) -> dict[str, Any]:
    """What may be told without a token."""
    said = as_json(stats)
    said["hosts"] = [{name: value for name, value in host.items() if name not in _PRIVATE} for host in said["hosts"]]
    return said


def _server_class(family: int) -> type[WSGIServer]:
    return type("_Server", (ThreadingMixIn, WSGIServer), {"daemon_threads": True, "address_family": family})


class _Handler(WSGIRequestHandler):
    timeout = _READ_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are no news."""
