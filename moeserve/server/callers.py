"""Whose call it is, for sharing the service fairly."""

from __future__ import annotations

from moeserve.server.rpc import Context


def caller_of(context: Context) -> str:
    """Who is known by a certificate is that, from wherever it calls; others are the connection that the call came by.

    A bearer token does not tell callers apart, as all of them send the same one.
    """
    identities = context.peer_identities()
    return b"\0".join(identities).decode("latin-1") if identities else context.peer()
