"""A routing from an import path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moeserve.config import GatingConfig
from moeserve.errors import ConfigError
from moeserve.gating import GateInput, Router, Selection, route


class LastExperts:
    """A plug-in."""

    def __init__(self, gating: GatingConfig) -> None:
        self.top_k = gating.top_k

    def __call__(self, gate: GateInput) -> Selection:
        last = torch.arange(gate.num_experts - self.top_k, gate.num_experts)
        topk_ids = last.repeat(gate.requests.num_tokens, 1)
        scores = gate.router_logits.softmax(dim=1)
        return Selection(scores, topk_ids, scores.gather(1, topk_ids))


class OneExpertTwice(LastExperts):
    def __call__(self, gate: GateInput) -> Selection:
        selection = super().__call__(gate)
        return Selection(selection.scores, torch.zeros_like(selection.topk_ids), selection.topk_scores)


def test_a_plug_in_chooses_and_the_gate_does_the_rest() -> None:
    gating = GatingConfig(routing=f"{__name__}:LastExperts", capacity_factor=0.5, renormalize="pre_drop")
    got = route(torch.zeros(8, 4), gating)
    assert got.topk_ids.tolist() == [[2, 3]] * 8
    assert got.capacity == 2
    assert got.requested.tolist() == [0, 0, 8, 8]
    assert got.processed.tolist() == [0, 0, 2, 2]
    assert got.topk_weights[0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("routing", ["no_such_module:Class", f"{__name__}:NoSuchClass"])
def test_a_plug_in_that_is_not_there(routing: str) -> None:
    with pytest.raises(ConfigError, match="cannot be imported"):
        Router(torch.zeros(2, 4), GatingConfig(routing=routing))


def test_a_plug_in_must_choose_distinct_experts_of_the_layer() -> None:
    with pytest.raises(ConfigError, match="names an expert twice or one that is not there"):
        route(torch.zeros(8, 4), GatingConfig(routing=f"{__name__}:OneExpertTwice"))


class NarrowTypes(LastExperts):
    def __call__(self, gate: GateInput) -> Selection:
        selection = super().__call__(gate)
        return replace(selection, topk_ids=selection.topk_ids.int(), topk_scores=torch.full_like(selection.topk_scores, 0.5).bfloat16())


class KeepsWhatItDidNotChoose(LastExperts):
    def __call__(self, gate: GateInput) -> Selection:
        selection = super().__call__(gate)
        return replace(selection, chosen=selection.topk_ids == 3, kept=torch.ones_like(selection.topk_ids))


class HalfExperts(LastExperts):
    def __call__(self, gate: GateInput) -> Selection:
        selection = super().__call__(gate)
        return replace(selection, topk_ids=selection.topk_ids + 0.5)


class NarrowMask(LastExperts):
    def __call__(self, gate: GateInput) -> Selection:
        selection = super().__call__(gate)
        return replace(selection, kept=selection.topk_ids[:, :1] > 0)


class Silent(LastExperts):
    def __call__(self, gate: GateInput) -> Selection:
        return None  # type: ignore[return-value]


class Unbuilt:
    pass


def test_a_plug_in_may_answer_in_any_type() -> None:
    got = route(torch.zeros(8, 4), GatingConfig(routing=f"{__name__}:NarrowTypes", capacity_factor=0.5, renormalize="post_drop"))
    assert (got.topk_ids.dtype, got.topk_weights.dtype) == (torch.int64, torch.float32)
    assert got.topk_weights[0].tolist() == [0.5, 0.5]
    assert got.processed.tolist() == [0, 0, 2, 2]


def test_no_choice_of_a_plug_in_is_kept_that_is_not_chosen_by_a_token_that_counts() -> None:
    got = route(torch.zeros(8, 4), GatingConfig(routing=f"{__name__}:KeepsWhatItDidNotChoose"), used_token=torch.arange(8) > 0)
    assert got.requested.tolist() == got.processed.tolist() == [0, 0, 0, 7]
    assert got.kept.sum() == 7


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("HalfExperts", "HalfExperts answers topk_ids of torch.float32; allowed: whole numbers"),
        ("NarrowMask", r"NarrowMask must answer kept of shape \[8, 2\], not \[8, 1\]"),
        ("Silent", "Silent answers a NoneType; allowed: a moeserve.gating.Selection"),
        ("Unbuilt", r"Unbuilt' cannot be built as Class\(gating\): Unbuilt\(\) takes no arguments"),
    ],
)
def test_a_plug_in_that_answers_something_else(name: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        route(torch.zeros(8, 4), GatingConfig(routing=f"{__name__}:{name}"))
