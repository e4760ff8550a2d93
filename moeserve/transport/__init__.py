"""Bytes between a frontend (asyncio) and expert hosts (a blocking loop): one interface for all transports.

`unix:/path` shared memory on one node · `tcp://address:port` across nodes · `local:name` within one process.
"""

from __future__ import annotations

from collections.abc import Sequence

from zmq import ZMQError

from moeserve.errors import ConfigError
from moeserve.memory import give_back_pools
from moeserve.transport.channel import Channel, ChannelClosed, HostSilent, Lease
from moeserve.transport.keys import FrontendKeys, HostKeys, KeyPair
from moeserve.transport.listener import Listener, Poller, Source
from moeserve.transport.loads import Loads
from moeserve.transport.local import LocalSource, connect_local, is_in_this_process
from moeserve.transport.memory import Limits
from moeserve.transport.partial_future import Partial, PartialFuture
from moeserve.transport.shm_channel import connect_unix
from moeserve.transport.shm_source import ShmSource
from moeserve.transport.tcp_channel import connect_tcp
from moeserve.transport.tcp_source import TcpSource
from moeserve.transport.timing import SILENT_AFTER_S
from moeserve.transport.wire import Destination, PassOn, PeerLost, WorkShape
from moeserve.transport.work import Work

__all__ = [
    "Channel",
    "ChannelClosed",
    "Destination",
    "FrontendKeys",
    "HostKeys",
    "HostSilent",
    "KeyPair",
    "Lease",
    "Limits",
    "Listener",
    "Loads",
    "Partial",
    "PartialFuture",
    "PassOn",
    "PeerLost",
    "Work",
    "WorkShape",
    "choose_endpoint",
    "connect",
    "give_back_pools",
    "listen",
]

_DEFAULT_LIMITS = Limits()


async def connect(
    endpoint: str,
    *,
    limits: Limits = _DEFAULT_LIMITS,
    keys: FrontendKeys | None = None,
    timeout_s: float = 5.0,
    silent_after_s: float = SILENT_AFTER_S,
) -> Channel:
    """A channel to the host at `endpoint`; `keys` are used over TCP only.

    It closes with HostSilent when the host owes answers and sends neither these nor heartbeats for `silent_after_s`, however long it
    computes. Time in which this process was stopped itself does not count.

    Raises ChannelClosed when no host agrees to talk within `timeout_s`, or this process can open no connection now, as for want of file
    descriptors; ConfigError when `endpoint` is not an endpoint.
    """
    try:
        if endpoint.startswith("unix:"):
            return await connect_unix(endpoint, limits, timeout_s, silent_after_s)
        if endpoint.startswith("local:"):
            return await connect_local(endpoint, limits, timeout_s, silent_after_s)
        if endpoint.startswith("tcp://"):
            return await connect_tcp(endpoint, limits, timeout_s, keys, silent_after_s)
    except (OSError, ZMQError) as error:
        raise ChannelClosed(f"no connection to {endpoint} can be opened: {error.strerror}") from None
    raise _unknown(endpoint)


def choose_endpoint(endpoints: Sequence[str], *, is_same_node: bool) -> str:
    """Which of a host's endpoints to connect to: memory where both are on one node, TCP otherwise.

    Raises ChannelClosed when none of them is reachable.
    """
    over_tcp = [endpoint for endpoint in endpoints if endpoint.startswith("tcp://")]
    in_memory = [endpoint for endpoint in endpoints if endpoint not in over_tcp] if is_same_node else []
    for endpoint in (*in_memory, *over_tcp):
        if not endpoint.startswith("local:") or is_in_this_process(endpoint):
            return endpoint
    where = "process" if is_same_node else "node"
    raise ChannelClosed(f"a host that listens only at {', '.join(endpoints)} cannot be reached from another {where}")


def listen(*endpoints: str, limits: Limits = _DEFAULT_LIMITS, keys: HostKeys | None = None) -> Listener:
    """One host's listener on all `endpoints`; with `keys`, TCP admits the listed frontends only.

    Raises ConfigError when it cannot or may not listen at one of them.
    """
    poller, arrived = Poller(), list[Work]()
    sources: list[Source] = []
    try:
        for endpoint in endpoints:
            sources.append(_source(endpoint, limits, poller, arrived, keys))
    except BaseException:
        for source in sources:
            source.close()
        poller.close()
        raise
    return Listener(poller, sources, arrived)


def _source(endpoint: str, limits: Limits, poller: Poller, arrived: list[Work], keys: HostKeys | None) -> Source:
    if endpoint.startswith("unix:"):
        return ShmSource(endpoint, limits, poller, arrived)
    if endpoint.startswith("local:"):
        return LocalSource(endpoint, limits, poller, arrived)
    if endpoint.startswith("tcp://"):
        return TcpSource(endpoint, limits, poller, arrived, keys)
    raise _unknown(endpoint)


def _unknown(endpoint: str) -> ConfigError:
    return ConfigError(f"{endpoint} is not an endpoint: use unix:/path, tcp://address:port or local:name")
