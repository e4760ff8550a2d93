"""Packets survive the way there and back, and nothing else passes for one."""

from __future__ import annotations

import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeserve import errors
from moeserve.api.tensors import FLOAT_DTYPES
from moeserve.transport.wire import (
    MAX_SENTENCE_BYTES,
    Destination,
    Kind,
    MalformedMessage,
    PassOn,
    PeerLost,
    WorkHeader,
    WorkShape,
    check_indices,
    kind_of,
    layout_of,
    pack_error,
    pack_note,
    pack_work,
    partial,
    read_destinations,
    sections,
    unpack_note,
    unpack_work,
    write_destinations,
)

counts = st.integers(1, 2**32 - 1)
longs = st.integers(0, 2**64 - 1)
shapes = st.builds(WorkShape, counts, counts, counts, st.sampled_from(list(FLOAT_DTYPES.values())), st.just(0))
headers = st.builds(WorkHeader, longs, st.integers(0, 2**32 - 1), longs, longs, shapes, longs, st.just(PassOn.NOTHING))
ways = st.sampled_from([PassOn.FAN_OUT, PassOn.CHAIN])


@given(headers)
def test_a_work_header_survives(header: WorkHeader) -> None:
    packet = pack_work(header)
    assert kind_of(packet) is Kind.WORK
    assert unpack_work(packet) == header


@given(headers, st.integers(2, 2**32 - 1), ways)
def test_a_header_with_several_destinations_survives_when_there_are_pairs_for_all(header: WorkHeader, count: int, way: PassOn) -> None:
    header = header._replace(shape=header.shape._replace(destinations=count), pass_on=way)
    if count <= header.shape.pairs:
        assert unpack_work(pack_work(header)) == header
    else:
        with pytest.raises(MalformedMessage, match="destinations"):
            unpack_work(pack_work(header))


