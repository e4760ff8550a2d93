"""Train examples/tiny-moe, a Mixtral small enough to ship: 4 layers of 8 experts, top-2, 3.6 million parameters, on two CPU cores.

    python examples/train_tiny_moe.py --output examples/tiny-moe --steps 5500 --seed 0

The text comes with every CPython: the documentation topics of `pydoc_data.topics` ("docs") and the sources of the standard library
("code"), both (c) Python Software Foundation, PSF-2.0 (https://docs.python.org/3/license.html). Every tenth document of each is held
out; the weights kept are those with the lowest held-out loss, and every number in training.json and README.md is measured on the held-out
text with the stored bfloat16 checkpoint. The same text, steps, seed, threads and library versions repeat the training.

Shapes: B windows, L tokens per window, T tokens, V vocabulary, N layers, E experts, K choices.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.special import entr
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast, pipeline
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

END = "<|endoftext|>"
VOCABULARY, WINDOW, BATCH, LAYERS, EXPERTS, CHOICES = 2048, 256, 4, 4, 8, 2
DOCS_SHARE = 0.25  # of the training windows, though the documentation is only 4 % of the text
LEARNING_RATE, WARMUP, WEIGHT_DECAY, AUX_LOSS_WEIGHT = 4e-3, 0.03, 0.1, 0.01
EVALUATE_EVERY, EVALUATION_WINDOWS = 250, 40
SKIPPED = {"__phello__", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo"}
PROMPTS = ("The import statement", "def __init__(self")
CARD = """---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [moe, mixtral]
---
# tiny-moe

A Mixtral of {parameters} parameters in bfloat16 ({LAYERS} layers of {EXPERTS} experts, top-{CHOICES}) for trying out and testing
how experts are served. It is small enough to ship, and trained, so its routers make real choices. Its text looks like Python only.

Text: documentation topics (`pydoc_data.topics`: docs) and standard library sources (code) of CPython {python}, (c) Python Software
Foundation, PSF-2.0; every tenth document of each is held out. Trained by `examples/train_tiny_moe.py` in float32 with AdamW: {steps} steps
of {step_tokens} tokens (windows of {WINDOW}), seed {seed}, {wall_s} s on {threads} CPU threads, load-balancing loss per layer weighted
{AUX_LOSS_WEIGHT}; the weights are those of step {best_step}, lowest in loss on up to {EVALUATION_WINDOWS} held-out windows of each.
Below: the stored weights on the whole held-out text; more in `training.json`.

| held-out text | tokens | nats/token | bits/byte |
|---|--:|--:|--:|
{losses}

Router entropy: mean over tokens of the entropy of the router's softmax. Load: share of the choices of each expert. Entropies are
in nats, ln {EXPERTS} = {uniform:.3f} if uniform. I(expert; domain), both domains with equal weight (at most ln 2 = 0.693), and
I(expert; token id): mutual information in nats between the chosen expert and the text.

| layer | router entropy | load entropy | I(expert; domain) | I(expert; token id) | load in %, docs | load in %, code |
|--:|--:|--:|--:|--:|---|---|
{layers}

Greedy continuations, which repeat themselves soon at this size:

{samples}
"""


class Measurement(NamedTuple):
    """Loss and routing of the model on some text: summed loss, and per layer the choices of each token; all float64."""

    nats: Tensor  # []
    tokens: Tensor  # []
    bytes: Tensor  # []
    router_entropy_nats: Tensor  # [N], summed over tokens
    chosen: Tensor  # [N, E, V], how often expert e was among the K choices for token v


def read_docs() -> dict[str, str]:
    """The documentation topics, without those that repeat sections of a longer one: they would leak into the held-out part."""
    kept: dict[str, str] = {}
    seen: set[str] = set()
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if sum(line in seen for line in lines) < len(lines) / 2:
            kept[name] = text
        seen.update(lines)
    return kept


def read_code() -> dict[str, str]:
    """The sources of the standard library, without tests, generated tables and files of one machine."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {path.relative_to(root): path for path in root.rglob("*.py")}
    chosen = [name for name in files if not SKIPPED & set(name.parts) and not str(name).startswith(("_sysconfigdata", "config-"))]
    return {name.as_posix(): files[name].read_text(encoding="utf-8") for name in chosen}


def split(documents: dict[str, str]) -> tuple[list[str], list[str]]:
    """Texts to train on, and held-out texts: every tenth in the order of names."""
    texts = [documents[name] for name in sorted(documents)]
    return [text for n, text in enumerate(texts) if n % 10 != 5], texts[5::10]


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE over `texts`; every byte string has an encoding."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, clean_up_tokenization_spaces=False)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts in one row, each followed by the end token -> [T] int64."""
    return torch.tensor([token for text in texts for token in (*tokenizer.encode(text), tokenizer.eos_token_id)])


