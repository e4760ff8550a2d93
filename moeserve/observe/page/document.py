"""The page as one document with its style and script inside, and the policy that lets a browser run just these."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from moeserve.observe.records import columns
from moeserve.observe.stats import HostStats, LayerStats, ServiceStats

#: what the page shows of records beside what it works out itself
_TABLES: Final = {"service": ServiceStats, "layers": LayerStats, "hosts": HostStats}


@dataclass(frozen=True)
class Document:
    """`policy` is the value of Content-Security-Policy."""

    body: bytes
    policy: str


def load_document() -> Document:
    """Put together of the package's files."""
    folder = files(__package__)
    columns_json = json.dumps({table: [vars(one) for one in columns(kind) if one.is_public] for table, kind in _TABLES.items()})
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    script = script.replace("/*shown*/ {}", columns_json)
    page = folder.joinpath("page.html").read_text(encoding="utf-8")
    page = page.replace("/*style*/", style).replace("/*script*/", script)
    # Nothing but what is in the document runs, and it talks to nobody but this port.
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(script)}",
            f"style-src {_hash(style)}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    return Document(page.encode(), policy)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
