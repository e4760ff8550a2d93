"""The messages of the Open Inference Protocol, apart from those that other packages of this process may have of it.

Clients of the protocol bring generated code of the same package, `inference`; protobuf lets a name be in its pool of all modules only once.
So ours are in a pool of their own. `pb` is used like a generated module.
"""

from __future__ import annotations

from importlib.resources import files
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import Default, DescriptorPool
from google.protobuf.message_factory import GetMessageClass

__all__ = ["FILE", "SERVICE_NAME", "Described", "described", "pb"]

FILE: Final = FileDescriptorSet.FromString(files("moeserve.v1.inference").joinpath("open_inference.binpb").read_bytes()).file[0]
SERVICE_NAME: Final = f"{FILE.package}.{FILE.service[0].name}"

if TYPE_CHECKING:
    from moeserve.v1.inference import open_inference_pb2 as pb
else:
    _pool = DescriptorPool()
    _pool.Add(FILE)
    _found = _pool.FindFileByName(FILE.name)
    pb = SimpleNamespace(
        **{name: GetMessageClass(message) for name, message in _found.message_types_by_name.items()},
        **{value.name: value.number for enum in _found.enum_types_by_name.values() for value in enum.values},
    )


class Described:
    """A pool for reflection. A method is a symbol as well, but protobuf's pools do not look for the file of one."""

    def __init__(self, pool: DescriptorPool) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:  # noqa: N802  # protobuf's name
        """Raises KeyError."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            return self._pool.FindMethodByName(symbol).containing_service.file


def described(*services: str) -> Described:
    """The files of these services, of other packages, and of this one: what reflection tells."""
    pool, known = DescriptorPool(), Default()
    pool.Add(FILE)
    added = {FILE.name}

    def add(name: str) -> None:
        if name in added:
            return
        added.add(name)
        found = known.FindFileByName(name)
        for needed in found.dependencies:
            add(needed.name)
        pool.AddSerializedFile(found.serialized_pb)

    for service in services:
        if service != SERVICE_NAME:
            add(known.FindFileContainingSymbol(service).name)
    return Described(pool)
