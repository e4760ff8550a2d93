"""Addresses: host:port as users write it, and as the service reports it."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import Any, Final

from moeserve.errors import ConfigError

#: gRPC's target schemes: with hosts and ports, and without
_OF_HOSTS: Final = ("dns", "ipv4", "ipv6")
_OF_OTHERS: Final = ("unix", "unix-abstract", "vsock", "xds")
_ALLOWED: Final = "allowed: host:port, as in 127.0.0.1:50051 or [::1]:50051, or a target of gRPC (dns:, ipv4:, ipv6:, unix:)"

_HOST_AND_PORT: Final = re.compile(r"(?P<host>\[[^\[\]]*\]|[^\[\]]*?):(?P<port>[^:\[\]]*)")
_HOST_NAME: Final = re.compile(r"[^\s/@?#%:,\[\]]+")

#: addresses reserved for documentation
_SOMEWHERE: Final = (("192.0.2.1", 9), ("2001:db8::1", 9))

#: length of an invalid target in a message
_MOST_SHOWN_CHARS: Final = 100


@dataclass(frozen=True)
class Target:
    """A client's target: `text` as gRPC takes it, `hosts` and their ports if it has any."""

    text: str
    hosts: tuple[tuple[str, int], ...]

    @property
    def is_here(self) -> bool:
        """Whether all of it is this machine."""
        return all(_is_here(host) for host, _ in self.hosts) and not self.text.startswith(("vsock:", "xds:"))


def parse_target(text: Any, name: str = "target") -> Target:
    """White space around it is ignored. Raises ConfigError naming the argument and the fault."""
    if not isinstance(text, str):
        raise ConfigError(f"{name} is {_cut(repr(text))}; {_ALLOWED}")
    target = text.strip()
    scheme, colon, rest = target.partition(":")
    try:
        if not target:
            raise ValueError("it is empty")
        if re.search(r"\s", target):
            raise ValueError("it has spaces in it")
        if colon and scheme in _OF_OTHERS:
            if not rest.strip("/"):
                raise ValueError("it names nothing")
            return Target(target, ())
        if colon and scheme in _OF_HOSTS:
            return Target(target, tuple(map(_host_and_port, _addresses(scheme, rest))))
        if rest.startswith("//"):
            raise ValueError(f"{scheme}:// does not belong there")
        return Target(target, (_host_and_port(target),))
    except ValueError as error:
        raise ConfigError(f"{name} is {_cut(repr(text))}: {error}; {_ALLOWED}") from None


def join(host: str, port: int) -> str:
    """host:port, for users to copy."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def port_of(target: str) -> int:
    """The port of host:port, as `join` makes it."""
    return int(target.rpartition(":")[2])


def is_loopback(host: str) -> bool:
    """Whether only this machine can call it."""
    if host.rstrip(".").lower() == "localhost":
        return True
    address = _ip(host)
    return address is not None and address.is_loopback


def called(host: str, peer: Target | None = None) -> str:
    """The address that reaches a listener at `host`; for a wildcard, this machine's address on the way to `peer` or to other networks."""
    address = _ip(host)
    if address is None or not address.is_unspecified:
        return host
    allowed = socket.AF_INET if address.version == 4 else socket.AF_UNSPEC
    for name, port in peer.hosts if peer is not None else _SOMEWHERE:
        try:
            family, kind, _, _, there = socket.getaddrinfo(name, port, allowed, socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(there)  # sends nothing
                return str(probe.getsockname()[0])
        except OSError:
            continue
    if peer is not None:
        return socket.gethostname()
    return "127.0.0.1" if address.version == 4 else "::1"


def host_of(text: str) -> str:
    """The name or address to listen at, without brackets; "" passes. Raises ValueError for anything else."""
    host = text.strip()
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if host and _ip(host) is None and not _is_name(host):
        raise ValueError("must be a name or an address, without a port")
    return host


def _addresses(scheme: str, rest: str) -> list[str]:
    """dns://SERVER/host:port, dns:host:port; ipv4:address:port,address:port."""
    if scheme != "dns":
        return rest.removeprefix("///").split(",")
    return [rest[2:].partition("/")[2] if rest.startswith("//") else rest]


def _host_and_port(text: str) -> tuple[str, int]:
    found = _HOST_AND_PORT.fullmatch(text)
    if _is_ipv6(text) or (found is not None and _is_ipv6(found["host"])):
        raise ValueError("an IPv6 address needs brackets, with its port after them")
    if found is None:
        raise ValueError("it has no port")
    host, port = found["host"], found["port"]
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise ValueError(f"its port is {_cut(repr(port))}, not a number from 1 to 65535")
    is_bracketed = host.startswith("[")
    host = host.strip("[]")
    if not (_is_ipv6(host) if is_bracketed else _is_name(host)):
        raise ValueError(f"its host is {_cut(repr(found['host']))}, neither a name nor an address")
    return host, int(port)


def _is_name(text: str) -> bool:
    """Python fails in an unforeseen way to look up a name that has a part without a character, or with more than 63."""
    try:
        text.encode("idna")
    except UnicodeError:
        return False
    return _HOST_NAME.fullmatch(text) is not None


def _is_here(host: str) -> bool:
    name, address = host.rstrip(".").lower(), _ip(host)
    if address is None:
        return name in ("localhost", "ip6-localhost", "ip6-loopback", socket.gethostname().lower()) or name.endswith(".localhost")
    if address.is_loopback or address.is_unspecified:
        return True
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))  # only an address of this machine can be bound
    except OSError:
        return False
    return True


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN_CHARS else text[:_MOST_SHOWN_CHARS] + "…"


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address
