"""The cluster of a service, and its controller."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moeserve.config.table import Table
from moeserve.config.values import MAX_HOSTS, File, Host, Port


class ControllerConfig(Table):
    """[controller]: the controller of a deployed service, which sends releases to frontends. TLS files are those of [server]."""

    control_host: Host = "127.0.0.1"
    #: 0 = any free port
    control_port: Port = 50050
    #: frontends that it starts on the nodes of the cluster, each listening as in [server]; 0 = all of them are `moeserve frontend`
    frontends: int = Field(default=1, ge=0, le=1024)
    #: certificate authority for its own frontends to verify it; unset = server.tls_cert itself, for a self-signed certificate
    control_ca: File | None = None
    #: file with the token of frontends that it has not started; unset = it accepts no such frontends
    frontend_token_file: File | None = None


class ClusterConfig(Table):
    """[cluster]: where hosts run."""

    #: ray = each host is a Ray actor, as in [ray]; threads = hosts are threads of this process, without Ray
    kind: Literal["ray", "threads"] = "ray"


class RayConfig(Table):
    """[ray]: the cluster to join; unset = a local one, started and stopped by the service."""

    address: str | None = None
    #: namespace of a deployed service's actors: one service in each
    namespace: str = "moeserve"
    #: logical resources of a local Ray; unset = those of this machine, or as many CPUs as the first hosts need if that is more
    num_cpus: int | None = Field(default=None, ge=1, le=MAX_HOSTS)
    num_gpus: int | None = Field(default=None, ge=0, le=MAX_HOSTS)
    #: parent of private folders of a local Ray and of hosts' sockets, whose paths must be short; unset = TMPDIR, or /tmp and the like
    temp_dir: File | None = None
