"""What a service runs on, and who controls it there."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moeserve.config.table import Table
from moeserve.config.values import MAX_HOSTS, File, Host, Port


class ControllerConfig(Table):
    """[controller]: of a deployed service, what changes it and tells frontends what to serve. TLS files are those of [server]."""

    control_host: Host = "127.0.0.1"
    #: 0 = any free port
    control_port: Port = 50050
    #: how many it starts on the nodes of the cluster, each listening as [server] says; 0 = all of them are `moeserve frontend`
    frontends: int = Field(default=1, ge=0, le=1024)
    #: certificate authority with which the frontends that it starts check it; unset = server.tls_cert itself, as is right if self-signed
    control_ca: File | None = None
    #: file holding the token with which frontends that it has not started may follow it; unset = none may
    frontend_token_file: File | None = None


class ClusterConfig(Table):
    """[cluster]: what hosts run on."""

    #: ray = each host is a Ray actor, as [ray] says; threads = hosts are threads of this process, without Ray
    kind: Literal["ray", "threads"] = "ray"


class RayConfig(Table):
    """[ray]: the cluster to join; unset = a local one, started and stopped by the service."""

    address: str | None = None
    #: where a deployed service has its actors: one service in each
    namespace: str = "moeserve"
    #: logical resources of a local Ray; unset = what the hosts ask for
    num_cpus: int | None = Field(default=None, ge=1, le=MAX_HOSTS)
    num_gpus: int | None = Field(default=None, ge=0, le=MAX_HOSTS)
    #: where a local Ray gets a private folder, and hosts one for sockets, whose paths must be short; unset = TMPDIR, or /tmp and the like
    temp_dir: File | None = None
