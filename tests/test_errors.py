"""Sentences for users: how they say numbers, and that they can be sent."""

from __future__ import annotations

import pytest

from moeserve.api.wire import decode_forward_response, encode_forward_response
from moeserve.errors import CheckpointError, ConfigError, ExpertUnavailable, InvalidRequest, MoEServeError, Overloaded, number_of
from moeserve.transport.wire import pack_error, unpack_note


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(0, "host", "0 hosts"), (1, "host", "1 host"), (2, "copy", "2 copies"), (1, "copy", "1 copy"), (3, "process", "3 processes")],
)
def test_one_thing_or_several(number: int, noun: str, text: str) -> None:
    assert number_of(number, noun) == text


@pytest.mark.parametrize("error", [MoEServeError, ConfigError, CheckpointError, ExpertUnavailable, InvalidRequest, Overloaded])
def test_a_sentence_is_text_whatever_is_in_it(error: type[MoEServeError]) -> None:
    """Names of files and strings of JSON need not be."""
    told = error("é: caf\udce9.bin and \ud800")
    assert str(told) == r"é: caf\udce9.bin and \ud800"
    assert unpack_note(pack_error(1, told)).sentence == str(told)


def test_nor_need_the_text_of_a_violation_be() -> None:
    response = decode_forward_response(encode_forward_response("7", InvalidRequest("of \ud800", "layer")))
    assert isinstance(response.result, InvalidRequest)
    assert response.result.violations[0].description == r"of \ud800"
