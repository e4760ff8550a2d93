"""The table [server]."""

from __future__ import annotations

from itertools import combinations
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from moeserve.config.table import Table
from moeserve.config.values import MAX_SIZE, Bytes, File, Host, Port, Seconds, Size

#: more than the cores of a machine are of no use
_MAX_PROCESSES: Final = 256
#: gRPC counts milliseconds in 32 bits
_LONGEST_AGE_S: Final = 2e6


class ServerConfig(Table):
    """[server]: addresses, access and limits."""

    host: Host = "127.0.0.1"
    #: 0 = any free port
    port: Port = 50051
    metrics_port: Port = 9464
    #: frontends of `serve` that share `port`, each a process of its own: callers' connections are spread over them
    processes: int = Field(default=1, ge=1, le=_MAX_PROCESSES)
    #: the standard health service only, always in plain text, for probes that cannot use TLS; unset = none
    health_port: Port | None = None
    tls_cert: File | None = None
    tls_key: File | None = None
    #: certificate authority of the clients; set = clients must present a certificate (mutual TLS)
    client_ca: File | None = None
    #: file with the bearer token that clients must send
    auth_token_file: File | None = None
    #: file with another token, for AdminService; unset = the service cannot be changed over the network
    admin_token_file: File | None = None
    #: serve a non-loopback address without TLS and token
    insecure: bool = False
    #: tensors in POSIX shared memory (Open Inference Protocol): of callers on this machine that run as the same user, or of nobody
    shared_memory: Literal["local", "off"] = "local"
    max_message_bytes: int = Field(default=256 * 2**20, ge=2**16, le=MAX_SIZE)
    max_tokens_per_request: Size = 65536
    #: tokens admitted and not yet answered; further requests are refused at once
    max_queued_tokens: Size = 262144
    #: messages that were read and not answered yet, and answers that were not taken yet; the rest is refused, most of it before it is read
    max_queued_bytes: Bytes = 2**30
    #: how long a message may take to arrive, and an answer to be taken; then its call, or its connection, is ended
    transfer_timeout_s: Annotated[Seconds, Field(gt=0)] = 60.0
    #: the maximum age of a connection: then it takes no new calls, and its client looks up the service's name again; 0 = never
    max_connection_age_s: float = Field(default=60.0, ge=0, le=_LONGEST_AGE_S)
    #: how long the calls on such a connection may still take; unset = until they end
    max_connection_age_grace_s: float | None = Field(default=None, ge=0, le=_LONGEST_AGE_S)
    #: how long running requests may take to finish after SIGTERM
    drain_timeout_s: Seconds = 30.0

    @model_validator(mode="after")
    def _tls_is_complete(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("server.tls_cert and server.tls_key must be given together")
        if self.client_ca is not None and self.tls_cert is None:
            raise ValueError("server.client_ca needs server.tls_cert and server.tls_key")
        return self

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        for key, other in combinations(("port", "metrics_port", "health_port"), 2):
            if (port := getattr(self, key)) and port == getattr(self, other):
                raise ValueError(f"server.{key} and server.{other} are both {port}; each needs a port of its own")
        return self
