"""Packets survive the way there and back, and nothing else passes for one."""

from __future__ import annotations

import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeserve import errors
from moeserve.tensors import FLOAT_DTYPES
from moeserve.transport.wire import (
    MAX_SENTENCE_BYTES,
    Kind,
    MalformedMessage,
    WorkHeader,
    WorkShape,
    check_indices,
    kind_of,
    layout_of,
    pack_error,
    pack_note,
    pack_work,
    partial,
    sections,
    unpack_note,
    unpack_work,
)

counts = st.integers(1, 2**32 - 1)
longs = st.integers(0, 2**64 - 1)
shapes = st.builds(WorkShape, counts, counts, counts, st.sampled_from(list(FLOAT_DTYPES.values())))
headers = st.builds(WorkHeader, longs, st.integers(0, 2**32 - 1), longs, longs, shapes, longs)


@given(headers)
def test_a_work_header_survives(header: WorkHeader) -> None:
    packet = pack_work(header)
    assert kind_of(packet) is Kind.WORK
    assert unpack_work(packet) == header


@given(st.sampled_from([Kind.HELLO, Kind.WELCOME, Kind.REPLY, Kind.CANCEL]), st.integers(0, 2**16 - 1), longs)
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


def test_an_unknown_status_is_refused() -> None:
    with pytest.raises(MalformedMessage):
        unpack_note(pack_note(Kind.ERROR, code=99, value=1, sentence="?")).error()


small = st.integers(1, 40)


@given(st.builds(WorkShape, small, small, small, st.sampled_from(list(FLOAT_DTYPES.values()))))
def test_sections_lie_apart_aligned_and_inside(shape: WorkShape) -> None:
    layout = layout_of(shape)
    memory = memoryview(mmap.mmap(-1, 64 * 1024))
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    views = [*sections(memory, shape, layout, 4096), partial(memory, shape, 4096 + layout.reply)]
    spans = [(view.data_ptr() - start - 4096, view.numel() * view.element_size()) for view in views]
    end = 0
    for offset, nbytes in spans:
        assert offset % 64 == 0 and offset >= end
        end = offset + nbytes
    assert end == layout.total_bytes
    assert layout.request_bytes <= layout.reply


@pytest.mark.parametrize(
    ("row_index", "slots"), [([0, 3], [0, 1]), ([0, -1], [0, 1]), ([0, 1], [1, 0]), ([0, 1], [-1, 0]), ([0, 1], [0, -(2**31)])]
)
def test_indices_outside_the_message_are_refused(row_index: list[int], slots: list[int]) -> None:
    shape = WorkShape(3, 4, 2, torch.float32)
    layout = layout_of(shape)
    memory = memoryview(bytearray(layout.total_bytes))
    request = sections(memory, shape, layout)
    request.row_index[:] = torch.tensor([2, 0])
    request.slots[:] = torch.tensor([5, 5])
    check_indices(memory, shape, layout)
    request.row_index[:] = torch.tensor(row_index)
    request.slots[:] = torch.tensor(slots)
    with pytest.raises(MalformedMessage):
        check_indices(memory, shape, layout)
