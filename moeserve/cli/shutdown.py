"""`moeserve shutdown`: end a running service."""

from __future__ import annotations

from moeserve.cli.streams import say
from moeserve.cli.target import AdminTokenFile, Target, TlsCa, admin_of


def shutdown(target: Target, admin_token_file: AdminTokenFile, tls_ca: TlsCa = None) -> None:
    """End a service as SIGTERM does: running requests finish, and new requests are refused."""
    with admin_of(target, admin_token_file, tls_ca) as client:
        client.shutdown()
    say(f"{target} is draining")
