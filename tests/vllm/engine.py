"""Runs in vLLM's environment: one engine in this process, as the JSON of the first argument says; prints one line of JSON.

    {"model": FOLDER, "prompts": [[token ids], ...], "new": 40, "options": {of vllm.LLM}, "after_first_token": SHELL}

Moreover what its memory holds, and which tensors it has read from disk.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main() -> None:
    import vllm
    from vllm.model_executor.model_loader import weight_utils

    asked = json.loads(sys.argv[1])
    read: list[str] = []
    opened = weight_utils.safe_open

    class Opened:
        def __init__(self, *arguments: object, **named: object) -> None:
            self._file = opened(*arguments, **named)

        def __enter__(self) -> Opened:
            self._file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self._file.__exit__(*error)

        def __getattr__(self, name: str) -> object:
            return getattr(self._file, name)

        def get_tensor(self, name: str) -> object:
            read.append(name)
            return self._file.get_tensor(name)

    weight_utils.safe_open = Opened
    options = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 256, "seed": 0} | asked["options"]
    engine = vllm.LLM(asked["model"], **options)
    chosen = vllm.SamplingParams(temperature=0, max_tokens=asked["new"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    if asked.get("warm"):
        engine.generate(prompts, chosen, use_tqdm=False)
    began = time.perf_counter()
    answers = engine.generate(prompts, chosen, use_tqdm=False)
    took_s = time.perf_counter() - began
    again = engine.generate(prompts, chosen, use_tqdm=False) if asked.get("again") else []
    parameters = dict(engine.apply_model(lambda model: [(name, each.nbytes) for name, each in model.named_parameters()])[0])
    found = {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "reasons": [answer.outputs[0].finish_reason for answer in answers],
        "again": [list(answer.outputs[0].token_ids) for answer in again],
        "seconds": took_s,
        "parameters": parameters,
        "read": read,
    }
    print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
