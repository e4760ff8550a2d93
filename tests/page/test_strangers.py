"""The metrics port in bad company: connections that say nothing, too much, or something else; that drip, reset, or never read."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry

from moeserve.observe.page import StatusPage
from moeserve.observe.stats import Event, ServiceStats
from tests.support.waiting import until

PATIENCE_S = 20
#: more than kernels keep for a connection
ANSWER_BYTES = 2**25
GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n"


def a_lot() -> ServiceStats:
    return ServiceStats(1, (), (), 0, events=[Event(0.0, "call_failed", "x" * ANSWER_BYTES)])


@pytest.fixture
def page() -> Iterator[StatusPage]:
    page = StatusPage("127.0.0.1", 0, CollectorRegistry(), a_lot)
    yield page
    page.stop()


@pytest.fixture(autouse=True)
def nothing_is_logged(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Whatever happens here is no news, but for one line."""
    yield
    said = news(caplog)
    assert len(said) <= 1 and not any(record.exc_info for record in said)
    assert capsys.readouterr() == ("", "")


def news(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the page has logged: other threads of this process may be at work on what earlier tests have left."""
    return [record for record in caplog.records if record.threadName == "moeserve-page" and record.levelname != "DEBUG"]


def connect(page: StatusPage, say: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", page.port), timeout=PATIENCE_S)
    if say:
        connection.sendall(say)
    return connection


def everything(connection: socket.socket) -> bytes:
    """Until the page closes the connection, however that ends."""
    received = b""
    with connection, contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(2**20):
            received += piece
    return received


def is_served(page: StatusPage) -> bool:
    with urlopen(f"http://127.0.0.1:{page.port}/metrics", timeout=PATIENCE_S) as answer:
        return bool(answer.status == 200)


def is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_idle_connections_lock_nobody_out_and_cost_no_threads(page: StatusPage) -> None:
    """Half of them say nothing, half have begun; the oldest go first."""
    threads = set(threading.enumerate())
    idle = []
    for number in range(150):
        idle.append(connect(page, GET if number % 2 else b""))
        if number % 50 == 49:
            assert is_served(page)
    assert is_closed(idle[0]) and is_closed(idle[1])
    still_open = [number for number, connection in enumerate(idle) if not is_closed(connection)]
    assert 1 <= len(still_open) <= 32
    assert still_open == list(range(still_open[0], 150))
    assert len(set(threading.enumerate()) - threads) < len(still_open)
    for connection in idle:
        connection.close()
    assert is_served(page)


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01" + bytes(range(256)), b"400"),
        (bytes(300), b"400"),
        (b"hello\r\n\r\n", b"400"),
        (b"\r\n\r\n", b"400"),
        (b"GET http://[ HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/9" + b"9" * 5000 + b".0\r\n\r\n", b"400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"505"),
        (b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 1000 + b"\r\n", b"431"),
        (b"A" * 200_000, b"431"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 200000\r\n\r\n" + b"a" * 200_000, b"405"),
        (b"TRACE / HTTP/1.1\r\n\r\n", b"405"),
        (b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /metrics\0 HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /metrics?" + b"name[]=a&" * 1000 + b" HTTP/1.1\r\n\r\n", b"200"),
        (GET + b"Accept: application/openmetrics-text; version=" + b"9" * 100 + b"\r\n\r\n", b"200"),
        (GET + b"Accept: application/openmetrics-text; version=x\xff\r\n\r\n", b"200"),
        (GET + b"Accept: application/openmetrics-text; version=2.\r\n X-Said: here\r\n\r\n", b"200"),
        (GET + b"Content-Length: abc\r\n\r\n", b"200"),
        (b"GET /metrics HTTP/1.0\n\n", b"200"),
    ],
)
def test_what_is_no_request_is_refused(page: StatusPage, said: bytes, status: bytes) -> None:
    connection = connect(page, said)
    connection.shutdown(socket.SHUT_WR)
    answer = everything(connection)
    assert answer.startswith(b"HTTP/1.") and answer.split()[1] == status
    assert b"\n X-Said" not in answer
    assert is_served(page)


def test_connections_that_are_reset_are_no_news(page: StatusPage) -> None:
    for said in (b"", GET, GET + b"\r\n", b"GET /stats.json HTTP/1.1\r\n\r\n") * 10:
        connection = connect(page, said)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    assert is_served(page)


def test_who_takes_too_long_to_ask_is_left(page: StatusPage, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is said meanwhile."""
    monkeypatch.setattr("moeserve.observe.page.http_server._REQUEST_TIMEOUT_S", 0.2, raising=False)
    silent, dripping = connect(page), connect(page, GET)

    def is_left() -> bool:
        with contextlib.suppress(OSError):
            dripping.send(b"X")
        return is_closed(dripping)

    until(is_left)
    until(lambda: is_closed(silent))
    for connection in (silent, dripping):
        connection.close()


def test_who_takes_too_long_to_read_is_left(page: StatusPage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeserve.observe.page.http_server._ANSWER_TIMEOUT_S", 0.2, raising=False)
    connection = connect(page, b"GET /stats.json HTTP/1.1\r\n\r\n")
    assert connection.recv(1, socket.MSG_PEEK)
    until(lambda: not is_established(connection))
    received = everything(connection)
    assert received.startswith(b"HTTP/1.1 200 OK") and len(received) < ANSWER_BYTES
    assert is_served(page)


def is_established(connection: socket.socket) -> bool:
    """At the page's end."""
    here, there = (f"0100007F:{address[1]:04X}" for address in (connection.getpeername(), connection.getsockname()))
    states = [line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()]
    return [here, there, "01"] in states


def test_who_reads_is_answered_in_full(page: StatusPage) -> None:
    answer = everything(connect(page, b"GET /stats.json HTTP/1.1\r\n\r\n"))
    assert len(answer.partition(b"\r\n\r\n")[2]) > ANSWER_BYTES


def test_what_fails_here_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> ServiceStats:
        raise RuntimeError("no such luck")

    page = StatusPage("127.0.0.1", 0, CollectorRegistry(), fail)
    for _ in range(5):
        assert everything(connect(page, b"GET /stats.json HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 500")
    page.stop()
    assert len(news(caplog)) == 1 and "no such luck" in caplog.text
    caplog.clear()
