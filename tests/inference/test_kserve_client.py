"""Requests as KServe's Python client makes them, which says of every array how many bytes it has."""

from __future__ import annotations

import torch

from tests.inference.requests import Caller, answered, raw_request
from tests.support.engine import X


def test_the_size_of_an_array_is_said(caller: Caller) -> None:
    request = raw_request(hidden_states=X)
    request.inputs[0].parameters["binary_data_size"].int64_param = 4 * X.numel()
    assert torch.equal(answered(caller.infer(request))["hidden_states"], X)


def test_another_size_is_refused(caller: Caller) -> None:
    request = raw_request(hidden_states=X)
    request.inputs[0].parameters["binary_data_size"].int64_param = 4 * X.numel() - 1
    said = f"parameter 'binary_data_size' of input hidden_states is {4 * X.numel() - 1}; its shape takes {4 * X.numel()} bytes"
    assert caller.refused(request) == ("INVALID_ARGUMENT", said)
