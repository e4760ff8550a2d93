"""Requests whose answers are known.

T tokens, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from moeserve.api.output import ForwardOutput
from moeserve.api.tensors import FLOAT_DTYPES
from moeserve.bench.load import WrongAnswer, check_answer
from moeserve.checkpoints import layer_sources
from moeserve.config import BY_TOKEN_ID, LayerSpec, ServiceConfig
from moeserve.layer.moe_layer import MoELayer

_SIZES: Final = (1, 16, 64)
_OF_EACH_SIZE: Final = 4
#: layers that are asked; of more, so many that are spread over the model
_MOST_LAYERS: Final = 4


@dataclass(frozen=True)
class Question:
    """hidden_states [T, H] for a layer, token_ids [T] if it routes by them, and what the layer answers in one process.

    relative_error   how far a row may be from that, as a share of its norm: what rounding does
    """

    layer: int
    hidden_states: torch.Tensor
    token_ids: torch.Tensor | None
    expected: ForwardOutput
    relative_error: float

    def check(self, answer: ForwardOutput) -> None:
        """Raises WrongAnswer. Tokens of which the answer says that it lacks choices are left out, unless it lacks what it should."""
        check_answer(answer, self.expected.hidden_states)
        is_partial = not torch.equal(answer.processed, self.expected.processed)
        is_whole = ~answer.dropped_tokens if is_partial else torch.ones_like(answer.dropped_tokens)
        actual, expected = answer.hidden_states[is_whole].double(), self.expected.hidden_states[is_whole].double()
        norm = expected.norm(dim=1)
        # What is near zero by chance has the errors of the large numbers that it is made of.
        allowed = self.relative_error * norm.maximum(norm.square().mean().sqrt()).masked_fill(norm == 0, 0)
        is_off = ~((actual - expected).norm(dim=1) <= allowed)
        if is_off.any():
            raise WrongAnswer(f"{int(is_off.sum())} of {len(norm)} rows differ from the layer in one process by more than rounding")


def make_questions(config: ServiceConfig, seed: int) -> list[Question]:
    """Questions to some layers of a configuration, to be asked in turn; holds one layer at a time, computed by torch's operators.

    Raises ConfigError or CheckpointError, and InvalidRequest for a layer whose callers must route.
    """
    sources = layer_sources(config.model_copy(update={"model": config.model.model_copy(update={"kernel": "torch"})}))
    step = max(1, len(sources) // _MOST_LAYERS)
    generator = torch.Generator().manual_seed(seed)
    found = [
        question
        for index in range(0, len(sources), step)
        for question in _of_layer(index, MoELayer.from_source(sources[index]), config.server.max_tokens_per_request, generator)
    ]
    order = torch.randperm(len(found), generator=generator).tolist()
    return [found[index] for index in order]


def _of_layer(index: int, layer: MoELayer, most_tokens: int, generator: torch.Generator) -> list[Question]:
    spec, questions = layer.spec, []
    for size in _SIZES * _OF_EACH_SIZE:
        tokens = min(size, most_tokens)
        rows = torch.randn(tokens, spec.hidden_size, generator=generator)
        token_ids = torch.randint(0, 2**31, (tokens,), generator=generator) if spec.gating.routing in BY_TOKEN_ID else None
        expected = layer.run(rows, token_ids=token_ids)
        questions.append(Question(index, rows, token_ids, expected, _relative_error(spec)))
    return questions


def _relative_error(spec: LayerSpec) -> float:
    """A sum of n terms is off by at most n eps, and a layer adds up H terms twice and 2 H once; a few numbers are rounded to its dtype."""
    error = torch.finfo(torch.float32).eps * (16 + 4 * spec.hidden_size)
    dtype = FLOAT_DTYPES[spec.dtype]
    return error if dtype == torch.float32 else error + 4 * torch.finfo(dtype).eps