@pytest.mark.parametrize(("count", "way"), [(0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (3, 3), (3, 255)])
def test_destinations_and_what_to_do_with_them_must_agree(count: int, way: int) -> None:
    packet = bytearray(pack_work(WorkHeader(1, 0, 0, 0, WorkShape(4, 4, 9, torch.float32, count), 0)))
    packet[2] = way
    with pytest.raises(MalformedMessage, match="destinations"):
        unpack_work(bytes(packet))


@given(st.sampled_from([Kind.HELLO, Kind.ACCEPT, Kind.REPLY, Kind.CANCEL]), st.integers(0, 2**16 - 1), longs)
def test_a_note_survives(kind: Kind, code: int, value: int) -> None:
    note = unpack_note(pack_note(kind, code=code, value=value))
    assert (note.kind, note.code, note.value, note.sentence) == (kind, code, value, "")


@given(longs, st.text(alphabet=st.characters(codec="utf-8"), max_size=2 * MAX_SENTENCE_BYTES))
def test_an_error_survives_but_for_the_end_of_a_long_sentence(work_id: int, sentence: str) -> None:
    note = unpack_note(pack_error(work_id, errors.DeadlineExceeded(sentence)))
    error = note.error()
    assert type(error) is errors.DeadlineExceeded and note.value == work_id
    kept = sentence.encode()[:MAX_SENTENCE_BYTES].decode(errors="replace")
    assert str(error) == kept


@given(st.binary(max_size=80) | st.builds(lambda kind, rest: bytes([kind]) + rest, st.integers(0, 8), st.binary(max_size=1100)))
def test_noise_is_refused_or_means_something_possible(packet: bytes) -> None:
    try:
        if kind_of(packet) is Kind.WORK:
            shape = unpack_work(packet).shape
            assert shape.rows and shape.hidden_size and shape.pairs and shape.dtype in FLOAT_DTYPES.values()
        else:
            unpack_note(packet)
    except MalformedMessage:
        pass


def test_a_lost_peer_is_told_from_any_other_error() -> None:
    error = unpack_note(pack_error(1, PeerLost("host 3 is gone"))).error()
    assert type(error) is PeerLost and str(error) == "host 3 is gone"
    assert type(unpack_note(pack_error(1, errors.ExpertUnavailable("?"))).error()) is errors.ExpertUnavailable


def test_an_unknown_status_is_refused() -> None:
    with pytest.raises(MalformedMessage):
        unpack_note(pack_note(Kind.ERROR, code=99, value=1, sentence="?")).error()


small = st.integers(1, 40)


@given(st.builds(WorkShape, small, small, small, st.sampled_from(list(FLOAT_DTYPES.values())), st.sampled_from([0, 2, 40])))
def test_sections_lie_apart_aligned_and_inside(shape: WorkShape) -> None:
    layout = layout_of(shape)
    memory = memoryview(mmap.mmap(-1, 64 * 1024))
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    views = [*sections(memory, shape, layout, 4096), partial(memory, shape, 4096 + layout.reply)]
    if shape.destinations:
        named = torch.frombuffer(memory, dtype=torch.int32, count=2 * shape.destinations, offset=4096 + layout.destinations)
        views.insert(4, named)
    spans = [(view.data_ptr() - start - 4096, view.numel() * view.element_size()) for view in views]
    end = 0
    for offset, nbytes in spans:
        assert offset % 64 == 0 and offset >= end
        end = offset + nbytes
    assert end == layout.total_bytes
    assert layout.request_bytes <= layout.reply


@pytest.mark.parametrize(
    ("row_index", "local_experts"), [([0, 3], [0, 1]), ([0, -1], [0, 1]), ([0, 1], [1, 0]), ([0, 1], [-1, 0]), ([0, 1], [0, -(2**31)])]
)
def test_indices_outside_the_message_are_refused(row_index: list[int], local_experts: list[int]) -> None:
    shape = WorkShape(3, 4, 2, torch.float32)
    layout = layout_of(shape)
    memory = memoryview(bytearray(layout.total_bytes))
    request = sections(memory, shape, layout)
    request.row_index[:] = torch.tensor([2, 0])
    request.local_experts[:] = torch.tensor([5, 5])
    check_indices(memory, shape, layout)
    request.row_index[:] = torch.tensor(row_index)
    request.local_experts[:] = torch.tensor(local_experts)
    with pytest.raises(MalformedMessage):
        check_indices(memory, shape, layout)


def addressed(local_experts: list[int], destinations: list[tuple[int, int]]) -> tuple[memoryview, WorkShape]:
    shape = WorkShape(1, 4, len(local_experts), torch.float32, len(destinations))
    layout = layout_of(shape)
    memory = memoryview(bytearray(layout.total_bytes))
    sections(memory, shape, layout).local_experts[:] = torch.tensor(local_experts)
    write_destinations(memory, layout, [Destination(*destination) for destination in destinations])
    return memory, shape


def test_local_experts_ascend_for_each_destination_anew() -> None:
    memory, shape = addressed([2, 5, 0, 0, 1], [(7, 2), (2**32 - 1, 4), (0, 5)])
    destinations = read_destinations(memory, shape, layout_of(shape))
    assert destinations == (Destination(7, 2), Destination(2**32 - 1, 4), Destination(0, 5))
    check_indices(memory, shape, layout_of(shape), 0, destinations)
    for local_experts in ([5, 2, 0, 0, 1], [2, 5, 1, 0, 1], [2, 5, -1, 0, 1], [2, 5, 0, 0, -1], [-1, 5, 0, 0, 1]):
        memory, shape = addressed(local_experts, [(7, 2), (1, 4), (0, 5)])
        with pytest.raises(MalformedMessage, match="local experts"):
            check_indices(memory, shape, layout_of(shape), 0, read_destinations(memory, shape, layout_of(shape)))


@pytest.mark.parametrize(
    "destinations",
    [
        [(0, 2), (1, 4)],
        [(0, 2), (1, 6)],
        [(0, 0), (1, 5)],
        [(0, 3), (1, 2), (2, 5)],
        [(0, 2), (1, 2), (2, 5)],
        [(0, 2), (0, 5)],
        [(0, 2**32 - 1), (1, 5)],
    ],
)
def test_destinations_share_out_the_pairs(destinations: list[tuple[int, int]]) -> None:
    memory, shape = addressed([0] * 5, destinations)
    with pytest.raises(MalformedMessage, match="destinations"):
        read_destinations(memory, shape, layout_of(shape))
