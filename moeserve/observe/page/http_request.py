"""One HTTP request from an untrusted client: read in full, or as far as needed to refuse it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from typing import Final
from urllib.parse import parse_qs, urlsplit

MAX_HEAD_BYTES: Final = 16 * 2**10


@dataclass(frozen=True)
class Request:
    """`headers` by their names in lower case, each on one line."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]


async def read_head(reader: asyncio.StreamReader) -> bytes:
    """The head up to the empty line, or up to the point where it is invalid or too long; empty = the caller has disconnected."""
    head = b""
    while b"\r\n\r\n" not in head and b"\n\n" not in head:
        more = await reader.read(MAX_HEAD_BYTES)
        head += more
        if not more or not head[:1].isalpha() or len(head) > MAX_HEAD_BYTES:
            break
    return head


def parse(head: bytes) -> Request | HTTPStatus:
    """The request, or the status that refuses it."""
    if len(head) > MAX_HEAD_BYTES:
        return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    parser = _Parser(head)
    if not parser.is_request:
        return parser.refusal
    try:
        url = urlsplit(parser.path)
        query = parse_qs(url.query)
    except ValueError:
        return HTTPStatus.BAD_REQUEST
    headers = {name.lower(): " ".join(value.split()) for name, value in parser.headers.items()}
    return Request(parser.command, url.path, query, headers)


class _Parser(BaseHTTPRequestHandler):
    """The library's reading of a request, without its sockets."""

    def __init__(self, head: bytes) -> None:
        self.refusal = HTTPStatus.BAD_REQUEST
        self.rfile = BytesIO(head)
        self.raw_requestline = self.rfile.readline()
        self.is_request = self.parse_request()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.refusal = HTTPStatus(code)
