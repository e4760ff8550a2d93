"""Certificates and keys in PEM files: gRPC takes any bytes, and fails later, without a reason."""

from __future__ import annotations

import ssl
from pathlib import Path


def check_pair(cert: Path, key: Path) -> None:
    """Raises OSError unless they are a certificate and its key."""
    # With a password, even a wrong one, an encrypted key does not cause a prompt at the terminal.
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")


def check_authority(ca: Path) -> None:
    """Raises OSError unless it holds a certificate."""
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(ca)
