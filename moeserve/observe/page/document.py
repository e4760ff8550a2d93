"""The page as one document with inline style and script, and the policy that lets a browser run only these."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from moeserve.observe.records import columns
from moeserve.observe.stats import HostStats, LayerStats, ServiceStats

#: fields of records that the page shows beside its own figures
_TABLES: Final = {"service": ServiceStats, "layers": LayerStats, "hosts": HostStats}


@dataclass(frozen=True)
class Document:
    """`policy` is the value of Content-Security-Policy."""

    body: bytes
    policy: str


def load_document() -> Document:
    """Built from the package's files."""
    folder = files(__package__)
    columns_json = json.dumps({table: [vars(one) for one in columns(kind) if one.is_public] for table, kind in _TABLES.items()})
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    script = script.replace("/*shown*/ {}", columns_json)
    page = folder.joinpath("page.html").read_text(encoding="utf-8")
    page = page.replace("/*style*/", style).replace("/*script*/", script)
    # Only the document's own script runs, and it connects only to this port.
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
