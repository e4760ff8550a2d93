"""Generation with remote experts against transformers alone; rows of padding are neither computed nor counted."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import moeserve
from moeserve import Client, EmbeddedClient, ForwardOutput
from moeserve.engines import hf_padding
from tests.support.closeness import assert_close

TINY = Path(__file__).parents[2] / "examples" / "tiny-moe"
TEXTS = ["The import statement", "A", "def f(self, x, y): return the list of all", "The"]
LAYERS, TOP_K, NEW = 4, 2, 8
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
#: four layers, each with norms, attention of 128 and experts of 256 over 128
SUMMED = LAYERS * (2 * 128 + 256)


class Recorder:
    """A client that keeps the answers that went through it; `errors` are raised in the place of the next ones."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.answers: list[ForwardOutput] = []
        self.errors: list[BaseException] = []

    def layers(self) -> Any:
        return self.client.layers()

    def forward(self, *args: Any, **kwargs: Any) -> ForwardOutput:
        if self.errors:
            raise self.errors.pop()
        self.answers.append(self.client.forward(*args, **kwargs))
        return self.answers[-1]

    @property
    def processed(self) -> int:
        return sum(int(answer.processed.sum()) for answer in self.answers)


def config(**gating: Any) -> dict[str, Any]:
    return {
        "model": {"checkpoint": TINY, "dtype": "float32"},
        "placement": {"num_hosts": 2},
        "server": {"port": 0, "metrics_port": 0},
        "layers": [{"gating": gating} for _ in range(LAYERS)] if gating else [],
    }


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with moeserve.serve(config(), cluster="threads") as service:
        yield service.target


@pytest.fixture(params=[Client, EmbeddedClient])
def recorder(request: pytest.FixtureRequest, target: str) -> Iterator[Recorder]:
    with request.param(target) as client:
        yield Recorder(client)


@pytest.fixture
def remote(recorder: Recorder) -> PreTrainedModel:
    return moeserve.load_model(TINY, recorder, dtype=torch.float32)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def local() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    return model


