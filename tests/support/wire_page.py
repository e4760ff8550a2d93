"""docs/wire.md, every service, message and field of protos/ with its comment: python -m tests.support.wire_page."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from google.protobuf.descriptor_pb2 import ServiceDescriptorProto as Service
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "wire.md"
_INTRO = """\
# Every message and field

With this page you look up what a field means. It is generated from the files in [`protos/`](../protos), which clients of any language are
made of; [clients.md](clients.md) says how, and [open-inference.md](open-inference.md) is about clients of Triton and KServe.
"""
# Numbers of parts of files, as descriptors have them.
_FIELD, _NESTED, _VALUE, _METHOD = 2, 3, 2, 2
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
_TYPES = {number: name.removeprefix("TYPE_").lower() for name, number in FieldDescriptorProto.Type.items()}

Path_ = tuple[int, ...]
Comments = Mapping[Path_, str]


def page() -> str:
    """The whole document."""
    return _INTRO + "".join("\n" + "\n".join(_of_file(file)) + "\n" for file in _files())


def _files() -> Sequence[FileDescriptorProto]:
    protos = ROOT / "protos"
    names = sorted(
        (str(path.relative_to(protos)) for path in protos.rglob("*.proto")), key=lambda name: (not name.startswith("moeserve"), name)
    )
    with tempfile.NamedTemporaryFile() as out:
        arguments = [f"--proto_path={protos}", f"--descriptor_set_out={out.name}", "--include_source_info", *names]
        assert protoc.main(["protoc", *arguments]) == 0
        found = {file.name: file for file in FileDescriptorSet.FromString(Path(out.name).read_bytes()).file}
    return [found[name] for name in names]


def _of_file(file: FileDescriptorProto) -> Iterator[str]:
    said = {tuple(place.path): " ".join(place.leading_comments.split()) for place in file.source_code_info.location}
    yield f"## {file.name}"
    for index, service in enumerate(file.service):
        yield from _service(service, (_SERVICES, index), said)
    for index, message in enumerate(file.message_type):
        yield from _message(message, message.name, (_MESSAGES, index), said)
    for index, enum in enumerate(file.enum_type):
        yield from _enum(enum, (_ENUMS, index), said)


def _service(service: Service, path: Path_, said: Comments) -> Iterator[str]:
    yield from ("", f"### service {service.name}", *_sentence(path, said), "", "| method | request | response | |", "|---|---|---|---|")
    for index, method in enumerate(service.method):
        request = "stream " * method.client_streaming + _short(method.input_type)
        response = "stream " * method.server_streaming + _short(method.output_type)
        yield f"| `{method.name}` | {request} | {response} | {_cell(said, (*path, _METHOD, index))} |"


def _message(message: DescriptorProto, name: str, path: Path_, said: Comments) -> Iterator[str]:
    maps = {f".{nested.name}": nested for nested in message.nested_type if nested.options.map_entry}
    if message.field:
        yield from ("", f"### {name}", *_sentence(path, said), "", "| number | field | type | |", "|--:|---|---|---|")
    for index, field in enumerate(message.field):
        yield f"| {field.number} | `{field.name}` | {_type(field, maps)} | {_cell(said, (*path, _FIELD, index))} |"
    for index, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from _message(nested, f"{name}.{nested.name}", (*path, _NESTED, index), said)


def _enum(enum: EnumDescriptorProto, path: Path_, said: Comments) -> Iterator[str]:
    yield from ("", f"### enum {enum.name}", *_sentence(path, said), "", "| number | name | |", "|--:|---|---|")
    for index, value in enumerate(enum.value):
        yield f"| {value.number} | `{value.name}` | {_cell(said, (*path, _VALUE, index))} |"


def _sentence(path: Path_, said: Comments) -> Sequence[str]:
    return ["", said[path]] if said.get(path) else []


def _cell(said: Comments, path: Path_) -> str:
    return said.get(path, "").replace("|", "\\|")


def _type(field: FieldDescriptorProto, maps: Mapping[str, Any]) -> str:
    for end, entry in maps.items():
        if field.type_name.endswith(end):
            key, value = entry.field
            return f"map of {_type(key, {})} to {_type(value, {})}"
    name = _short(field.type_name) if field.type_name else _TYPES[field.type]
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    if field.proto3_optional:
        return f"optional {name}"
    return f"{name}, one of several" if field.HasField("oneof_index") else name


def _short(name: str) -> str:
    return name.rpartition(".")[2]


if __name__ == "__main__":
    DOCUMENT.write_text(page(), encoding="utf-8")
