"""CURVE keys for TCP: who may talk to whom (ZeroMQ RFC 26), and the host's authenticator (ZAP, RFC 27)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

from moeserve.transport.readiness import has_message

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"


@dataclass(frozen=True)
class KeyPair:
    """One party's keys, each 40 characters of Z85."""

    public: str
    secret: str = field(repr=False)

    @classmethod
    def generate(cls) -> KeyPair:
        """A new pair."""
        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())


@dataclass
class HostKeys:
    """A host's own keys and the public keys of the frontends and hosts that may talk to it."""

    own: KeyPair
    allowed: frozenset[str]

    def allow(self, public_keys: Iterable[str]) -> None:
        """Accept only these from now on, also on open connections; from any thread."""
        self.allowed = frozenset(public_keys)


@dataclass(frozen=True)
class FrontendKeys:
    """A frontend's own keys and the public key of the host it connects to."""

    own: KeyPair
    host: str


class ZapHandler:
    """Tells libzmq which public keys may connect to the sockets of `context`; make it before they are bound."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: HostKeys) -> None:
        self._keys = keys
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(_ZAP_ENDPOINT)

    def answer(self) -> None:
        """Answers all waiting requests of libzmq; never blocks."""
        while has_message(self.socket):
            version, request_id, _domain, _address, _identity, mechanism, *credentials = self.socket.recv_multipart()
            key = z85.encode(credentials[0]) if mechanism == b"CURVE" and [len(part) for part in credentials] == [32] else b""
            status, text = (b"200", b"OK") if key.decode() in self._keys.allowed else (b"400", b"unknown key")
            # The user id comes back with every frame of the connection.
            self.socket.send_multipart([version, request_id, status, text, key, b""])