def padded(texts: list[str]) -> dict[str, Tensor]:
    """input_ids and attention_mask [B, S], padding on the left."""
    tokenizer = AutoTokenizer.from_pretrained(TINY, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return padded(TEXTS)


def test_a_padded_batch_has_the_tokens_of_transformers(
    local: PreTrainedModel, remote: PreTrainedModel, recorder: Recorder, batch: dict[str, Tensor]
) -> None:
    assert torch.equal(remote.generate(**batch, **GREEDY), local.generate(**batch, **GREEDY))
    rows = int(batch["attention_mask"].sum()) + len(TEXTS) * (NEW - 1)
    assert recorder.processed == LAYERS * TOP_K * rows
    alone = padded(TEXTS[:1])
    count = alone["input_ids"].shape[1] + NEW
    assert torch.equal(remote.generate(**alone, **GREEDY)[0], remote.generate(**batch, **GREEDY)[0, -count:])


def test_sampling_with_a_seed_has_the_tokens_of_transformers(
    local: PreTrainedModel, remote: PreTrainedModel, batch: dict[str, Tensor]
) -> None:
    found = []
    for model in (local, remote):
        torch.manual_seed(5)
        found.append(model.generate(**batch, **{**GREEDY, "do_sample": True}))
    assert torch.equal(*found)
    assert not torch.equal(found[0], local.generate(**batch, **GREEDY))


def test_a_model_may_be_in_a_folder_of_its_folder(target: str, local: PreTrainedModel, batch: dict[str, Tensor], tmp_path: Path) -> None:
    """Options that say where a model is count for its config.json, too."""
    (tmp_path / "model").symlink_to(TINY)
    with Client(target) as client:
        remote = moeserve.load_model(tmp_path, client, subfolder="model", dtype=torch.float32)
        assert torch.equal(remote.generate(**batch, **GREEDY), local.generate(**batch, **GREEDY))


def test_padding_takes_no_room_from_others(local: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """All padding goes to the same experts, which have room for one row in eight."""
    used = batch["attention_mask"].bool()
    with moeserve.serve(config(top_k=TOP_K, capacity_factor=1.0), cluster="threads") as service, Client(service.target) as client:
        recorder = Recorder(client)
        remote = moeserve.load_model(TINY, recorder, dtype=torch.float32)  # type: ignore[arg-type]
        with torch.no_grad():
            remote(batch["input_ids"])
            assert sum(int(answer.dropped.sum()) for answer in recorder.answers) > 0
            recorder.answers.clear()
            ours, theirs = (model(**batch).logits[used] for model in (remote, local))
    assert sum(int(answer.dropped.sum()) for answer in recorder.answers) == 0
    assert_close(ours, theirs, SUMMED)


def test_other_ways_to_generate_have_the_tokens_of_transformers(
    local: PreTrainedModel, remote: PreTrainedModel, batch: dict[str, Tensor]
) -> None:
    """A static cache comes with masks of four dimensions, beams repeat prompts, and looked-up tokens come several at a time."""
    longest = padded(TEXTS[2:3])
    for prompts, options in (
        (batch, {"cache_implementation": "static"}),
        (batch, {"num_beams": 3}),
        (batch, {"use_cache": False}),
        (longest, {"prompt_lookup_num_tokens": 3}),
    ):
        assert torch.equal(remote.generate(**prompts, **GREEDY, **options), local.generate(**prompts, **GREEDY, **options)), options


def four_dimensional(mask: Tensor) -> Tensor:
    """[B, S] -> [B, 1, S, S] bool, causal; rows of padding see themselves."""
    size = mask.shape[1]
    seen = torch.ones(size, size, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    return seen | torch.eye(size, dtype=torch.bool)


def test_a_mask_that_does_not_say_which_rows_are_padding_is_ignored_and_said_once(
    local: PreTrainedModel, remote: PreTrainedModel, recorder: Recorder, batch: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    hf_padding._say_ignored.cache_clear()
    mask, ids = four_dimensional(batch["attention_mask"]), batch["input_ids"]
    with caplog.at_level(logging.INFO, hf_padding.__name__), torch.no_grad():
        for _ in range(2):
            assert_close(remote(ids, attention_mask=mask).logits, local(ids, attention_mask=mask).logits, SUMMED)
    assert recorder.processed == 2 * LAYERS * TOP_K * ids.numel()
    (line,) = [record.getMessage() for record in caplog.records if record.name == hf_padding.__name__]
    assert "an attention mask of 4 dimensions is not [B, P + S]" in line


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_fails_leaves_nothing_behind(
    error: type[BaseException], remote: PreTrainedModel, recorder: Recorder, batch: dict[str, Tensor]
) -> None:
    recorder.errors.append(error())
    with pytest.raises(error), torch.no_grad():
        remote(**batch)
    experts, rows = remote.get_submodule("model.layers.0.mlp.experts"), batch["input_ids"].numel()
    with torch.no_grad():
        experts(torch.randn(rows, 128), torch.tensor([[0, 1]]).expand(rows, 2), torch.rand(rows, 2))
    assert recorder.processed == rows * TOP_K


def test_threads_have_masks_of_their_own(local: PreTrainedModel, remote: PreTrainedModel) -> None:
    batches = [padded([text, TEXTS[2]]) for text in TEXTS[:2] * 3]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda batch: remote.generate(**batch, **GREEDY), batches))
    for batch, tokens in zip(batches, found, strict=True):
        assert torch.equal(tokens, local.generate(**batch, **GREEDY))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("recorder", "backend"), [(Client, "aot_eager"), (EmbeddedClient, "eager")], indirect=["recorder"])
def test_a_compiled_model_has_the_tokens_of_transformers(
    local: PreTrainedModel, remote: PreTrainedModel, recorder: Recorder, batch: dict[str, Tensor], backend: str
) -> None:
    """The parts between the experts are compiled."""
    few = {**GREEDY, "max_new_tokens": 3, "min_new_tokens": 3}
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    remote.compile(backend=backend)
    try:
        assert torch.equal(remote.generate(**batch, **few), local.generate(**batch, **few))
    finally:
        torch._dynamo.reset()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before + LAYERS
    assert recorder.processed == LAYERS * TOP_K * (int(batch["attention_mask"].sum()) + len(TEXTS) * (3 - 1))