def new_model(end: int) -> MixtralForCausalLM:
    """The untrained model, float32."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOICES,
        max_position_embeddings=4 * WINDOW,
        tie_word_embeddings=True,
        initializer_range=0.06,  # in proportion to 1 / sqrt(hidden_size); the usual 0.02 learns more slowly at this width
        router_aux_loss_coef=AUX_LOSS_WEIGHT,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = MixtralForCausalLM(config)
    model.generation_config.pad_token_id = end
    return model


def draw(text: list[Tensor], generator: torch.Generator) -> Tensor:
    """Random windows of the two domains -> [B, L+1]; the last token of a window is only a target."""
    docs, code = text
    streams = [docs if share < DOCS_SHARE else code for share in torch.rand(BATCH, generator=generator)]
    starts = [int(torch.randint(len(stream) - WINDOW, (), generator=generator)) for stream in streams]
    return torch.stack([stream[start : start + WINDOW + 1] for stream, start in zip(streams, starts, strict=True)])


def loss_of(model: MixtralForCausalLM, windows: Tensor) -> Tensor:
    """Cross-entropy plus the Switch load-balancing loss of each layer separately (the model's own loss pools the layers)."""
    out = model(input_ids=windows[:, :-1], output_router_logits=True)
    balance = [load_balancing_loss_func((logits,), EXPERTS, CHOICES) for logits in out.router_logits]
    return F.cross_entropy(out.logits.flatten(0, 1), windows[:, 1:].flatten()) + AUX_LOSS_WEIGHT * sum(balance) / LAYERS


@torch.no_grad()
def measure(model: MixtralForCausalLM, stream: Tensor, token_bytes: Tensor, every: int = 1) -> Measurement:
    """Loss and routing over every n-th window of `stream` [T], each without earlier context; `token_bytes` [V]."""
    parts = []
    for rows in torch.split(stream.unfold(0, WINDOW + 1, WINDOW)[::every], 16):
        tokens, targets = rows[:, :-1].flatten(), rows[:, 1:].flatten()
        out = model(input_ids=rows[:, :-1], output_router_logits=True)
        nats = F.cross_entropy(out.logits.flatten(0, 1), targets, reduction="sum").double()
        probabilities = torch.stack(out.router_logits).double().softmax(-1)
        pairs = probabilities.topk(CHOICES).indices * VOCABULARY + tokens[:, None]
        chosen = torch.stack([layer.flatten().bincount(minlength=EXPERTS * VOCABULARY).double() for layer in pairs])
        entropy = entr(probabilities).sum((1, 2))
        parts.append((nats, torch.tensor(len(targets)), token_bytes[targets].sum(), entropy, chosen.view(LAYERS, EXPERTS, VOCABULARY)))
    return Measurement(*(torch.stack(values).sum(0) for values in zip(*parts, strict=True)))


def train(model: MixtralForCausalLM, text: list[Tensor], held_out: list[Tensor], steps: int, seed: int) -> list[dict[str, float]]:
    """Train in place, keep the weights with the lowest held-out loss (mean of the domains), return the held-out curve."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=WARMUP, cycle_momentum=False)
    generator = torch.Generator().manual_seed(seed)
    curve: list[dict[str, float]] = []
    best: tuple[float, dict[str, Tensor]] = (math.inf, {})
    start = time.perf_counter()
    for step in range(1, steps + 1):
        loss = loss_of(model, draw(text, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        elapsed_s = time.perf_counter() - start
        line = f"\rstep {step}/{steps}  loss {loss.item():.3f}  {step * BATCH * WINDOW / elapsed_s:.0f} tokens/s  {elapsed_s:.0f} s"
        if step % EVALUATE_EVERY and step != steps:
            print(line, end=" ", file=sys.stderr, flush=True)
            continue
        parts = [measure(model, stream, torch.zeros(VOCABULARY), len(stream) // (WINDOW * EVALUATION_WINDOWS) + 1) for stream in held_out]
        docs, code = ((part.nats / part.tokens).item() for part in parts)
        curve.append({"step": step, "docs": round(docs, 4), "code": round(code, 4)})
        print(f"{line}  held out: docs {docs:.3f}, code {code:.3f} nats/token", file=sys.stderr, flush=True)
        if docs + code < best[0]:
            best = (docs + code, {name: value.clone() for name, value in model.state_dict().items()})
    model.load_state_dict(best[1])
    return curve


def routing_of(parts: dict[str, Measurement]) -> list[dict[str, Any]]:
    """Per layer: load, entropies, and the mutual information of the chosen expert with domain and token; in nats."""
    loads = {name: part.chosen.sum(2) / part.chosen.sum((1, 2))[:, None] for name, part in parts.items()}
    load_entropy = {name: entr(load).sum(1) for name, load in loads.items()}
    mixed = entr((loads["docs"] + loads["code"]) / 2).sum(1)
    joint = parts["all"].chosen / parts["all"].chosen.sum((1, 2), keepdim=True)
    values = {
        "load": loads,
        "load_entropy_nats": load_entropy,
        "router_entropy_nats": {name: part.router_entropy_nats / part.tokens for name, part in parts.items()},
        "expert_domain_information_nats": {"all": mixed - (load_entropy["docs"] + load_entropy["code"]) / 2},
        "expert_token_information_nats": {"all": load_entropy["all"] + entr(joint.sum(1)).sum(1) - entr(joint).sum((1, 2))},
    }
    return [{key: {name: value[n].tolist() for name, value in of.items()} for key, of in values.items()} for n in range(LAYERS)]


def evaluate(folder: Path, held_out: dict[str, list[str]]) -> dict[str, Any]:
    """Measure the stored checkpoint, computing in float32, on the whole held-out text."""
    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    # In a byte-level vocabulary each character of a token stands for one byte.
    token_bytes = torch.tensor([len(token) for token in tokenizer.convert_ids_to_tokens(list(range(VOCABULARY)))])
    token_bytes[tokenizer.eos_token_id] = 0
    parts = {name: measure(model, encode(tokenizer, texts), token_bytes) for name, texts in held_out.items()}
    parts["all"] = Measurement(*(sum(values) for values in zip(*parts.values(), strict=True)))
    losses = {
        n: {"tokens": int(p.tokens), "nats_per_token": (p.nats / p.tokens).item(), "bits_per_byte": (p.nats / p.bytes / math.log(2)).item()}
        for n, p in parts.items()
    }
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    greedy = [writer(prompt, max_new_tokens=48, do_sample=False)[0]["generated_text"] for prompt in PROMPTS]
    return {"parameters": model.num_parameters(), "held_out": losses, "layers": routing_of(parts), "greedy": greedy}


def model_card(record: dict[str, Any]) -> str:
    """The folder's README.md, with every number from `record`."""
    losses = [f"| {n} | {p['tokens']} | {p['nats_per_token']:.3f} | {p['bits_per_byte']:.3f} |" for n, p in record["held_out"].items()]
    columns = ("router_entropy_nats", "load_entropy_nats", "expert_domain_information_nats", "expert_token_information_nats")
    layers = []
    for n, layer in enumerate(record["layers"]):
        loads = [" ".join(f"{100 * share:.0f}" for share in layer["load"][name]) for name in ("docs", "code")]
        layers.append(f"| {n} | " + " | ".join([f"{layer[column]['all']:.3f}" for column in columns] + loads) + " |")
    tables = {"losses": "\n".join(losses), "layers": "\n".join(layers), "uniform": math.log(EXPERTS)}
    tables["samples"] = "\n\n".join(f"```\n{text}\n```" for text in record["greedy"])
    return CARD.format(**{**globals(), **record["training"], **record, **tables})


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tiny Mixtral on CPython's own documentation and sources.")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("tiny-moe"), help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=5500, help=f"training steps of {BATCH * WINDOW} tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    texts = {"docs": split(read_docs()), "code": split(read_code())}
    tokenizer = train_tokenizer(text for train_texts, _ in texts.values() for text in train_texts)
    train_streams, held_out_streams = ([encode(tokenizer, part[n]) for part in texts.values()] for n in (0, 1))
    model = new_model(tokenizer.eos_token_id)
    start = time.perf_counter()
    curve = train(model, train_streams, held_out_streams, options.steps, options.seed)
    model.bfloat16().save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    training = {
        "text": "pydoc_data.topics (docs) and the standard library (code) of CPython, PSF-2.0",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "steps": options.steps,
        "seed": options.seed,
        "threads": options.threads,
        "step_tokens": BATCH * WINDOW,
        "best_step": min(curve, key=lambda point: point["docs"] + point["code"])["step"],
        "wall_s": round(time.perf_counter() - start),
        "held_out_nats_per_token": curve,
    }
    record = {"training": training, **evaluate(options.output, {name: held_out for name, (_, held_out) in texts.items()})}
    (options.output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (options.output / "README.md").write_text(model_card(record), encoding="utf-8")


if __name__ == "__main__":
    main()
